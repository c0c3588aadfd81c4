//! `report.html` in a real browser: on a phone, by day and by night. Needs a Chromium; without one it says so, and
//! fails if RLRIG_BROWSER is `required`.

#![allow(clippy::unwrap_used)]

mod rlrig;

use rlrig::Rig;
use serde_json::Value;
use std::{env, fs, process::Command};

const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];

/// Opens everything that opens in the page and looks at it, in a frame as wide as a phone: at once, when all of it is loaded,
/// since the browser does not wait for more.
const PROBE: &str = r"<script>
function look(page) {
  const inside = page.contentDocument;
  inside.querySelectorAll('details').forEach(d => d.open = true);
  const images = [...inside.images];
  const style = page.contentWindow.getComputedStyle(inside.body);
  document.title = JSON.stringify({
    width: inside.documentElement.scrollWidth,
    widest: Math.max(...[...inside.querySelectorAll('table')].map(table => table.offsetWidth)),
    images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    requests: page.contentWindow.performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length,
    ink: style.color,
    paper: style.backgroundColor,
    plots: inside.querySelectorAll('svg').length,
  });
}
</script>";

/// The mean of a CSS colour's channels.
fn brightness(colour: &str) -> f64 {
    let digits = |c: char| !c.is_ascii_digit();
    let channels: Vec<f64> = colour.split(digits).filter_map(|part| part.parse().ok()).collect();
    channels.iter().sum::<f64>() / channels.len() as f64
}

#[test]
fn the_report_is_readable_on_a_phone_by_day_and_by_night() {
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    let Some(browser) = BROWSERS.into_iter().find(runs) else {
        let required = env::var_os("RLRIG_BROWSER").is_some_and(|value| value == "required");
        assert!(!required, "RLRIG_BROWSER is required, and none of {BROWSERS:?} is installed");
        eprintln!("skipped: none of {BROWSERS:?} is installed");
        return;
    };
    let rig = Rig::new();
    rig.good("eval", &["--suite", "--limit", "2", "--rounds", "2", "--accept", "0.99", "--out", "run"]);
    let report = fs::read_to_string(rig.path("run/report.html")).unwrap();
    // What is loaded late is not waited for.
    let eager = report.replace("loading=\"lazy\"", "");
    assert_ne!(eager, report);
    let page = eager.replace('&', "&amp;").replace('"', "&quot;");
    let frame = format!("<iframe width=390 height=844 onload=look(this) srcdoc=\"{page}\"></iframe>");
    let framed = format!("<!doctype html>{PROBE}{frame}");
    fs::write(rig.path("framed.html"), framed).unwrap();
    let look = |more: &[&str]| -> Value {
        let output = Command::new(browser)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
            .args(more)
            .arg(format!("--user-data-dir={}", rig.path("profile").display()))
            .arg(format!("file://{}", rig.path("framed.html").display()))
            .output()
            .unwrap();
        let dom = String::from_utf8(output.stdout).unwrap();
        let title = dom.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>"));
        let Some((title, _)) = title else {
            panic!("the browser did not look at the page: {}", String::from_utf8_lossy(&output.stderr));
        };
        serde_json::from_str(title).unwrap()
    };
    let (day, night) = (look(&[]), look(&["--force-dark-mode"]));
    for seen in [&day, &night] {
        let [page, table] = ["width", "widest"].map(|what| seen[what].as_f64().unwrap());
        assert!(page <= 390.0 && table > 390.0, "tables are wider than a phone, and the page is not: {seen}");
        assert!(seen["images"].as_u64().unwrap() >= 4 && seen["images"] == seen["loaded"], "{seen}");
        assert!(seen["plots"] == 2 && seen["requests"] == 0, "{seen}");
    }
    let light = |seen: &Value, what: &str| brightness(seen[what].as_str().unwrap());
    assert!(light(&day, "paper") > 200.0 && light(&day, "ink") < 60.0, "{day}");
    assert!(light(&night, "paper") < 60.0 && light(&night, "ink") > 200.0, "{night}");
}
