//! Integration tests: one binary, a module per topic.

#[cfg(test)]
mod support;

#[cfg(test)]
mod configs;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod identities;
