//! A linear layer, with the low-rank adapters that its name asks for.

use super::{Init, Params, params::lock};
use crate::tensor::{Precision, linear_in, linear_low_rank, low_rank};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor, Var};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

/// A low-rank adapter over the linear layers of one model (LoRA, arXiv 2106.09685): `W x + scale * B A x`.
///
/// The layers are those whose name ends with one of `targets` (PEFT's `target_modules`), in which a `*` stands for anything:
/// `to_q`, `blocks.0.attn.*`. Each layer has factors of its own; a clone is the same adapter, and knows them all.
#[derive(Clone)]
pub struct Adapter(Arc<Inner>);

struct Inner {
    /// Where it is from, for messages.
    name: String,
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
    /// Read from a file by PEFT's names without their `base_model.model.` head; empty for a new adapter.
    loaded: HashMap<String, Tensor>,
    seed: u64,
    trained: bool,
    /// Strength given by the user beside `alpha / rank`.
    strength: f64,
    /// Targets that a layer was found for.
    met: Mutex<BTreeSet<usize>>,
    /// The trained adapter that this one looks at.
    watched: Option<Adapter>,
    vars: Mutex<BTreeMap<String, Var>>,
}

impl Inner {
    fn new(rank: usize, alpha: f64, targets: Vec<String>) -> Self {
        Self {
            name: "the adapter".to_owned(),
            rank,
            alpha,
            targets,
            loaded: HashMap::new(),
            seed: 0,
            trained: false,
            strength: 1.0,
            met: Mutex::default(),
            watched: None,
            vars: Mutex::default(),
        }
    }
}

impl Adapter {
    /// A new adapter to be trained: `A` random, `B` zero, so that it changes nothing yet.
    pub fn fresh(rank: usize, alpha: f64, targets: Vec<String>, seed: u64) -> Self {
        Self(Arc::new(Inner { seed, trained: true, ..Inner::new(rank, alpha, targets) }))
    }

    /// An adapter read from a file: `loaded` has `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
    pub fn loaded(
        rank: usize,
        alpha: f64,
        targets: Vec<String>,
        loaded: HashMap<String, Tensor>,
        strength: f64,
        trained: bool,
    ) -> Self {
        Self(Arc::new(Inner { loaded, strength, trained, ..Inner::new(rank, alpha, targets) }))
    }

    /// Says where it is from. Call before it is cloned.
    pub fn named(mut self, name: &str) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.name = format!("the adapter {name}");
        }
        self
    }

    /// For another model with the weights of one that was built with this trained adapter: the same variables, as they are at
    /// each moment, without gradients. What is only drawn by it keeps no graph.
    pub fn still(&self) -> Self {
        let Inner { rank, alpha, ref targets, strength, .. } = *self.0;
        let watched = Some(self.clone());
        Self(Arc::new(Inner { strength, watched, ..Inner::new(rank, alpha, targets.clone()) }))
    }

    /// An error if the models that were built with it have not all the layers that it is for.
    pub fn check(&self) -> Result<()> {
        let Inner { name, targets, loaded, met, .. } = &*self.0;
        let met = lock(met);
        match targets.iter().enumerate().find(|(i, _)| !met.contains(i)) {
            Some((_, target)) if loaded.is_empty() => {
                bail!("adapter.targets: no linear layer's name ends with {target:?}")
            }
            Some((_, layer)) => bail!("{name} fits another model: {layer} is no linear layer of this one"),
            None if targets.is_empty() => bail!("adapter.targets names no layer"),
            None => Ok(()),
        }
    }

    /// Its trained variables by PEFT's names without their head.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        lock(&self.0.vars).clone()
    }

    pub fn rank(&self) -> usize {
        self.0.rank
    }

    pub fn alpha(&self) -> f64 {
        self.0.alpha
    }

    pub fn targets(&self) -> &[String] {
        &self.0.targets
    }

    fn covers(&self, layer: &str) -> bool {
        let fitting = (0..self.0.targets.len()).filter(|i| fits(&self.0.targets[*i], layer));
        let mut met = lock(&self.0.met);
        fitting.map(|i| met.insert(i)).count() > 0
    }

    /// The factors `A (rank, in)` and `B (out, rank)` for `layer`, if the adapter covers it.
    fn factors(&self, layer: &str, inner: usize, out: usize, params: &Params) -> Result<Option<Low>> {
        if !self.covers(layer) {
            return Ok(None);
        }
        let scale = self.0.strength * self.0.alpha / self.0.rank as f64;
        if let Some(watched) = &self.0.watched {
            let vars = watched.vars();
            let factor = |name: &str| {
                let var =
                    vars.get(&format!("{layer}.{name}")).context("the model of the trained adapter comes first")?;
                // Of the same storage, which updates write into.
                anyhow::Ok(var.as_tensor().detach())
            };
            let (a, b) = (factor("lora_A.weight")?, factor("lora_B.weight")?);
            return Ok(Some(Low { a, b, scale }));
        }
        let dtype = if self.0.trained { DType::F32 } else { params.dtype() };
        let source = if self.0.loaded.is_empty() {
            Params::fresh(self.0.seed, dtype, params.device())
        } else {
            Params::loaded(self.0.loaded.clone(), &self.0.name, dtype, params.device())
        };
        let rank = self.0.rank;
        let mut pair = Vec::with_capacity(2);
        for (name, shape, init) in
            [("lora_A.weight", [rank, inner], Init::FanIn), ("lora_B.weight", [out, rank], Init::Zeros)]
        {
            let tensor = source.at(layer).get(name, &shape, init)?;
            pair.push(if self.0.trained {
                let var = Var::from_tensor(&tensor.detach())?;
                let tensor = var.as_tensor().clone();
                lock(&self.0.vars).insert(format!("{layer}.{name}"), var);
                tensor
            } else {
                tensor.detach()
            });
        }
        let b = pair.remove(1);
        let a = pair.remove(0);
        Ok(Some(Low { a, b, scale }))
    }
}

