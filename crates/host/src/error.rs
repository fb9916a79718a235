//! The one error type of this room: what was wrong, where, what the system said, and what to do next.
//!
//! *Invariant*: an error is written for the person who reads it on a terminal; code that has to tell cases apart gets
//! an enum of its own (see `arbiter`), never a comparison of texts.

use std::fmt;
use std::path::Path;

/// What could not be done, why, and the way out.
#[derive(Debug)]
pub struct Error {
    what: String,
    next: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// A result whose error a person can act on.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Says what could not be done, and where: "cannot open the disk image /x/y".
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), next: None, source: None }
    }

    /// Adds the way out: "give --disk-read-only, or stop the other VM".
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Adds what the system or a library said.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What could not be done, without the reason and the way out.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        if let Some(next) = &self.next {
            write!(f, "\n  what to do: {next}")?;
        }
        Ok(())
    }
}

// The source is already part of the text, so it is not offered again: `anyhow` would print it twice.
impl std::error::Error for Error {}

/// Puts a sentence before a bare I/O error.
pub trait Context<T> {
    /// "cannot VERB PATH: what the system said"
    fn at(self, verb: &str, path: &Path) -> Result<T>;
    /// "WHAT: what the system said"
    fn what(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn at(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::new(format!("cannot {verb} {}", path.display())).because(e))
    }

    fn what(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| Error::new(what).because(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_why_and_what_next() {
        let error = Error::new("cannot open /nowhere").because(std::io::Error::from_raw_os_error(2)).next("create it");
        assert_eq!(error.to_string(), "cannot open /nowhere: No such file or directory (os error 2)\n  what to do: create it");
    }
}
