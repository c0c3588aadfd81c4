//! A contact sheet: a [`Story`] as one picture.
//!
//! The letters are Noto Sans Mono, already rasterised (the crate `noto-sans-mono-bitmap`), so that a sheet looks the same
//! everywhere.

use super::story::{Card, Story};
use image::{Rgb, RgbImage, imageops};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const INK: Rgb<u8> = Rgb([28, 28, 30]);
const FAINT: Rgb<u8> = Rgb([110, 110, 115]);
const YES: Rgb<u8> = Rgb([20, 120, 60]);
const NO: Rgb<u8> = Rgb([190, 40, 40]);

const MARGIN: u32 = 20;
const LINE: u32 = 20;
const CELL: u32 = 288;
const COLUMNS: usize = 4;

/// A line of text, ready to be drawn.
struct Line {
    text: String,
    weight: FontWeight,
    colour: Rgb<u8>,
}

/// Draws the sheet.
pub fn sheet(story: &Story) -> RgbImage {
    let columns = story.cards.len().clamp(1, COLUMNS) as u32;
    let width = MARGIN + columns * (CELL + MARGIN);
    let mut head = wrap(&story.title, width - 2 * MARGIN, FontWeight::Bold, INK);
    let facts: Vec<String> = story.facts.iter().map(|(name, value)| format!("{name} {value}")).collect();
    head.extend(wrap(&facts.join(" \u{b7} "), width - 2 * MARGIN, FontWeight::Regular, FAINT));
    let cells: Vec<Cell> = story.cards.iter().map(Cell::new).collect();

    let rows: Vec<&[Cell]> = cells.chunks(columns as usize).collect();
    let heights: Vec<u32> = rows.iter().map(|row| row.iter().map(Cell::height).max().unwrap_or(0)).collect();
    let top = MARGIN + LINE * head.len() as u32 + MARGIN;
    let mut page = RgbImage::from_pixel(width, top + heights.iter().map(|h| h + MARGIN).sum::<u32>(), PAPER);
    draw_lines(&mut page, MARGIN, MARGIN, &head);
    let mut y = top;
    for (row, height) in rows.iter().zip(heights) {
        for (column, cell) in (0u32..).zip(row.iter()) {
            cell.draw(&mut page, MARGIN + column * (CELL + MARGIN), y);
        }
        y += height + MARGIN;
    }
    page
}

struct Cell {
    above: Vec<Line>,
    picture: RgbImage,
    below: Vec<Line>,
    best: bool,
}

impl Cell {
    fn new(card: &Card) -> Self {
        let mut above = wrap(&card.heading, CELL, FontWeight::Bold, if card.best { YES } else { INK });
        above.extend(wrap(&card.action, CELL, FontWeight::Regular, INK));
        let mut below = Vec::new();
        for finding in &card.findings {
            let (mark, colour) = if finding.yes { ("yes", YES) } else { ("no ", NO) };
            let mut lines = wrap(&format!("         {}", finding.text), CELL, FontWeight::Regular, colour);
            if let Some(first) = lines.first_mut() {
                first.text = format!("{mark} {:.2} {}", finding.p_yes, first.text.trim_start());
            }
            below.extend(lines);
            if !finding.note.is_empty() {
                below.extend(wrap(&format!("         {}", finding.note), CELL, FontWeight::Regular, FAINT));
            }
        }
        below.extend(wrap(&card.footer, CELL, FontWeight::Regular, FAINT));
        // Small pictures grow by whole pixels, so that they are seen as they are; large ones shrink.
        let (w, h) = card.image.dimensions();
        let longest = w.max(h).max(1);
        let scale = |side: u32| {
            if longest <= CELL { side * (CELL / longest) } else { (side * CELL / longest).max(1) }
        };
        let filter = if longest <= CELL { imageops::FilterType::CatmullRom } else { imageops::FilterType::Lanczos3 };
        let picture = imageops::resize(&card.image, scale(w), scale(h), filter);
        Self { above, picture, below, best: card.best }
    }

    fn height(&self) -> u32 {
        LINE * (self.above.len() + self.below.len()) as u32 + self.picture.height() + 2 * GAP
    }

