//! Results as tables, ready for a paper: Markdown and LaTeX.

use super::{
    bootstrap::Estimate,
    edits::Review,
    results::{Estimates, Results},
};

/// The columns of this table and of the report's: a metric and its heading.
const METRICS: [(&str, &str); 11] = [
    ("sg_iou", "SG-IoU"),
    ("ent_iou", "Ent-IoU"),
    ("rel_iou", "Rel-IoU"),
    ("judge_mean", "judge"),
    ("judge_all", "judge, all"),
    ("judge_no_others", "judge, no others"),
    ("oracle_sg_iou", "SG-IoU, oracle"),
    ("oracle_mean", "triples"),
    ("no_others", "no others"),
    ("render_distance", "RMS from a render"),
    ("oracle_perfect", "all right"),
];
/// The columns behind them: a cost, its heading, and how many decimals it is given with.
pub(super) const COSTS: [(&str, &str, usize); 3] =
    [("rounds", "rounds", 2), ("evaluations", "evaluations", 0), ("seconds", "s", 1)];

/// What stands around the ends of an interval.
const MARKDOWN: [&str; 3] = [" (", " to ", ")"];
const LATEX: [&str; 3] = [" {\\scriptsize [", ", ", "]}"];

/// The modes as rows.
pub fn markdown(results: &Results) -> String {
    let columns = columns(results);
    let heads = columns.iter().map(|(_, head)| *head).chain(COSTS.map(|(_, head, _)| head));
    let heads: Vec<&str> = ["mode"].into_iter().chain(heads).collect();
    let mut text = format!("| {} |\n|{}\n", heads.join(" | "), "---|".repeat(heads.len()));
    for (mode, found) in &results.modes {
        let metrics = columns.iter().map(|(name, _)| markdown_cell(found.metrics.get(*name), 3));
        let costs = COSTS.iter().map(|(name, _, decimals)| markdown_cell(found.cost.get(*name), *decimals));
        let cells: Vec<String> = [mode.name().to_owned()].into_iter().chain(metrics).chain(costs).collect();
        text += &format!("| {} |\n", cells.join(" | "));
    }
    for (mode, found) in results.modes.iter().filter(|(_, found)| found.by_round.len() > 1) {
        let heads: Vec<&str> = columns.iter().map(|(_, head)| *head).collect();
        text += &format!("\n| {}, round | {} |\n|{}\n", mode.name(), heads.join(" | "), "---|".repeat(heads.len() + 1));
        for (i, round) in found.by_round.iter().enumerate() {
            let cells: Vec<String> = columns.iter().map(|(name, _)| markdown_cell(round.get(*name), 3)).collect();
            text += &format!("| {} | {} |\n", i + 1, cells.join(" | "));
        }
    }
    let edited: Vec<_> = results.modes.iter().filter(|(_, found)| !found.edits.is_empty()).collect();
    if !edited.is_empty() {
        let heads = Review::NAMES;
        text += &format!(
            "\n| edits of wrong pictures | {} | prompts |\n|{}\n",
            heads.join(" | "),
            "---|".repeat(heads.len() + 2)
        );
    }
    for (mode, found) in edited {
        let cells = Review::NAMES.map(|name| markdown_cell(found.edits.get(name), 3));
        text += &format!("| {} | {} | {} |\n", mode.name(), cells.join(" | "), prompts(&found.edits));
    }
    text
}

/// The modes as rows of a `tabular` in the style of booktabs.
pub fn latex(results: &Results) -> String {
    let columns = columns(results);
    let heads = columns.iter().map(|(_, head)| *head).chain(COSTS.map(|(_, head, _)| head));
    let heads: Vec<&str> = ["mode"].into_iter().chain(heads).collect();
    let mut text = format!(
        "% \\usepackage{{booktabs}}\n\\begin{{tabular}}{{l{}}}\n\\toprule\n{} \\\\\n\\midrule\n",
        "c".repeat(heads.len() - 1),
        heads.join(" & ")
    );
    for (mode, found) in &results.modes {
        let metrics = columns.iter().map(|(name, _)| cell(found.metrics.get(*name), LATEX, 3));
        let costs = COSTS.iter().map(|(name, _, decimals)| cell(found.cost.get(*name), LATEX, *decimals));
        let cells: Vec<String> = [mode.name().to_owned()].into_iter().chain(metrics).chain(costs).collect();
        text += &format!("{} \\\\\n", cells.join(" & "));
    }
    text + "\\bottomrule\n\\end{tabular}\n"
}

