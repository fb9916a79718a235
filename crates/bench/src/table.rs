//! Tables for terminals and for Markdown alike. *Invariant*: columns line up, whatever is in them.

use std::fmt::Write;

/// Rows of cells; the first row is the head. The first column is aligned to the left, the others to the right.
#[must_use]
pub fn render(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, width) in widths.iter().enumerate() {
            let cell = row.get(column).map_or("", String::as_str);
            // Writing to a string cannot fail.
            let _ = if column == 0 { write!(out, "| {cell:<width$} ") } else { write!(out, "| {cell:>width$} ") };
        }
        out.push_str("|\n");
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let line = "-".repeat(width - 1);
                let _ = if column == 0 { write!(out, "| {line}- ") } else { write!(out, "| {line}: ") };
            }
            out.push_str("|\n");
        }
    }
    out
}

/// Seconds with three digits that matter.
#[must_use]
pub fn seconds(s: f64) -> String {
    format!("{} s", digits(s))
}

/// A ratio.
#[must_use]
pub fn times(ratio: f64) -> String {
    format!("{}×", digits(ratio))
}

fn digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.995 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["what".to_owned(), "a".to_owned()], vec!["é".to_owned(), "12.5×".to_owned()], vec!["x".to_owned()]];
        assert_eq!(render(&rows), "| what |     a |\n| ---- | ----: |\n| é    | 12.5× |\n| x    |       |\n");
    }

    #[test]
    fn three_digits() {
        assert_eq!(seconds(0.01234), "0.012 s");
        assert_eq!(seconds(1.2345), "1.23 s");
        assert_eq!(times(12.345), "12.3×");
        assert_eq!(times(123.45), "123×");
    }
}
