//! The built-in models are part of the binary: it is built again when they change.

fn main() {
    println!("cargo::rerun-if-changed=weights/tabletop");
    println!("cargo::rerun-if-changed=build.rs");
}