/// The metrics that some mode has, and their headings.
pub(super) fn columns(results: &Results) -> Vec<(&'static str, &'static str)> {
    let known = |name: &str| results.modes.values().any(|found| found.metrics.contains_key(name));
    METRICS.into_iter().filter(|(name, _)| known(name)).collect()
}

/// Of how many prompts these are.
pub(super) fn prompts(estimates: &Estimates) -> usize {
    estimates.values().map(|e| e.n).max().unwrap_or(0)
}

/// A cell of a table in Markdown.
pub fn markdown_cell(estimate: Option<&Estimate>, decimals: usize) -> String {
    cell(estimate, MARKDOWN, decimals)
}

fn cell(estimate: Option<&Estimate>, [open, between, close]: [&str; 3], decimals: usize) -> String {
    match estimate {
        // One prompt drawn again and again is always the same, which says nothing of the others.
        Some(Estimate { mean, n: 0 | 1, .. }) => format!("{mean:.decimals$}{open}-{close}"),
        Some(Estimate { mean, lo, hi, .. }) => {
            format!("{mean:.decimals$}{open}{lo:.decimals$}{between}{hi:.decimals$}{close}")
        }
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{line::tests::mended, modes::Mode, results::results};
    use serde_json::Value;

    #[test]
    fn modes_and_rounds_are_rows() {
        let lines: Vec<_> = (0..4).flat_map(|i| [mended(i, Mode::Loop), mended(i, Mode::Diffuser)].concat()).collect();
        let found = results(Value::Null, Value::Null, Value::Null, &lines);
        let text = markdown(&found);
        let rows: Vec<&str> = text.lines().collect();
        assert!(rows[0].starts_with("| mode | SG-IoU | Ent-IoU | Rel-IoU | judge |"), "{text}");
        assert!(
            rows[2].starts_with("| diffuser | 0.000 (0.000 to 0.602) |")
                && rows[2].ends_with("| 1.00 (1.00 to 1.00) | 40 (40 to 40) | 1.0 (1.0 to 1.0) |")
        );
        assert!(
            rows[3].starts_with("| loop | 1.000 (0.398 to 1.000) |")
                && rows[3].contains("| 2.00 (2.00 to 2.00) | 80 (80 to 80) |")
        );
        assert!(rows[5].starts_with("| loop, round |") && rows.len() == 14);
        assert!(
            rows[13].starts_with("| loop | 1.000 (0.398 to 1.000) | 0.000") && rows[13].ends_with(" | 4 |"),
            "{text}"
        );
        assert!(rows[11..].iter().all(|row| row.matches('|').count() == Review::NAMES.len() + 3), "{text}");
        let columns = rows[0].matches('|').count();
        assert!(rows[1..4].iter().all(|row| row.matches('|').count() == columns));
        let tex = latex(&found);
        assert!(tex.contains("diffuser & 0.000 {\\scriptsize [0.000, 0.602]} &") && tex.contains("\\bottomrule"));
    }

    #[test]
    fn one_prompt_has_no_interval() {
        let found = results(Value::Null, Value::Null, Value::Null, &mended(0, Mode::Loop));
        let (text, tex) = (markdown(&found), latex(&found));
        assert!(text.contains("| loop | 1.000 (-) |") && !text.contains(" to "), "{text}");
        assert!(text.trim_end().ends_with(" (-) | 1 |"), "{text}");
        assert!(tex.contains("loop & 1.000 {\\scriptsize [-]} &"), "{tex}");
    }
}
