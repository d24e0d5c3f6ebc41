//! A composite onto disk.
