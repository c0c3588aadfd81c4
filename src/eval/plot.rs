//! Means with their intervals as a small SVG that takes its colours from the page around it.

use super::bootstrap::Estimate;
use crate::io::html::escape;

/// A line of points: x, and the estimate at it.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, Estimate)>,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
/// The room for labels: left, right, top, bottom.
const MARGIN: (f64, f64, f64, f64) = (46.0, 130.0, 14.0, 40.0);

/// Series over an axis from 0 to the largest x, with values from 0 to 1. Each series is of the class `c0`, `c1`, ..
pub fn plot(series: &[Series], x_label: &str, y_label: &str) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let most = points().map(|(x, _)| *x).fold(1.0, f64::max) * 1.05;
    let (left, right, top, bottom) = MARGIN;
    let x_at = |x: f64| left + (WIDTH - left - right) * x / most;
    let y_at = |y: f64| HEIGHT - bottom - (HEIGHT - top - bottom) * y.clamp(0.0, 1.0);
    let mut svg = format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">\n",
        escape(y_label),
        escape(x_label)
    );
    for y in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = y_at(y);
        svg += &format!("<path class=\"grid\" d=\"M{left} {at:.1}H{:.1}\"/>", WIDTH - right);
        svg += &format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{y}</text>\n", left - 6.0, at + 4.0);
    }
    let mut ticks: Vec<f64> = points().map(|(x, _)| *x).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup_by(|a, b| x_at(*a) - x_at(*b) < 34.0);
    for x in ticks {
        let y = HEIGHT - bottom + 16.0;
        svg += &format!("<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{:.0}</text>\n", x_at(x), x);
    }
    let middle = (left + WIDTH - right) / 2.0;
    svg += &format!(
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
        HEIGHT - 6.0,
        escape(x_label)
    );
    for (i, Series { name, points }) in series.iter().enumerate() {
        svg += &format!("<g class=\"c{i}\">");
        let path: Vec<String> = points.iter().map(|(x, e)| format!("{:.1} {:.1}", x_at(*x), y_at(e.mean))).collect();
        svg += &format!("<path class=\"line\" d=\"M{}\"/>", path.join("L"));
        for (x, e) in points {
            let (x, low, high) = (x_at(*x), y_at(e.lo), y_at(e.hi));
            svg += &format!("<path class=\"bar\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>");
            let said = format!("{name}: {:.3} ({:.3} to {:.3})", e.mean, e.lo, e.hi);
            let title = escape(&said);
            svg += &format!("<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"><title>{title}</title></circle>", y_at(e.mean));
        }
        let y = top + 8.0 + 20.0 * i as f64;
        let x = WIDTH - right + 14.0;
        svg += &format!("<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"/>", y - 4.0);
        svg += &format!("<text x=\"{:.1}\" y=\"{y:.1}\">{}</text></g>\n", x + 10.0, escape(name));
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn higher_is_up_and_names_are_escaped() {
        let estimate = |mean| Estimate { mean, lo: mean - 0.1, hi: mean + 0.1, n: 9 };
        let points = vec![(1.0, estimate(0.2)), (4.0, estimate(0.8))];
        let svg = plot(&[Series { name: "<loop>".into(), points }], "rounds", "SG-IoU");
        assert!(svg.contains("&lt;loop&gt;: 0.800 (0.700 to 0.900)") && !svg.contains("<loop>"));
        let line = svg.split("class=\"line\" d=\"M").nth(1).unwrap().split('"').next().unwrap();
        let at: Vec<f64> = line.split(['L', ' ']).map(|n| n.parse().unwrap()).collect();
        assert!(at[0] < at[2] && at[1] > at[3], "{line}");
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(plot(&[], "x", "y").ends_with("</svg>\n"));
    }
}
