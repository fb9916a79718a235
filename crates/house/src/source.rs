//! Rust source as far as the rules need it: comments and the insides of strings blanked, tests left out.
//!
//! *Invariant*: [`code`] and [`without_tests`] keep every line break and every byte's place, so a place found in the result is a place in the file.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::{files, read};

/// The text with comments and the insides of strings and characters replaced by blanks.
pub fn code(text: &str) -> String {
    let from = text.as_bytes();
    let mut out = from.to_vec();
    let blank = |out: &mut [u8], from: usize, to: usize| {
        let to = to.min(out.len());
        out[from.min(to)..to].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
    };
    let find = |needle: &[u8], at: usize| (at..from.len()).find(|&i| from[i..].starts_with(needle)).unwrap_or(from.len());
    let mut i = 0;
    while i < from.len() {
        let rest = &from[i..];
        let in_word = i > 0 && (from[i - 1].is_ascii_alphanumeric() || from[i - 1] == b'_');
        let end = if rest.starts_with(b"//") {
            let end = find(b"\n", i);
            blank(&mut out, i, end);
            end
        } else if rest.starts_with(b"/*") {
            let (mut depth, mut end) = (1, i + 2);
            while depth > 0 && end < from.len() {
                let (step, change) = match &from[end..] {
                    [b'/', b'*', ..] => (2, 1),
                    [b'*', b'/', ..] => (2, -1),
                    _ => (1, 0),
                };
                end += step;
                depth += change;
            }
            blank(&mut out, i, end);
            end
        } else if let Some(hashes) = raw_string(rest).filter(|_| !in_word) {
            let start = find(b"\"", i) + 1;
            let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            let end = find(&close, start);
            blank(&mut out, start, end);
            end + close.len()
        } else if rest[0] == b'"' {
            let end = closing(from, i + 1, b'"');
            blank(&mut out, i + 1, end);
            end + 1
        } else if rest[0] == b'\'' && is_character(rest) {
            let end = closing(from, i + 1, b'\'');
            blank(&mut out, i + 1, end);
            end + 1
        } else {
            i + 1
        };
        i = end;
    }
    String::from_utf8(out).expect("only whole strings and comments were blanked")
}

/// How many hashes the raw string that begins here has.
fn raw_string(rest: &[u8]) -> Option<usize> {
    let rest = rest.strip_prefix(b"b").or_else(|| rest.strip_prefix(b"c")).unwrap_or(rest).strip_prefix(b"r")?;
    let hashes = rest.iter().take_while(|b| **b == b'#').count();
    (rest.get(hashes) == Some(&b'"')).then_some(hashes)
}

/// A character, not a lifetime.
fn is_character(rest: &[u8]) -> bool {
    let second = std::str::from_utf8(&rest[1..rest.len().min(5)]).or_else(|e| std::str::from_utf8(&rest[1..1 + e.valid_up_to()]));
    let Some(c) = second.ok().and_then(|s| s.chars().next()) else { return false };
    c == '\\' || rest.get(1 + c.len_utf8()) == Some(&b'\'')
}

fn closing(from: &[u8], mut at: usize, quote: u8) -> usize {
    while at < from.len() && from[at] != quote {
        at += if from[at] == b'\\' { 2 } else { 1 };
    }
    at.min(from.len())
}

