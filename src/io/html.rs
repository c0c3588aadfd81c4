//! A [`Story`] as one HTML page that needs nothing else: pictures and style are inside, light and dark, for any width.

use super::{
    png,
    story::{Card, Story},
};
use anyhow::Result;
use std::fmt::Write;

const STYLE: &str = "\
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#1c1c1e;--faint:#6b6b70;--rule:#e2e2de;--yes:#14783c;--no:#be2828}
@media(prefers-color-scheme:dark){:root{--paper:#151517;--card:#1f1f22;--ink:#ececee;--faint:#9a9aa0;--rule:#34343a;--yes:#5fce8b;--no:#ff8078}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:76rem;margin:0 auto;padding:1.25rem}
h1{font-size:1.3rem;margin:.25rem 0 1rem}
h2{font-size:1rem;margin:0}
.turns{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
article{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.9rem;min-width:0}
article.best{border:2px solid var(--yes)}
article p{margin:.3rem 0 .6rem}
article img{display:block;width:100%;height:auto;border-radius:.3rem}
ul{list-style:none;margin:.7rem 0 .4rem;padding:0}
li{display:grid;grid-template-columns:1.4rem 1fr auto;gap:.3rem;padding:.2rem 0;border-top:1px solid var(--rule)}
li:first-child{border-top:0}
.yes .mark,.badge{color:var(--yes)}
.no .mark{color:var(--no)}
.mark{font-weight:700}
.note{grid-column:2/4;color:var(--faint);font-size:.9rem}
.p,footer,dl{color:var(--faint);font-size:.85rem;font-variant-numeric:tabular-nums}
dl{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:1.2rem 0 0}
dl div{display:flex;gap:.4rem}
dt{font-weight:600}
dd{margin:0}
";

/// The page.
pub fn page(story: &Story) -> Result<String> {
    let title = escape(&story.title);
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<div class=\"turns\">\n"
    );
    for card in &story.cards {
        article(&mut html, card)?;
    }
    html += "</div>\n<dl>\n";
    for (name, value) in &story.facts {
        writeln!(html, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value))?;
    }
    html += "</dl>\n</main>\n</body>\n</html>\n";
    Ok(html)
}

fn article(html: &mut String, card: &Card) -> Result<()> {
    let (class, badge) =
        if card.best { (" class=\"best\"", " <span class=\"badge\">\u{2605} result</span>") } else { ("", "") };
    writeln!(html, "<article{class}>\n<h2>{}{badge}</h2>", escape(&card.heading))?;
    writeln!(html, "<p>{}</p>", escape(&card.action))?;
    let (width, height) = card.image.dimensions();
    writeln!(
        html,
        "<img width=\"{width}\" height=\"{height}\" alt=\"{}\" src=\"data:image/png;base64,{}\">",
        escape(&card.heading),
        base64(&png::encode(&card.image, &[])?)
    )?;
    if !card.findings.is_empty() {
        html.push_str("<ul>\n");
        for finding in &card.findings {
            let (class, mark, said) = if finding.yes { ("yes", '\u{2713}', "yes") } else { ("no", '\u{2717}', "no") };
            write!(
                html,
                "<li class=\"{class}\"><span class=\"mark\" aria-label=\"{said}\">{mark}</span><span>{}</span>\
                 <span class=\"p\">{:.2}</span>",
                escape(&finding.text),
                finding.p_yes
            )?;
            if !finding.note.is_empty() {
                write!(html, "<span class=\"note\">{}</span>", escape(&finding.note))?;
            }
            html.push_str("</li>\n");
        }
        html.push_str("</ul>\n");
    }
    writeln!(html, "<footer>{}</footer>\n</article>", escape(&card.footer))?;
    Ok(())
}

/// Text as it may stand in a page or an attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// Base64 with padding (RFC 4648).
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0u32, |bits, b| (bits << 8) | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::story::Finding;

    #[test]
    fn base64_is_rfc_4648() {
        let expected = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        assert!(expected.iter().all(|(text, code)| base64(text.as_bytes()) == *code));
    }

    #[test]
    fn the_page_is_self_contained_and_escapes_what_it_is_given() {
        let hostile = "<script>alert(\"x\")</script> & more";
        let card = Card {
            heading: hostile.into(),
            action: hostile.into(),
            image: image::RgbImage::new(2, 2),
            findings: vec![Finding { text: hostile.into(), yes: false, p_yes: 0.25, note: hostile.into() }],
            footer: hostile.into(),
            best: true,
        };
        let facts = vec![(hostile.into(), hostile.into())];
        let page = page(&Story { title: hostile.into(), facts, cards: vec![card] }).unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(&quot;x&quot;)"));
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("));
        assert!(page.contains("src=\"data:image/png;base64,iVBORw0KGgo"));
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("width=device-width"));
    }
}
