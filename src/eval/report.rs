//! `report.html`: one page that needs nothing else, with the table, plots by round and by cost, and galleries whose
//! pictures open the story of how they came about.

use super::{
    agreement::Agreement,
    edits::Review,
    line::{Key, Line},
    modes::Mode,
    plot::{Series, plot},
    results::{Estimates, ModeResults, Results},
    table::{COSTS, columns, prompts},
};
use crate::io::{
    self,
    html::{base64, escape},
};
use anyhow::{Context, Result};
use image::ImageFormat;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Cursor,
    path::Path,
};

/// Pictures of each gallery.
const SHOWN: usize = 8;
/// Rows of a table by groups at most.
const ROWS: usize = 40;
/// Pixels of a shown picture's longer side at most.
const SIDE: u32 = 320;
/// A picture file larger than this is none of ours.
pub(super) const LARGEST: u64 = 64 << 20;

const STYLE: &str = "\
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#1c1c1e;--faint:#6b6b70;--rule:#e2e2de;--yes:#14783c;--no:#be2828;\
--c0:#3b6fd4;--c1:#c4691c;--c2:#7d4fb8;--c3:#0f8a8a;--c4:#b3365f;--c5:#6d7a18;--c6:#14783c}
@media(prefers-color-scheme:dark){:root{--paper:#151517;--card:#1f1f22;--ink:#ececee;--faint:#9a9aa0;--rule:#34343a;--yes:#5fce8b;--no:#ff8078;\
--c0:#86aaf5;--c1:#f0a566;--c2:#bd9bec;--c3:#63cfcf;--c4:#ee86a8;--c5:#bccb5c;--c6:#5fce8b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:76rem;margin:0 auto;padding:1.25rem}
h1{font-size:1.3rem}
h2{font-size:1.1rem;margin:2rem 0 .6rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;border-top:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
small,.faint{color:var(--faint);font-size:.85rem}
.plots,.gallery,.turns{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.gallery{grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr))}
.gallery details[open]{grid-column:1/-1}
.turns{grid-template-columns:repeat(auto-fill,minmax(min(100%,13rem),1fr));margin-top:.8rem}
details{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.7rem;min-width:0}
summary{cursor:pointer;list-style:none}
summary img{max-width:13rem}
img{display:block;width:100%;height:auto;border-radius:.3rem;image-rendering:auto}
ul{list-style:none;margin:.4rem 0;padding:0;font-size:.9rem}
.yes::before{content:'\\2713  ';color:var(--yes)}
.no::before{content:'\\2717  ';color:var(--no)}
.plot{width:100%;height:auto;background:var(--card);border:1px solid var(--rule);border-radius:.6rem}
.plot text{fill:var(--ink);font-size:12px}
.plot .grid{stroke:var(--rule)}
.plot .line{fill:none;stroke:currentColor;stroke-width:2}
.plot .bar{stroke:currentColor}
.plot circle{fill:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
";

/// The page of a run whose pictures are under `folder`.
pub fn page(results: &Results, lines: &[Line], folder: &Path) -> Result<String> {
    let title = "rlrig eval";
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    html += &facts(results);
    html += &flaws(results);
    html += &table(results);
    let (metric, name) = headline(results);
    html += &format!("<h2>{name} by round and by cost</h2>\n<div class=\"plots\">\n");
    html += &plot(&by_round(results, metric), "rounds", name);
    html += &plot(&by_cost(results, metric), "network evaluations of a prompt", name);
    html += "</div>\n";
    html += &edits(results);
    html += &every_metric(results);
    html += &groups(results, metric);
    html += &agreement(results);
    // The loop is what the galleries are about, or else what comes last.
    if let Some(mode) = results.modes.keys().next_back() {
        html += &galleries(*mode, metric, lines, folder)?;
    }
    Ok(html + "</main>\n</body>\n</html>\n")
}

/// The metric that pictures are ranked by: the oracle's word where there is one.
fn headline(results: &Results) -> (&'static str, &'static str) {
    let oracle = results.modes.values().any(|found| found.metrics.contains_key("oracle_mean"));
    if oracle { ("oracle_mean", "Share of right triples (oracle)") } else { ("sg_iou", "SG-IoU") }
}

/// The run's settings, but for the calibrations' many numbers.
fn facts(results: &Results) -> String {
    let tells = |(key, value): &(&String, &Value)| !value.is_null() && !key.ends_with("calibration");
    let config = results.config.as_object().into_iter().flatten().filter(tells);
    let facts: Vec<String> = config.map(|(key, value)| format!("{key} {value}")).collect();
    format!("<p class=\"faint\">{}</p>\n", escape(&facts.join(" \u{b7} ")))
}

/// What was wrong with the data, by kind.
fn flaws(results: &Results) -> String {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let files = results.flaws.as_array().into_iter().flatten();
    for (kind, found) in files.filter_map(Value::as_object).flatten() {
        *counts.entry(kind).or_default() += found["count"].as_u64().unwrap_or_default();
    }
    if counts.is_empty() {
        return String::new();
    }
    let said: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {}", kind.replace('_', " "))).collect();
    format!("<p class=\"faint\">Flaws of the data: {}</p>\n", escape(&said.join(", ")))
}

fn table(results: &Results) -> String {
    let columns = columns(results);
    let mut html = "<div class=\"wide\"><table>\n<tr><th>mode</th>".to_owned();
    let heads = columns.iter().map(|(_, head)| *head).chain(COSTS.map(|(_, head, _)| head));
    heads.for_each(|head| html += &format!("<th>{head}</th>"));
    html += "</tr>\n";
    for (mode, found) in &results.modes {
        html += &format!("<tr><td>{}</td>", mode.name());
        columns.iter().for_each(|(name, _)| html += &cell(&found.metrics, name, 3));
        COSTS.iter().for_each(|(name, _, decimals)| html += &cell(&found.cost, name, *decimals));
        html += "</tr>\n";
    }
    html + "</table></div>\n<p class=\"faint\">Means over prompts with their 95% bootstrap intervals.</p>\n"
}

/// All metrics there are, each as a row, folded up.
fn every_metric(results: &Results) -> String {
    let names: BTreeSet<&String> = results.modes.values().flat_map(|found| found.metrics.keys()).collect();
    let heads: String = results.modes.keys().map(|mode| format!("<th>{}</th>", mode.name())).collect();
    let row = |name: &&String| {
        let cells: String = results.modes.values().map(|found| cell(&found.metrics, name, 3)).collect();
        format!("<tr><td>{}</td>{cells}</tr>\n", escape(name))
    };
    let rows: String = names.iter().map(row).collect();
    format!(
        "<details>\n<summary>Every metric</summary>\n<div class=\"wide\"><table>\n<tr><th>metric</th>{heads}</tr>\n\
         {rows}</table></div>\n</details>\n"
    )
}

/// What became of the edits of pictures that were wrong, by mode.
fn edits(results: &Results) -> String {
    let rows = results.modes.iter().filter(|(_, found)| !found.edits.is_empty()).map(|(mode, found)| {
        let cells: String = Review::NAMES.iter().map(|name| cell(&found.edits, name, 3)).collect();
        format!("<tr><td>{}</td>{cells}<td>{}</td></tr>\n", mode.name(), prompts(&found.edits))
    });
    let rows: String = rows.collect();
    if rows.is_empty() {
        return rows;
    }
    let heads: String = Review::NAMES.iter().map(|name| format!("<th>{name}</th>")).collect();
    format!(
        "<h2>Edits of wrong pictures</h2>\n<div class=\"wide\"><table>\n<tr><th>mode</th>{heads}<th>prompts</th></tr>\n\
         {rows}</table></div>\n\
         <p class=\"faint\">By the oracle: an edit could help; the one asked for is about what the Checker denied; it would help; the picture got better; worse.</p>\n"
    )
}

/// The headline's metric by relation, number of objects and split, of every mode.
fn groups(results: &Results, metric: &str) -> String {
    type Grouped = fn(&ModeResults) -> BTreeMap<String, Estimates>;
    let by: [(&str, Grouped, &str); 3] = [
        ("relation", |found| found.by_relation.clone(), if metric == "sg_iou" { "judge" } else { "oracle" }),
        ("objects", |found| found.by_objects.iter().map(|(n, e)| (n.to_string(), e.clone())).collect(), metric),
        ("split", |found| found.by_split.clone(), metric),
    ];
    let heads: String = results.modes.keys().map(|mode| format!("<th>{}</th>", mode.name())).collect();
    let mut html = String::new();
    for (title, group, metric) in by {
        let modes: Vec<BTreeMap<String, Estimates>> = results.modes.values().map(group).collect();
        let mut prompts: BTreeMap<&String, usize> = BTreeMap::new();
        for (name, estimates) in modes.iter().flatten() {
            *prompts.entry(name).or_default() += estimates.get(metric).map_or(0, |e| e.n);
        }
        // Of many the most frequent, in the order of their names.
        let mut names: Vec<&String> = prompts.keys().copied().collect();
        names.sort_by_key(|name| std::cmp::Reverse(prompts[name]));
        names.truncate(ROWS);
        names.sort();
        let none = Estimates::new();
        let row = |name: &&String| {
            let cells: String = modes.iter().map(|mode| cell(mode.get(*name).unwrap_or(&none), metric, 3)).collect();
            // Each mode has the same.
            let n = modes.iter().filter_map(|mode| Some(mode.get(*name)?.get(metric)?.n)).max().unwrap_or(0);
            format!("<tr><td>{}</td>{cells}<td>{n}</td></tr>\n", escape(name))
        };
        if names.len() > 1 {
            let rows: String = names.iter().map(row).collect();
            html += &format!(
                "<h2>By {title}</h2>\n<div class=\"wide\"><table>\n<tr><th>{title}</th>{heads}<th>prompts</th></tr>\n\
                 {rows}</table></div>\n"
            );
        }
    }
    html
}

/// How far the judges agree.
fn agreement(results: &Results) -> String {
    let row = |(name, found): (&String, &Agreement)| {
        let values =
            [("accuracy", Some(found.accuracy)), ("kappa", found.kappa), ("ece", Some(found.calibration_error))];
        let values: Estimates = values.into_iter().filter_map(|(name, e)| Some((name.to_owned(), e?))).collect();
        let cells: String = ["accuracy", "kappa", "ece"].iter().map(|name| cell(&values, name, 3)).collect();
        format!("<tr><td>{}</td>{cells}<td>{}</td></tr>\n", escape(&name.replace('_', " ")), found.claims)
    };
    let rows: String = results.agreement.iter().map(row).collect();
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<h2>Agreement of the judges</h2>\n<div class=\"wide\"><table>\n<tr><th>of</th><th>accuracy</th><th>kappa</th>\
         <th>calibration error</th><th>claims</th></tr>\n{rows}</table></div>\n"
    )
}

fn cell(estimates: &Estimates, name: &str, decimals: usize) -> String {
    match estimates.get(name) {
        // As in the table.
        Some(e) if e.n < 2 => format!("<td>{:.decimals$}<br><small>-</small></td>", e.mean),
        Some(e) => {
            format!("<td>{:.decimals$}<br><small>{:.decimals$} to {:.decimals$}</small></td>", e.mean, e.lo, e.hi)
        }
        None => "<td>-</td>".to_owned(),
    }
}

fn by_round(results: &Results, metric: &str) -> Vec<Series> {
    let series = |(mode, found): (&Mode, &ModeResults)| {
        let rounds = (1..).zip(&found.by_round);
        let points = rounds.filter_map(|(round, e)| Some((f64::from(round), *e.get(metric)?)));
        Series { name: mode.name().to_owned(), points: points.collect() }
    };
    results.modes.iter().map(series).collect()
}

fn by_cost(results: &Results, metric: &str) -> Vec<Series> {
    let series = |(mode, found): (&Mode, &ModeResults)| {
        let point = found.cost.get("evaluations").zip(found.metrics.get(metric));
        Series { name: mode.name().to_owned(), points: point.map(|(cost, e)| (cost.mean, *e)).into_iter().collect() }
    };
    results.modes.iter().map(series).collect()
}

/// One prompt's pictures in their order.
struct Story<'a> {
    turns: Vec<&'a Line>,
    result: &'a Line,
    /// The first picture's value of the metric, and the result's.
    first: f64,
    last: f64,
    /// What they are ranked by: a picture all right, by the oracle, is better than one with all of its triples.
    ranks: (f64, f64),
}

impl<'a> Story<'a> {
    fn new(mut turns: Vec<&'a Line>, metric: &str, last: Option<usize>) -> Option<Self> {
        turns.sort_by_key(|line| line.round);
        let result = *turns.iter().find(|line| last.is_some_and(|last| line.result_after.contains(&last)))?;
        let drawn = *turns.first()?;
        let (first, last) = (*drawn.metrics.get(metric)?, *result.metrics.get(metric)?);
        let whole = |line: &Line| line.metrics.get("oracle_perfect").copied().unwrap_or_default();
        Some(Self { ranks: (first + whole(drawn), last + whole(result)), turns, result, first, last })
    }
}

fn galleries(mode: Mode, metric: &str, lines: &[Line], folder: &Path) -> Result<String> {
    let mut prompts: BTreeMap<Key, Vec<&Line>> = BTreeMap::new();
    lines.iter().filter(|line| line.mode == mode).for_each(|line| prompts.entry(line.key()).or_default().push(line));
    let last = lines.iter().filter(|line| line.mode == mode).flat_map(|line| &line.result_after).max().copied();
    let mut stories: Vec<Story> = prompts.into_values().filter_map(|turns| Story::new(turns, metric, last)).collect();
    // Of equal ones those come first that the judge is surest of.
    let judged = |story: &Story| story.result.metrics.get("judge_mean").copied().unwrap_or_default();
    stories.sort_by(|a, b| judged(b).total_cmp(&judged(a)));
    // What a picture with nothing wrong has.
    let most = if stories.iter().any(|story| story.result.metrics.contains_key("oracle_perfect")) { 2.0 } else { 1.0 };
    let pick = |admit: &dyn Fn(&Story) -> bool, rank: &dyn Fn(&Story) -> f64| {
        let mut picked: Vec<&Story> = stories.iter().filter(|story| admit(story)).collect();
        picked.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
        picked.truncate(SHOWN);
        picked
    };
    let all = [
        ("Best", pick(&|s| s.ranks.1 > 0.0, &|s| s.ranks.1)),
        ("Worst", pick(&|s| s.ranks.1 < most, &|s| -s.ranks.1)),
        ("Fixed by the later rounds", pick(&|s| s.ranks.1 > s.ranks.0, &|s| s.ranks.1 - s.ranks.0)),
        ("Broken by the later rounds", pick(&|s| s.ranks.1 < s.ranks.0, &|s| s.ranks.0 - s.ranks.1)),
    ];
    let mut html = String::new();
    for (title, picked) in all {
        html += &format!("<h2>{title} <span class=\"faint\">{}, {}</span></h2>\n", mode.name(), picked.len());
        html += "<div class=\"gallery\">\n";
        for story in picked {
            html += &opened(story, folder)?;
        }
        html += "</div>\n";
    }
    Ok(html)
}

/// A result that opens the way to it.
fn opened(story: &Story, folder: &Path) -> Result<String> {
    let Line { prompt, drawn_as, .. } = story.result;
    let asked = drawn_as.as_ref().map_or_else(|| prompt.clone(), |words| format!("{prompt} (drawn as \"{words}\")"));
    let mut html = format!(
        "<details><summary>{}<div>{}</div><small>{:.2} after round 1, {:.2} at the end</small></summary>\n\
         <div class=\"turns\">\n",
        image(story.result, folder)?,
        escape(&asked),
        story.first,
        story.last
    );
    for line in &story.turns {
        let said = line.edit.as_ref().map_or("drawn".to_owned(), |edit| edit.instruction.clone());
        html += &format!("<div><small>round {}: {}</small>{}<ul>\n", line.round, escape(&said), image(line, folder)?);
        for answer in &line.claims {
            let yes = answer.oracle.unwrap_or(answer.judge >= 0.5);
            let class = if yes { "yes" } else { "no" };
            let (text, p) = (escape(&answer.claim.to_string()), answer.checker);
            html += &format!("<li class=\"{class}\">{text} <small>Checker {p:.2}</small></li>\n");
        }
        html += "</ul></div>\n";
    }
    Ok(html + "</div></details>\n")
}

/// The picture of a line, in the page itself; a large one is shown smaller than its file is.
fn image(line: &Line, folder: &Path) -> Result<String> {
    let path = folder.join(&line.file);
    let mut bytes = io::read_file(&path, LARGEST)?;
    let picture = image::load_from_memory(&bytes).with_context(|| format!("cannot read {}", path.display()))?;
    if picture.width().max(picture.height()) > SIDE {
        let mut smaller = Cursor::new(Vec::new());
        picture.resize(SIDE, SIDE, image::imageops::FilterType::Triangle).write_to(&mut smaller, ImageFormat::Png)?;
        bytes = smaller.into_inner();
    }
    let alt = escape(&format!("round {}", line.round));
    Ok(format!("<img loading=\"lazy\" alt=\"{alt}\" src=\"data:image/png;base64,{}\">", base64(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{line::tests::mended, results::results};
    use serde_json::json;

    #[test]
    fn the_page_stands_alone_and_shows_what_was_fixed() {
        let dir = tempfile::tempdir().unwrap();
        let mut lines: Vec<Line> =
            (0..5).flat_map(|i| [mended(i, Mode::Diffuser), mended(i, Mode::Loop)].concat()).collect();
        lines.iter_mut().for_each(|line| line.prompt = "<script>alert(1)</script>".into());
        for line in &lines {
            let path = dir.path().join(&line.file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            io::png::write(&path, &image::RgbImage::new(900, 600), &[], true).unwrap();
        }
        let flaws =
            json!([{ "dangling_id": { "count": 2 } }, { "dangling_id": { "count": 1 }, "malformed": { "count": 1 } }]);
        let found = results(json!({ "seed": [0], "calibration": { "a": 1 } }), json!({}), flaws, &lines);
        let html = page(&found, &lines, dir.path()).unwrap();
        assert!(!html.contains("<script") && html.contains("&lt;script&gt;"));
        assert!(!html.contains("http:") && !html.contains("https:") && !html.contains("url("));
        assert_eq!(html.matches("<svg").count(), 2);
        assert!(html.contains("prefers-color-scheme:dark") && html.contains("add all"));
        for part in [
            "Flaws of the data: 3 dangling id, 1 malformed<",
            "<h2>By relation</h2>",
            "<h2>By objects</h2>",
            "<th>SG-IoU, oracle</th>",
            "<th>metric</th><th>diffuser</th><th>loop</th>",
            "<td>visor_unconditional</td>",
            "<td>checker oracle relations</td>",
        ] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("<h2>By split</h2>"), "there is only one");
        assert!(html.contains("seed [0]") && !html.contains("calibration {"));
        // The beginning of a PNG of 320 x 213 pixels.
        let (_, data) = html.split_once("base64,").unwrap();
        assert!(data.starts_with("iVBORw0KGgoAAAANSUhEUgAAAUAAAADV"), "{}", &data[..40]);
        let (_, fixed) = html.split_once("Fixed by the later rounds").unwrap();
        let (fixed, broken) = fixed.split_once("Broken by the later rounds").unwrap();
        assert!(fixed.matches("<details>").count() >= 4 && !broken.contains("<details>"));
        // What the rounds broke, and what is best and worst of it.
        let mut broken = lines.clone();
        for line in broken.iter_mut().filter(|line| line.mode == Mode::Loop) {
            let rank = if line.round == 1 { 1.0 } else { 0.0 };
            line.metrics.extend(["oracle_mean", "oracle_perfect"].map(|name| (name.to_owned(), rank)));
        }
        let mended = broken.iter().find(|line| line.mode == Mode::Loop).map(Line::key);
        for line in broken.iter_mut().filter(|line| Some(line.key()) == mended) {
            line.prompt = "the only one".into();
            line.metrics.extend(["oracle_mean", "oracle_perfect"].map(|name| (name.to_owned(), 1.0)));
        }
        let html = galleries(Mode::Loop, "oracle_mean", &broken, dir.path()).unwrap();
        let parts: Vec<(usize, bool)> = html
            .split("<h2>")
            .skip(1)
            .map(|part| (part.matches("<details>").count(), part.contains("the only one")))
            .collect();
        assert_eq!(parts, [(1, true), (4, false), (0, false), (4, false)], "best, worst, fixed, broken");
        // A picture is mended as well where its triples held before.
        for line in &mut lines {
            line.metrics.insert("oracle_mean".into(), 1.0);
        }
        let html = galleries(Mode::Loop, "oracle_mean", &lines, dir.path()).unwrap();
        let (_, fixed) = html.split_once("Fixed by the later rounds").unwrap();
        assert!(fixed.matches("<details>").count() >= 4);
    }

    #[test]
    fn a_group_tells_of_how_many_prompts_it_is_and_one_has_no_interval() {
        let lines: Vec<Line> = (0..5).flat_map(|i| mended(i, Mode::Loop)).collect();
        let found = results(json!({}), json!({}), json!([]), &lines);
        let (by, html) = (&found.modes[&Mode::Loop].by_relation, groups(&found, "oracle_mean"));
        assert!(by.len() > 1 && by.values().any(|e| e["oracle"].n < 5));
        for (name, estimates) in by {
            let cells = format!("<tr><td>{}</td>{}", escape(name), cell(estimates, "oracle", 3));
            assert!(html.contains(&format!("{cells}<td>{}</td></tr>", estimates["oracle"].n)), "{name}: {html}");
        }
        assert!(edits(&found).contains("<td>5</td></tr>"), "{}", edits(&found));
        let one = results(json!({}), json!({}), json!([]), &mended(0, Mode::Loop));
        let html = table(&one) + &edits(&one);
        assert!(html.contains("<td>1.000<br><small>-</small></td>") && !html.contains(" to "), "{html}");
    }
}
