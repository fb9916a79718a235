//! Style as a test: heads, lengths, nothing left undone, links that lead somewhere, one test command.
use std::path::Path;

use twinstep_house::{files, read, root, shown, source};

/// A file may have so many lines.
const LONGEST: usize = 800;

/// Files that are longer, and why they are not split.
const LONGER: &[(&str, &str)] = &[];

#[test]
fn files_are_short_enough_to_read() {
    let mut wrong = Vec::new();
    for file in files(&root().join("crates"), "rs") {
        let (name, lines) = (shown(&file), read(&file).lines().count());
        let excused = LONGER.iter().any(|(n, _)| *n == name);
        if lines > LONGEST && !excused {
            wrong.push(format!("{name} has {lines} lines: split it by idea, or say in LONGER why not"));
        }
        if lines <= LONGEST && excused {
            wrong.push(format!("{name} has only {lines} lines: take it off LONGER"));
        }
    }
    for (name, _) in LONGER {
        if !root().join(name).exists() {
            wrong.push(format!("{name} is gone: take it off LONGER"));
        }
    }
    assert!(wrong.is_empty(), "the limit is {LONGEST} lines (list: {}):\n{}", file!(), wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let all = files(&root().join("crates"), "rs");
    let headless: Vec<_> = all.iter().filter(|file| !read(file).starts_with("//!")).map(|file| shown(file)).collect();
    assert!(
        headless.is_empty(),
        "these files do not open with a head (`//! What it is. In, out, invariant.`):\n{}",
        headless.join("\n")
    );
}

#[test]
fn nothing_is_left_undone() {
    // Written in two parts, so that this file does not accuse itself.
    let words = ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!"));
    let mut found = Vec::new();
    for file in files(&root().join("crates"), "rs") {
        let code = source::code(&read(&file));
        for word in &words {
            if let Some(at) = source::find_word(&code, word) {
                found.push(format!("{}:{}: {word}", shown(&file), source::line(&code, at)));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The documents.
fn documents() -> Vec<std::path::PathBuf> {
    let mut all = files(&root().join("docs"), "md");
    all.extend(["README.md", "ARCHITECTURE.md"].map(|name| root().join(name)));
    all
}

/// Heading to anchor, as GitHub does it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        let text = read(&document);
        let folder = document.parent().expect("a file lies in a folder");
        for (at, _) in text.match_indices("](") {
            let target = &text[at + 2..];
            let Some(target) = target.split_once(')').map(|(t, _)| t) else { continue };
            if target.contains("://") || target.contains('\n') {
                continue;
            }
            let (path, wanted) = target.split_once('#').map_or((target, None), |(p, a)| (p, Some(a)));
            let file = if path.is_empty() { document.clone() } else { folder.join(path) };
            let place = format!("{}:{}: {target}", shown(&document), source::line(&text, at));
            if !file.exists() {
                broken.push(format!("{place}: there is no such file"));
            } else if let Some(wanted) = wanted
                && !read(&file).lines().filter_map(|l| l.strip_prefix('#')).any(|l| anchor(l.trim_start_matches('#')) == wanted)
            {
                broken.push(format!("{place}: there is no such heading"));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Files that the documents name in `code` must exist, too: prose rots more quietly than links.
#[test]
fn files_named_in_the_documents_exist() {
    let mut gone = Vec::new();
    for document in documents() {
        let text = read(&document);
        for (number, line) in text.lines().enumerate() {
            for name in line.split('`').skip(1).step_by(2) {
                let ours = ["crates/", "docs/", "fuzz/", ".ci/"].iter().any(|start| name.starts_with(start));
                if ours && !name.contains(['*', ' ', '<', '{']) && !root().join(name).exists() {
                    gone.push(format!("{}:{}: {name}", shown(&document), number + 1));
                }
            }
        }
    }
    assert!(gone.is_empty(), "these documents name files that do not exist:\n{}", gone.join("\n"));
}

#[test]
fn the_readmes_test_command_is_what_ci_runs() {
    let readme = read(&root().join("README.md"));
    let commands: Vec<&str> = readme
        .lines()
        .skip_while(|l| !l.starts_with("```sh"))
        .skip(1)
        .take_while(|l| !l.starts_with("```"))
        .filter(|l| l.starts_with("cargo "))
        .collect();
    let [demo, test, ..] = commands[..] else { panic!("the README begins with two commands, not {commands:?}") };
    let command = |line: &str| line.split('#').next().unwrap_or_default().trim().to_owned();
    assert_eq!(command(demo), "cargo run --release -- demo");
    let ci = read(Path::new(&root().join(".ci/run")));
    assert!(ci.lines().any(|l| l.trim().ends_with(&command(test))), ".ci/run does not run the README's {}", command(test));
}
