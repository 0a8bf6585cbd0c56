//! Bars, as SVG: our numbers beside the others', each group in proportion to
//! its longest.

use std::fmt::Write as _;

use crate::results::{Column, Results, number};

const WIDTH: f64 = 940.0;
const LABEL: f64 = 430.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;

fn colour(column: Column) -> &'static str {
    match column {
        Column::Ours => "#ab2b28",
        Column::Kvm => "#4a6fa5",
        Column::Bare => "#8a8a8a",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The chart of the rows whose name `chosen` accepts.
pub fn svg(title: &str, results: &Results, chosen: impl Fn(&str) -> bool) -> String {
    let mut body = String::new();
    let mut y = 44.0;
    for row in results.rows.iter().filter(|r| chosen(&r.name)) {
        let longest = row.values.values().fold(0.0_f64, |a, b| a.max(*b));
        let label = format!("{} ({})", row.what, row.unit);
        let _ = writeln!(
            body,
            r#"<text x="{}" y="{}" text-anchor="end">{}</text>"#,
            LABEL - 8.0,
            y + BAR - 3.0,
            escape(&label)
        );
        for column in Column::ALL {
            let Some(value) = row.values.get(&column) else {
                continue;
            };
            let room = WIDTH - LABEL - 110.0;
            let width = if longest > 0.0 {
                room * value / longest
            } else {
                0.0
            };
            let _ = writeln!(
                body,
                r#"<rect x="{LABEL}" y="{y}" width="{width:.1}" height="{BAR}" fill="{}"/><text x="{:.1}" y="{}">{} {}</text>"#,
                colour(column),
                LABEL + width + 5.0,
                y + BAR - 3.0,
                column.name(),
                number(*value)
            );
            y += BAR + 2.0;
        }
        y += GAP;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"15\">{}</text>\n{body}</svg>\n",
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_its_room() {
        let mut results = Results::default();
        results.add(Column::Ours, "a", "a < b", "n", 50.0);
        results.add(Column::Kvm, "a", "a < b", "n", 100.0);
        let svg = svg("t", &results, |_| true);
        assert!(svg.contains("a &lt; b"));
        assert!(svg.contains(r#"width="200.0""#) && svg.contains(r#"width="400.0""#));
    }
}