    fn draw(&self, page: &mut RgbImage, x: u32, mut y: u32) {
        draw_lines(page, x, y, &self.above);
        y += LINE * self.above.len() as u32 + GAP;
        if self.best {
            fill(page, x - FRAME, y - FRAME, self.picture.width() + 2 * FRAME, self.picture.height() + 2 * FRAME, YES);
        }
        imageops::replace(page, &self.picture, x.into(), y.into());
        y += self.picture.height() + GAP;
        draw_lines(page, x, y, &self.below);
    }
}

const GAP: u32 = 8;
const FRAME: u32 = 4;

fn fill(page: &mut RgbImage, x: u32, y: u32, w: u32, h: u32, colour: Rgb<u8>) {
    for y in y..(y + h).min(page.height()) {
        for x in x..(x + w).min(page.width()) {
            page.put_pixel(x, y, colour);
        }
    }
}

/// Breaks `text` at spaces into lines of at most `width` pixels; further lines begin with the first one's indent.
fn wrap(text: &str, width: u32, weight: FontWeight, colour: Rgb<u8>) -> Vec<Line> {
    let most = (width as usize / get_raster_width(weight, RasterHeight::Size16)).max(8);
    let indent = " ".repeat(text.chars().take_while(|c| *c == ' ').count().min(most / 2));
    let mut lines = Vec::new();
    let mut line = indent.clone();
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        if line.chars().count() + 1 + word.len() > most && line.len() > indent.len() {
            lines.push(std::mem::replace(&mut line, indent.clone()));
        }
        if line.len() > indent.len() {
            line.push(' ');
        }
        // A word longer than a line is cut.
        while line.chars().count() + word.len() > most {
            let rest = word.split_off(most - line.chars().count());
            line.extend(word);
            lines.push(std::mem::replace(&mut line, indent.clone()));
            word = rest;
        }
        line.extend(word);
    }
    if line.len() > indent.len() {
        lines.push(line);
    }
    lines.into_iter().map(|text| Line { text, weight, colour }).collect()
}

fn draw_lines(page: &mut RgbImage, x: u32, mut y: u32, lines: &[Line]) {
    for line in lines {
        let mut left = x;
        for c in line.text.chars() {
            let raster = get_raster(c, line.weight, RasterHeight::Size16)
                .or_else(|| get_raster('?', line.weight, RasterHeight::Size16));
            let Some(raster) = raster else { continue };
            for (dy, row) in (0..).zip(raster.rows()) {
                for (dx, cover) in (0..).zip(row.iter()) {
                    if let Some(pixel) = page.get_pixel_mut_checked(left + dx, y + dy) {
                        let cover = u32::from(*cover);
                        for (under, ink) in pixel.0.iter_mut().zip(line.colour.0) {
                            *under = ((u32::from(ink) * cover + u32::from(*under) * (255 - cover) + 127) / 255) as u8;
                        }
                    }
                }
            }
            left += raster.width() as u32;
        }
        y += LINE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_their_width_and_lose_no_letter() {
        let text = "  a very-very-long-word-that-no-line-can-hold-in-one-piece and some short ones";
        let lines = wrap(text, 160, FontWeight::Regular, INK);
        let width = get_raster_width(FontWeight::Regular, RasterHeight::Size16);
        assert!(lines.len() > 3 && lines.iter().all(|l| l.text.len() * width <= 160 && l.text.starts_with("  ")));
        let letters = |s: &str| s.chars().filter(|c| *c != ' ').collect::<String>();
        assert_eq!(letters(&lines.iter().map(|l| l.text.as_str()).collect::<String>()), letters(text));
    }

    #[test]
    fn every_picture_is_on_the_sheet_and_the_best_is_framed() {
        let card = |colour, best| Card {
            heading: "Round".into(),
            action: "drawn".into(),
            image: RgbImage::from_pixel(128, 128, Rgb(colour)),
            findings: vec![],
            footer: String::new(),
            best,
        };
        let colours = [[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 0], [0, 9, 9]];
        let cards = colours.iter().enumerate().map(|(i, c)| card(*c, i == 2)).collect();
        let page = sheet(&Story { title: "ünïcode → title".into(), facts: vec![], cards });
        let count = |colour: [u8; 3]| page.pixels().filter(|p| p.0 == colour).count();
        assert!(colours.iter().all(|c| count(*c) == 256 * 256));
        assert!(count(YES.0) >= 4 * 4 * 256);
    }
}
