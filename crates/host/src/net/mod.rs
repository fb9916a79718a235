//! Frames in and out of the host.
pub mod frames;
