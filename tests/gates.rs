//! Tests of `gates`.