/// [`code`] without the items marked `#[cfg(test)]`, and the files that such items (`mod name;`) name.
pub fn without_tests(file: &Path, text: &str) -> (String, Vec<PathBuf>) {
    const MARK: &str = "#[cfg(test)]";
    let mut code = code(text);
    let mut named = Vec::new();
    while let Some(at) = code.find(MARK) {
        let rest = &code[at + MARK.len()..];
        let stop = rest.find(['{', ';']).expect("an attribute stands before an item");
        let len = if rest.as_bytes()[stop] == b';' {
            let item = &text[at + MARK.len()..at + MARK.len() + stop];
            named.extend(module_file(file, item));
            stop + 1
        } else {
            let mut depth = 0_i32;
            let end = rest.bytes().skip(stop).position(|b| {
                depth += i32::from(b == b'{') - i32::from(b == b'}');
                depth == 0
            });
            stop + end.expect("braces match") + 1
        };
        let end = at + MARK.len() + len;
        let blanked: String = code[at..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        // Only ASCII is left outside strings and comments, but for names, of which there are none.
        assert_eq!(blanked.len(), end - at, "{}: only ASCII in code", file.display());
        code.replace_range(at..end, &blanked);
    }
    (code, named)
}

/// The file of `mod name;`, with or without a `#[path]`.
fn module_file(file: &Path, item: &str) -> Option<PathBuf> {
    let folder = file.parent()?;
    if let Some((_, rest)) = item.split_once("#[path = \"") {
        return Some(folder.join(rest.split_once('"')?.0));
    }
    let name = item.split_once("mod ")?.1.trim();
    let stem = file.file_stem()?.to_str()?;
    let folder = if ["lib", "main", "mod"].contains(&stem) { folder.to_owned() } else { folder.join(stem) };
    let flat = folder.join(format!("{name}.rs"));
    Some(if flat.exists() { flat } else { folder.join(name).join("mod.rs") })
}

/// What ships of a crate: each source file's code without tests, and without the files that only tests use.
pub fn shipped(crate_folder: &Path) -> Vec<(PathBuf, String)> {
    let mut tests = BTreeSet::new();
    let mut all = Vec::new();
    for file in files(&crate_folder.join("src"), "rs") {
        let (code, named) = without_tests(&file, &read(&file));
        tests.extend(named);
        all.push((file, code));
    }
    let only_tests = |file: &Path| {
        tests
            .iter()
            .any(|t| file == t || (t.ends_with("mod.rs") && file.starts_with(t.parent().expect("a file lies in a folder"))))
    };
    all.retain(|(file, _)| !only_tests(file));
    all
}

/// The line of a place.
pub fn line(text: &str, at: usize) -> usize {
    text[..at].bytes().filter(|b| *b == b'\n').count() + 1
}

/// Whether `word` stands in `code` as a whole word (it may contain `::`), and where first.
pub fn find_word(code: &str, word: &str) -> Option<usize> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| !code[..at].ends_with(part) && (!code[at + word.len()..].starts_with(part) || word.ends_with(|c| !part(c))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_strings_and_characters_are_no_code() {
        let text = "let a = \"Instant // \\\" x\"; // std::fs\nlet b = '\"'; /* a /* b */ c */ let c = r#\"q\" d\"#; fn f<'a>(x: &'a str) {}";
        let code = code(text);
        assert_eq!(code.len(), text.len());
        for gone in ["Instant", "std", "q\"", "/*", " b */"] {
            assert!(!code.contains(gone), "{gone} in {code}");
        }
        for kept in ["let a", "let b", "let c", "fn f<'a>(x: &'a str) {}"] {
            assert!(code.contains(kept), "{kept} not in {code}");
        }
    }

    #[test]
    fn tests_are_left_out() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n  use std::fs;\n  fn x() { '{' }\n}\nfn b() {}\n#[cfg(test)]\n#[path = \"t.rs\"]\nmod more;\n";
        let (code, named) = without_tests(Path::new("/c/src/lib.rs"), text);
        assert!(code.contains("fn a") && code.contains("fn b") && !code.contains("std::fs") && !code.contains("more"));
        assert_eq!(named, [Path::new("/c/src/t.rs")]);
        assert_eq!(line(&code, code.find("fn b").unwrap()), 7);
    }

    #[test]
    fn words() {
        assert_eq!(find_word("use std::fs;", "std::fs"), Some(4));
        assert_eq!(find_word("use std::fsx; my_std::fs", "std::fs"), None);
        assert_eq!(find_word("x.todo!()", "todo!"), Some(2));
    }
}
