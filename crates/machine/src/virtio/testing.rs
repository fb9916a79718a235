//! Fake drivers.
