//! Parse, set up logging, dispatch, and turn an error into an exit code: 2 for a mistake in how rlrig was called, 1 for
//! everything else.

use clap::Parser;
use rlrig::{cli::Cli, commands, error::Usage};
use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Once, before there are other threads.
fn prepare() {
    // candle's element-wise operations wait for their helpers in a busy loop behind one lock. Here micro-batches and fused
    // kernels share the cores through rayon, and these helpers would only take them away: a third of all time.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: no other thread exists yet that could read the environment.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    // Tensors come and go by the megabyte: giving their memory back to the system at once costs a page fault for each
    // 4 KiB when it is asked for again. The option is `purge_delay`, in milliseconds.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets a number.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 1000) };
}

fn main() -> ExitCode {
    prepare();
    let cli = Cli::parse();
    let level = ["warn", "info", "debug", "trace"][usize::from(cli.verbose.min(3))];
    let filter = EnvFilter::try_from_env("RLRIG_LOG").unwrap_or_else(|error| {
        if std::env::var_os("RLRIG_LOG").is_some() {
            let _ = writeln!(
                std::io::stderr(),
                "RLRIG_LOG is passed over, as it is no filter such as rlrig=debug: {error}"
            );
        }
        EnvFilter::new(format!("warn,rlrig={level}"))
    });
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .without_time()
        .init();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", escaped(&format!("{error:#}")));
            ExitCode::from(if error.chain().any(|e| e.is::<Usage>()) { 2 } else { 1 })
        }
    }
}

/// Errors name what model files say, and a terminal obeys control characters.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut shown, c| {
        match c.is_control() && c != '\n' {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
        shown
    })
}

/// `rlrig ... | head` ends quietly when the reader has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
