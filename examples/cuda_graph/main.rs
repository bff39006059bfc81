//! A training step captured in a CUDA graph and replayed: one launch for forward and backward, with a new batch each time.
//! The replayed graph goes on counting batches, and gives the same bits as the same steps launched one by one.
//!
//!     cargo run --release --example cuda_graph
//!
//! Without a GPU it says what is missing, and that nothing was captured. `cuda_graph_stand_in` does the same anywhere, on the
//! stand-in driver of the tests.

mod replay;

use std::process::ExitCode;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::{Shape, cuda};
use clap::Parser;
use replay::{Comparison, compare};

/// Captures a training step in a CUDA graph and replays it.
#[derive(Parser)]
struct Arguments {
    /// How many batches to train on.
    #[arg(long, default_value_t = 20)]
    steps: usize,
}

fn main() -> ExitCode {
    let Arguments { steps } = Arguments::parse();
    if let Err(reason) = cuda::is_available() {
        println!("No graph was captured, because CUDA cannot be used here:\n{reason}");
        return ExitCode::SUCCESS;
    }
    let comparison = Comparison {
        shape: Shape::nchw(32, 64, 28, 28),
        steps,
        cache: DiskCache::Default,
        timed: true,
    };
    match compare(&comparison) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cuda_graph: {error}");
            ExitCode::FAILURE
        }
    }
}
