//! Block-wise recomputation: a network's blocks keep nothing but their inputs, and each is run a second time when its
//! gradients are wanted (Chen et al., arXiv 1604.06174). A third more work for a fraction of the memory, and the same
//! gradients, since the second run computes what the first did.
//!
//! candle's graph is a tree of tensors that hold each other, so it is cut: while a [`Tape`] records, what a [`block`]
//! returns is a variable without a past, and the tape remembers how to get there. [`Tape::backward`] goes back over these
//! pieces from the last to the first; the gradient of a piece's result starts its own backward pass.

use candle_core::{Result, Tensor, Var, backprop::GradStore};
use std::cell::RefCell;

/// A piece of the graph between two cuts.
struct Piece {
    results: Vec<Var>,
    /// The results again, with their graph down to the piece's inputs, which are cuts or variables themselves.
    again: Box<dyn Fn() -> Result<Vec<Tensor>>>,
}

thread_local! {
    /// What is recorded, innermost last; nothing for work that is not. A thread that waits in the middle of one piece of
    /// work may be given another by rayon, which it finishes before it goes on, and whose blocks are no part of the first.
    static RECORDING: RefCell<Vec<Option<Vec<Piece>>>> = const { RefCell::new(Vec::new()) };
}

/// The pieces of a computation in their order; none if it was not recorded.
pub struct Tape(Vec<Piece>);

impl Tape {
    /// Runs `work` and records its blocks if `recompute` says so. They must run on this thread, not in parallel to each other.
    pub fn record<T>(recompute: bool, work: impl FnOnce() -> T) -> (T, Self) {
        /// Takes the recording back, also where `work` panics.
        struct Open;
        impl Drop for Open {
            fn drop(&mut self) {
                RECORDING.with_borrow_mut(Vec::pop);
            }
        }
        RECORDING.with_borrow_mut(|stack| stack.push(recompute.then(Vec::new)));
        let open = Open;
        let result = work();
        let pieces = RECORDING.with_borrow_mut(|stack| stack.last_mut().and_then(Option::take));
        drop(open);
        (result, Self(pieces.unwrap_or_default()))
    }

    /// The gradients of `loss`, which was computed while this tape recorded.
    pub fn backward(mut self, loss: &Tensor) -> Result<GradStore> {
        let mut gradients = loss.backward()?;
        while let Some(Piece { results, again }) = self.0.pop() {
            let found: Vec<Option<Tensor>> = results.iter().map(|result| gradients.remove(result)).collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            // The sum of results times gradients has just these gradients. Candle leaves some a graph of their own, which
            // must not be followed.
            let paired = |(result, gradient): (Tensor, Option<Tensor>)| Some((result, gradient?.detach()));
            let mut sum = Tensor::zeros((), loss.dtype(), loss.device())?;
            for (result, gradient) in again()?.into_iter().zip(found).filter_map(paired) {
                sum = (sum + (result * gradient)?.sum_all()?.to_dtype(loss.dtype())?)?;
            }
            gradients.extend(sum.backward()?)?;
        }
        Ok(gradients)
    }
}

/// Runs a block of a network; where a tape records, only its inputs are kept. `run` must compute the same each time.
pub fn block(inputs: &[&Tensor], run: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'static) -> Result<Vec<Tensor>> {
    if !recording() {
        return run(&inputs.iter().map(|x| (*x).clone()).collect::<Vec<_>>());
    }
    let inputs: Vec<Tensor> = inputs.iter().map(|x| cut(x)).collect::<Result<_>>()?;
    let results = run(&inputs)?;
    keep(results, move || run(&inputs))
}

/// What is behind `x` becomes a piece of its own where a tape records: what many blocks are given is best cut once.
pub fn cut(x: &Tensor) -> Result<Tensor> {
    if !recording() || x.is_variable() || !x.track_op() {
        return Ok(x.clone());
    }
    let past = x.clone();
    Ok(keep(vec![x.clone()], move || Ok(vec![past.clone()]))?.remove(0))
}

