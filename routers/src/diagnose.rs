//! What can go wrong with gates, as numbers.
