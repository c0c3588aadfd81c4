//! `rlrig check`: whether a picture shows what a prompt asks for.

use super::{
    adapters::Adapters,
    ask, open,
    show::{Console, claim},
};
use crate::{
    cli::Check,
    io::png,
    models::built_in,
    rig::roles::{Checker, Picture, expect_each, score},
};
use anyhow::Result;
use serde_json::json;

pub fn run(args: &Check) -> Result<()> {
    open::check_accept(args.accept)?;
    open::check_looks(args.looks)?;
    let strict = built_in::are_named(args.critic.vlm.as_deref());
    let ask = ask::understand(&args.prompt, strict)?;
    let picture = Picture::from_pixels(png::read(&args.image)?);
    let device = open::device(&args.models)?;
    let found = open::find_vlm(&args.critic, args.print.quiet)?;
    let console = Console::new(args.print.quiet, 1);
    let mut adapters = Adapters::open(&args.models)?;
    let critic = open::checker(&found, (&device.0, device.1), &mut adapters)?;
    let critic = critic.with_looks(open::looks(args.looks, &found));
    adapters.finish()?;
    let target = ask::resolve(ask, &critic, args.only.only.unwrap_or(strict), &|text| console.say(text))?;
    let mut verdicts = expect_each("the Checker", 1, critic.check(&[(&picture, &target)])?)?.remove(0);
    verdicts.iter_mut().for_each(|v| v.yes = v.p_yes >= args.accept);
    let passes = !verdicts.is_empty() && verdicts.iter().all(|v| v.yes);
    if args.print.json {
        let score = score(&verdicts);
        let document = json!({
            "image": args.image,
            "prompt": target.prompt,
            "passes": passes,
            "score": score,
            "verdicts": verdicts,
            "looks": critic.looks,
            "vlm": found.source,
        });
        return Ok(console.result(&document.to_string())?);
    }
    for verdict in &verdicts {
        let word = if verdict.yes { "yes" } else { "no " };
        console.result(&format!("{word} {:.2}  {}", verdict.p_yes, claim(verdict)))?;
    }
    console.result(match (passes, verdicts.is_empty()) {
        (true, _) => "the picture passes",
        (_, true) => "there is nothing to check",
        _ => "the picture does not pass",
    })?;
    Ok(())
}