/// Whether `layer` ends, behind a dot or as a whole, with what `target` says; `*` stands for any text.
fn fits(target: &str, layer: &str) -> bool {
    // The first part at the beginning, the others as early as they come, the last at the end.
    fn matches(pattern: &str, text: &str) -> bool {
        let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
        let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
        let Some(text) = text.strip_prefix(first).and_then(|text| text.strip_suffix(last)) else { return false };
        middle.split('*').try_fold(text, |text, part| Some(text.split_once(part)?.1)).is_some()
    }
    let starts = layer.match_indices('.').map(|(i, _)| i + 1);
    [0].into_iter().chain(starts).any(|start| matches(target, &layer[start..]))
}

struct Low {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

/// `x W^T + b`, plus what the adapters of this layer add.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    precision: Precision,
    low: Vec<Low>,
}

impl Linear {
    /// `weight` of `(out, in)` at `params`, without a bias.
    pub fn new(inner: usize, out: usize, params: &Params) -> Result<Self> {
        Self::with(inner, out, false, Init::FanIn, params)
    }

    /// With a bias of `(out)` as well.
    pub fn biased(inner: usize, out: usize, params: &Params) -> Result<Self> {
        Self::with(inner, out, true, Init::FanIn, params)
    }

    pub fn with(inner: usize, out: usize, bias: bool, init: Init, params: &Params) -> Result<Self> {
        let weight = params.get("weight", &[out, inner], init)?;
        let bias = bias.then(|| params.get("bias", &[out], Init::Zeros)).transpose()?;
        let mut low = Vec::new();
        for adapter in params.adapters() {
            low.extend(adapter.factors(params.path(), inner, out, params)?);
        }
        Ok(Self { weight, bias, precision: params.precision(), low })
    }

    /// The layer that gives `len` of the outputs from `start` on, by views of the weights: gradients reach the whole.
    pub fn outputs(&self, start: usize, len: usize) -> candle_core::Result<Self> {
        let part = |x: &Tensor| x.narrow(0, start, len);
        let low = |low: &Low| Ok(Low { a: low.a.clone(), b: part(&low.b)?, scale: low.scale });
        Ok(Self {
            weight: part(&self.weight)?,
            bias: self.bias.as_ref().map(part).transpose()?,
            precision: self.precision,
            low: self.low.iter().map(low).collect::<candle_core::Result<_>>()?,
        })
    }

