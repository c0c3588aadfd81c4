//! Compiles the CUDA kernels to PTX, which the driver compiles for the GPU at hand; without the feature `cuda` there is
//! nothing to compile.

use std::{env, path::PathBuf, process::Command};

const FOLDER: &str = "src/tensor/cuda";
const SOURCES: [&str; 2] = ["kernels", "attention"];

fn main() {
    println!("cargo:rerun-if-changed={FOLDER}");
    // The built-in models are part of the program: a file that comes or goes makes another one.
    println!("cargo:rerun-if-changed=weights/tabletop");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder"));
    for name in SOURCES {
        let source = format!("{FOLDER}/{name}.cu");
        // The oldest architecture that multiplies bf16: nothing here needs a newer one.
        let mut command = Command::new(&nvcc);
        command.args(["-ptx", "-O3", "-arch=compute_80", "-o"]).arg(out.join(format!("{name}.ptx"))).arg(&source);
        let status =
            command.status().unwrap_or_else(|e| panic!("cannot run {}: {e}; is there a CUDA toolkit?", nvcc.display()));
        assert!(status.success(), "{} could not compile {source}", nvcc.display());
    }
}
