//! The chart: how many times as long as natively each workload takes, one bar an engine, on a logarithmic axis. *Out*: one SVG without any
//! outside reference. *Invariant*: any text can be shown, any figures; what is missing has no bar.

use std::fmt::Write;

/// A workload with a bar for each engine, if it has a figure.
#[derive(Debug, Clone)]
pub struct Bars {
    /// Its name.
    pub title: String,
    /// In the engines' order.
    pub values: Vec<Option<f64>>,
}

const COLOURS: [&str; 10] =
    ["#1b6ca8", "#63a4d4", "#a9cfee", "#d9822b", "#e8b273", "#4f7942", "#9dbf8f", "#7d4f9e", "#bda0d0", "#808080"];
const LEFT: f64 = 330.0;
const WIDTH: f64 = 620.0;
const BAR: f64 = 9.0;
const HEAD: f64 = 64.0;

/// Draws it.
#[must_use]
pub fn draw(title: &str, engines: &[String], rows: &[Bars]) -> String {
    let values = || rows.iter().flat_map(|r| r.values.iter().flatten().copied()).filter(|v| *v > 0.0);
    let low = values().fold(1.0, f64::min).log10().floor();
    let high = values().fold(10.0, f64::max).log10().ceil();
    let x = |value: f64| LEFT + WIDTH * (value.log10() - low) / (high - low);
    let row_height = BAR * engines.len() as f64 + 8.0;
    let height = HEAD + row_height * rows.len() as f64 + 30.0;
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"10\" y=\"20\" font-size=\"15\">{}</text>\n",
        escape(title),
        w = LEFT + WIDTH + 60.0,
    );
    let mut at = 10.0;
    for (engine, colour) in engines.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(
            svg,
            "<rect x=\"{at}\" y=\"32\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"41\">{}</text>",
            at + 14.0,
            escape(engine)
        );
        at += 34.0 + 7.0 * engine.len() as f64;
    }
    // A line at each power of ten and at each two and five.
    for power in low as i32..=high as i32 {
        for factor in [1.0, 2.0, 5.0] {
            let value = factor * 10_f64.powi(power);
            if value.log10() > high + 1e-9 {
                continue;
            }
            let (x, colour) = (x(value), if factor == 1.0 { "#999" } else { "#ddd" });
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{HEAD}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{value}×</text>",
                height - 30.0,
                height - 14.0
            );
        }
    }
    for (number, row) in rows.iter().enumerate() {
        let top = HEAD + row_height * number as f64 + 4.0;
        let middle = top + row_height / 2.0;
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>", LEFT - 8.0, escape(&row.title));
        for (i, (value, colour)) in row.values.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let Some(value) = value.filter(|v| *v > 0.0) else { continue };
            let (from, to) = (x(1.0).min(x(value)), x(1.0).max(x(value)));
            let y = top + BAR * i as f64;
            let _ = writeln!(
                svg,
                "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"><title>{value:.2}×</title></rect>",
                (to - from).max(1.0),
                BAR - 1.0
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_its_bar_and_no_other() {
        let rows = [
            Bars { title: "a < b".into(), values: vec![Some(2.0), None] },
            Bars { title: "c".into(), values: vec![Some(0.5), Some(200.0)] },
        ];
        let svg = draw("t", &["x".into(), "y".into()], &rows);
        assert_eq!(svg.matches("<title>").count(), 3);
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(!draw("nothing", &[], &[]).contains("NaN"));
    }
}
