//! The record format of Debian's package lists (deb822): `Field: value` lines, stanzas parted by empty lines.
//!
//! *In*: text from `apt-cache show`, or a host's `*.sources` file. *Out*: stanzas. *Invariant*: unknown or odd lines are
//! skipped, never guessed at.

use std::collections::BTreeMap;

/// One package's record, or one entry of a sources file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stanza {
    fields: BTreeMap<String, String>,
}

/// One thing a package needs: the first of its alternatives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dependency {
    /// The package's name without architecture.
    pub name: String,
    /// The version, when it must be exactly this one.
    pub exactly: Option<String>,
}

impl Stanza {
    /// A field's value; field names are compared without case. Continuation lines are joined by newlines.
    pub fn get(&self, field: &str) -> Option<&str> {
        self.fields.get(&field.to_ascii_lowercase()).map(String::as_str)
    }

    /// The `Package` field.
    pub fn name(&self) -> &str {
        self.get("Package").unwrap_or("")
    }

    /// `Depends` and `Pre-Depends`, the first alternative of each.
    pub fn depends(&self) -> Vec<Dependency> {
        ["Pre-Depends", "Depends"]
            .iter()
            .filter_map(|field| self.get(field))
            .flat_map(|value| value.split(','))
            .filter_map(|clause| Dependency::parse(clause.split('|').next()?))
            .collect()
    }
}

impl Dependency {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (name, rest) = text.split_once(['(', ' ', '[']).unwrap_or((text, ""));
        let name = name.trim().split(':').next()?;
        if name.is_empty() {
            return None;
        }
        let rest = rest.trim_start_matches([' ', '(']);
        let exactly = rest.strip_prefix('=').map(|v| v.trim().trim_end_matches(')').trim().to_owned());
        Some(Self { name: name.to_owned(), exactly })
    }
}

/// Splits a text into its stanzas.
pub fn parse(text: &str) -> Vec<Stanza> {
    let mut stanzas = Vec::new();
    let mut current = Stanza::default();
    let mut last: Option<String> = None;
    for line in text.lines().chain(std::iter::once("")) {
        if line.trim().is_empty() {
            if !current.fields.is_empty() {
                stanzas.push(std::mem::take(&mut current));
            }
            last = None;
        } else if line.starts_with('#') {
        } else if line.starts_with([' ', '\t']) {
            if let Some(value) = last.as_ref().and_then(|field| current.fields.get_mut(field)) {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            let field = field.trim().to_ascii_lowercase();
            current.fields.insert(field.clone(), value.trim().to_owned());
            last = Some(field);
        }
    }
    stanzas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stanzas_with_comments_and_continuations() {
        let text = "Package: a\nVersion: 1\nDescription: x\n more\n\n\n# note\nPackage: b\nodd line\nversion: 2";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].get("description"), Some("x\nmore"));
        assert_eq!((found[1].name(), found[1].get("Version")), ("b", Some("2")));
    }

    #[test]
    fn reads_dependencies() {
        let text = "Package: redis-server\nPre-Depends: init-system-helpers (>= 1.54~)\n\
                    Depends: lsb-base (>= 3.2-14) | other, redis-tools (= 5:7.0.15-1), libc6:any, perl [amd64],";
        let names: Vec<_> = parse(text)[0].depends().into_iter().map(|d| (d.name, d.exactly)).collect();
        let plain = |name: &str| (name.to_owned(), None);
        assert_eq!(
            names,
            [
                plain("init-system-helpers"),
                plain("lsb-base"),
                ("redis-tools".to_owned(), Some("5:7.0.15-1".to_owned())),
                plain("libc6"),
                plain("perl"),
            ]
        );
    }
}
