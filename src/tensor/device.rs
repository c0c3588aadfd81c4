//! The devices that tensors may live on: which there are, which is preferred, and why one cannot be used.

use candle_core::{Device, utils};
use std::sync::OnceLock;

/// A kind of device beside the CPU. Each is opened once: tensors of two openings could not meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Cuda,
    Metal,
}

impl Accelerator {
    /// The one to be preferred first.
    pub const PREFERRED: [Self; 2] = [Self::Cuda, Self::Metal];

    /// Its name, and that of the cargo feature that builds it in.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }

    /// Whether this binary was built with it.
    pub fn built(self) -> bool {
        match self {
            Self::Cuda => utils::cuda_is_available(),
            Self::Metal => utils::metal_is_available(),
        }
    }

    /// Its first device, or why there is none.
    pub fn open(self) -> Result<Device, String> {
        static CUDA: OnceLock<Result<Device, String>> = OnceLock::new();
        static METAL: OnceLock<Result<Device, String>> = OnceLock::new();
        if !self.built() {
            return Err(format!("not part of this build: it takes cargo's --features {}", self.name()));
        }
        let (cell, open): (_, fn() -> candle_core::Result<Device>) = match self {
            Self::Cuda => (&CUDA, cuda),
            Self::Metal => (&METAL, || Device::new_metal(0)),
        };
        let opened = cell.get_or_init(|| open().map_err(|e| format!("no such device, or no driver for it: {e}")));
        opened.clone()
    }
}

/// On one stream of its own. Candle's default is each thread's own stream, and work that threads share would not wait
/// for each other's.
fn cuda() -> candle_core::Result<Device> {
    let device = Device::new_cuda_with_stream(0)?;
    #[cfg(feature = "cuda")]
    // SAFETY: events order the work of several streams; here all work is on one, which orders it.
    unsafe {
        device.as_cuda_device()?.disable_event_tracking();
    }
    Ok(device)
}

/// The first device of [`Accelerator::PREFERRED`] that can be used, else the CPU.
pub fn best() -> Device {
    Accelerator::PREFERRED.iter().find_map(|kind| kind.open().ok()).unwrap_or(Device::Cpu)
}

/// What is known of a device: its model, what its kernels may use, and its memory.
pub fn describe(device: &Device) -> Option<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let stream = device.cuda_stream();
            let context = stream.context();
            let (major, minor) = context.compute_capability().ok()?;
            let (free, total) = context.mem_get_info().ok()?;
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            Some(format!(
                "{}, compute capability {major}.{minor}, {:.1} GiB, {:.1} free",
                context.name().ok()?,
                gib(total),
                gib(free)
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::parity;

    #[test]
    fn what_cannot_be_used_says_why_and_is_not_chosen() {
        for kind in Accelerator::PREFERRED {
            match kind.open() {
                Ok(device) => assert!(kind.built() && !device.is_cpu()),
                Err(reason) => assert!(reason.contains(if kind.built() { "no such device" } else { "--features" })),
            }
        }
        let usable = Accelerator::PREFERRED.iter().filter_map(|kind| kind.open().ok()).next();
        assert_eq!(best().is_cpu(), usable.is_none());
    }

    #[test]
    fn a_device_is_opened_once() {
        let Some(first) = parity::cuda("a device opened twice") else { return };
        assert!(first.same_device(&Accelerator::Cuda.open().unwrap()));
    }
}
