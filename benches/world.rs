//! How fast the tabletop world is: pictures a second that training could be given. `cargo bench --bench world`;
//! RAYON_NUM_THREADS sets the threads.

use rayon::prelude::*;
use rlrig::scene::tabletop::{
    oracle,
    render::render,
    split::Split,
    tasks::{self, TextToImage},
};
use std::time::Instant;

const COUNT: u64 = 4000;

fn main() {
    let samples: Vec<TextToImage> = time("scenes with prompts", |i| tasks::text_to_image(0, Split::Train, i, 1, 3));
    let pictures = time("renders", |i| render(&samples[i as usize].scene));
    time("readings by the oracle", |i| oracle::read(&pictures[i as usize]));
}

fn time<T: Send>(name: &str, work: impl Fn(u64) -> T + Sync + Send) -> Vec<T> {
    let start = Instant::now();
    let made: Vec<T> = (0..COUNT).into_par_iter().map(work).collect();
    let threads = rayon::current_num_threads();
    println!("{name}: {:.0} a second on {threads} threads", COUNT as f64 / start.elapsed().as_secs_f64());
    made
}
