//! One optimiser step on the shapes of the shipped Diffuser; `scripts/bench_optim.py` times PyTorch on the same.

use candle_core::{Device, Var};
use rlrig::{
    tensor::rng::Stream,
    train::{
        ema::Ema,
        optim::{Gradients, Group, OptimConfig, Optimizer, Rule},
    },
};
use std::{collections::BTreeMap, time::Instant};

/// Two double and four single blocks of width 256, their modulations, and a text encoder of width 128.
fn shapes() -> Vec<[usize; 2]> {
    let mut shapes = Vec::new();
    for _ in 0..2 {
        shapes.extend([[256, 256]; 8]);
        shapes.extend([[1536, 256], [256, 768]].repeat(2));
    }
    for _ in 0..4 {
        shapes.extend([[2304, 256], [256, 1024]]);
    }
    shapes.extend([[1536, 256], [1536, 256], [768, 256]]);
    for _ in 0..4 {
        shapes.extend([[128, 128], [128, 128], [128, 128], [128, 128], [384, 128], [384, 128], [128, 384]]);
    }
    shapes
}

fn main() -> anyhow::Result<()> {
    let mut vars = BTreeMap::new();
    let mut gradients = Gradients::new();
    for (i, shape) in shapes().iter().enumerate() {
        let draw = |purpose| Stream::new(0, purpose, i as u64).normal(shape, &Device::Cpu);
        vars.insert(format!("{i:02}"), Var::from_tensor(&draw("weight")?)?);
        gradients.insert(format!("{i:02}"), draw("gradient")?);
    }
    let parameters: usize = vars.values().map(|v: &Var| v.as_tensor().elem_count()).sum();
    println!("{} matrices, {:.2} M parameters", vars.len(), parameters as f64 / 1e6);
    for rule in [Rule::AdamW, Rule::Muon] {
        let group = |_: &str, _: &[usize]| Group { rule, lr: 1.0, decay: 1.0 };
        let mut optimizer = Optimizer::new(&OptimConfig::default(), &vars, group)?;
        time(&format!("{rule:?} with clipping"), || optimizer.step(&gradients, 1e-6).map(drop))?;
    }
    let mut ema = Ema::new(&vars, 0.999)?;
    time("moving average", || Ok(ema.update(&vars)?))
}

/// Prints the least time of a few runs, which is what the machine can do when it is left alone.
fn time(name: &str, mut f: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut least = f64::INFINITY;
    for _ in 0..10 {
        let start = Instant::now();
        f()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    println!("{name}: {:.1} ms", least * 1e3);
    Ok(())
}