fn recording() -> bool {
    RECORDING.with_borrow(|stack| matches!(stack.last(), Some(Some(_))))
}

/// The results without their graph, which `again` can make anew.
fn keep(results: Vec<Tensor>, again: impl Fn() -> Result<Vec<Tensor>> + 'static) -> Result<Vec<Tensor>> {
    if !results.iter().any(Tensor::track_op) {
        return Ok(results);
    }
    let results: Vec<Var> = results.iter().map(|x| Var::from_tensor(&x.detach())).collect::<Result<_>>()?;
    let tensors = results.iter().map(|var| var.as_tensor().clone()).collect();
    RECORDING.with_borrow_mut(|stack| {
        if let Some(Some(pieces)) = stack.last_mut() {
            pieces.push(Piece { results, again: Box::new(again) });
        }
    });
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::{cell::Cell, rc::Rc};

    fn var(values: &[f32]) -> Var {
        Var::new(values, &Device::Cpu).unwrap()
    }

    fn values(gradients: &GradStore, of: &Tensor) -> Vec<f32> {
        gradients.get(of).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_are_those_of_the_whole_graph() -> Result<()> {
        let (weight, shared, runs) = (var(&[0.5, -1.5, 2.0]), var(&[1.0, 2.0, -0.5]), Rc::new(Cell::new(0)));
        let loss = || -> Result<Tensor> {
            // Given to every block, and itself computed of a variable.
            let scale = cut(&shared.sqr()?)?;
            let (mut x, mut side) = (weight.tanh()?, weight.as_tensor().clone());
            for _ in 0..3 {
                let (weight, runs) = (weight.as_tensor().clone(), runs.clone());
                let run = move |inputs: &[Tensor]| {
                    runs.set(runs.get() + 1);
                    let y = ((&inputs[0] * &weight)? + &inputs[1])?.tanh()?;
                    Ok(vec![y.sqr()?, (y * &inputs[2])?])
                };
                let results = block(&[&x, &scale, &side], run)?;
                // What lies between two blocks belongs to neither.
                x = (&results[0] + &results[1])?;
                side = results[1].clone();
            }
            (x + side)?.sqr()?.sum_all()
        };
        let want = loss()?.backward()?;
        assert_eq!(runs.replace(0), 3);
        let (recorded, tape) = Tape::record(true, loss);
        assert_eq!((runs.get(), tape.0.len()), (3, 7));
        let got = tape.backward(&recorded?)?;
        assert_eq!(runs.get(), 6, "each block runs twice");
        for var in [&weight, &shared] {
            let (got, want) = (values(&got, var), values(&want, var));
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1.0)), "{got:?} {want:?}");
        }
        Ok(())
    }

    #[test]
    fn what_is_not_recorded_or_not_trained_is_left_alone() -> Result<()> {
        let x = var(&[1.0, 2.0]);
        let double = |inputs: &[Tensor]| Ok(vec![(&inputs[0] * 2.0)?]);
        let plain = block(&[&x], double)?.remove(0).sum_all()?.backward()?;
        assert_eq!(values(&plain, &x), [2.0, 2.0]);
        let still = x.detach();
        let (result, tape) = Tape::record(true, || block(&[&still], double));
        assert!(tape.0.is_empty() && !result?[0].track_op());
        // What a thread is given in the middle of a recording has its own tape, or none.
        let ((inner, tape), outer) = Tape::record(true, || Tape::record(true, || block(&[&x], double)));
        assert!(tape.0.len() == 1 && outer.0.is_empty() && inner?[0].is_variable());
        let ((inner, tape), outer) = Tape::record(true, || Tape::record(false, || block(&[&x], double)));
        assert!(tape.0.is_empty() && outer.0.is_empty());
        assert_eq!(values(&inner?[0].sum_all()?.backward()?, &x), [2.0, 2.0]);
        assert!(!recording());
        Ok(())
    }
}