    /// `(.., in)` to `(.., out)`.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (weight, bias) = (&self.weight, self.bias.as_ref());
        let [Low { a, b, scale }, others @ ..] = self.low.as_slice() else {
            return linear_in(self.precision, x, weight, bias);
        };
        let mut y = linear_low_rank(self.precision, x, (weight, bias), (a, b, *scale))?;
        for Low { a, b, scale } in others {
            y = (y + low_rank(x, a, b, *scale)?)?;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{parity::difference, rng::Stream};
    use candle_core::Device;

    #[test]
    fn targets_are_the_ends_of_names_with_any_text_for_a_star() {
        for (target, layer, wanted) in [
            ("to_q", "blocks.0.attn.to_q", true),
            ("to_q", "to_q", true),
            ("to_q", "blocks.0.attn.into_q", false),
            ("attn.*", "blocks.0.attn.to_q", true),
            ("blocks.*.to_q", "transformer.blocks.10.attn.to_q", true),
            ("blocks.*.*_q", "blocks.1.attn.to_q", true),
            ("blocks.*.to_k", "blocks.1.attn.to_q", false),
            ("single*.to_q", "blocks.1.attn.to_q", false),
            ("*", "anything", true),
        ] {
            assert_eq!(fits(target, layer), wanted, "{target} {layer}");
        }
    }

    #[test]
    fn a_target_without_a_layer_is_named() {
        let adapter = Adapter::fresh(2, 4.0, vec!["lin".into(), "lon".into()], 5);
        let params = Params::fresh(1, DType::F32, &Device::Cpu);
        Linear::new(3, 2, &params.at("lin")).unwrap();
        Linear::new(3, 2, &params.again(vec![adapter.clone()]).at("lin")).unwrap();
        assert!(adapter.check().unwrap_err().to_string().contains("\"lon\""));
    }

    #[test]
    fn some_outputs_are_those_of_the_whole_layer() {
        let adapter = Adapter::fresh(2, 4.0, vec!["lin".into()], 5);
        let params = Params::fresh(1, DType::F32, &Device::Cpu).adapted(vec![adapter.clone()]);
        let whole = Linear::biased(3, 5, &params.at("lin")).unwrap();
        let random = |name: &str, shape: &[usize]| Stream::new(0, name, 0).normal(shape, &Device::Cpu).unwrap();
        let (mut vars, x) = (adapter.vars(), Var::from_tensor(&random("x", &[2, 4, 3])).unwrap());
        vars["lin.lora_B.weight"].set(&random("b", &[5, 2])).unwrap();
        vars.extend(params.vars());
        vars.insert("x".into(), x.clone());
        assert_eq!(vars.len(), 5);
        let run = |y: Tensor| {
            let direction = random("direction", &[2, 4, 2]);
            let grads = (&y * direction).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |var: &Var| grads.get(var).expect("every variable has a gradient").clone();
            std::iter::once(y.clone()).chain(vars.values().map(of)).collect::<Vec<_>>()
        };
        let some = run(whole.outputs(2, 2).unwrap().forward(&x).unwrap());
        let want = run(whole.forward(&x).unwrap().narrow(2, 2, 2).unwrap());
        for (got, want) in some.iter().zip(&want) {
            assert!(difference(got, want) < 1e-6);
        }
    }

    #[test]
    fn a_still_adapter_follows_the_trained_one_without_gradients() {
        let params = Params::fresh(1, DType::F32, &Device::Cpu);
        Linear::new(3, 2, &params.at("lin")).unwrap();
        let trained = Adapter::fresh(2, 4.0, vec!["lin".into()], 5);
        let linear = |adapter: Adapter| Linear::new(3, 2, &params.again(vec![adapter]).at("lin")).unwrap();
        let (policy, still) = (linear(trained.clone()), linear(trained.still()));
        let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
        let numbers = |linear: &Linear| linear.forward(&x).unwrap().to_vec2::<f32>().unwrap();
        let before = numbers(&still);
        assert_eq!(before, numbers(&policy));
        trained.vars()["lin.lora_B.weight"].set(&Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
        assert!(numbers(&still) == numbers(&policy) && numbers(&still) != before);
        let gradient = |linear: &Linear, x: &Tensor| {
            let gradients = linear.forward(x).unwrap().sum_all().unwrap().backward().unwrap();
            gradients.get(trained.vars()["lin.lora_A.weight"].as_tensor()).is_some()
        };
        assert!(gradient(&policy, &x) && !gradient(&still, &x));
    }
}
