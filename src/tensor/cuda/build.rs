//! Compiles the CUDA kernels to PTX, which the driver compiles for the GPU at hand.

use std::{env, path::PathBuf, process::Command};

const SOURCE: &str = "src/tensor/cuda/kernels.cu";

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder")).join("kernels.ptx");
    // The oldest architecture that CUDA 13 knows: nothing here needs a newer one.
    let mut command = Command::new(&nvcc);
    command.args(["-ptx", "-O3", "-arch=compute_75", "-o"]).arg(out).arg(SOURCE);
    let status =
        command.status().unwrap_or_else(|e| panic!("cannot run {}: {e}; is there a CUDA toolkit?", nvcc.display()));
    assert!(status.success(), "{} could not compile {SOURCE}", nvcc.display());
}
