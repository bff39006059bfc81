//! The example `cuda_graph` on the stand-in driver of the tests, on any machine:
//!
//!     cargo run --release --example cuda_graph_stand_in
//!
//! Apart from it, because a published crate has no stand-in driver.

#[path = "cuda_graph/replay.rs"]
mod replay;

use std::error::Error;

use batchnorm_cuda::Shape;
use batchnorm_cuda::cuda::DiskCache;
use replay::{Comparison, compare};

fn main() -> Result<(), Box<dyn Error>> {
    emulator::install();
    println!("on the stand-in driver:");
    compare(&Comparison {
        shape: Shape::nchw(4, 8, 6, 6),
        steps: 20,
        // Its kernels have no business among those of the user.
        cache: DiskCache::Off,
        // Its times say nothing.
        timed: false,
    })
}
