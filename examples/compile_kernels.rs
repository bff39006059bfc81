//! Compiles the kernels with the NVRTC of this machine, for devices that need not be there.
//!
//!     cargo run --release --example compile_kernels -- --architectures 75,80,86,89,90,100,120 --thorough 90
//!
//! For every architecture: each kernel, element, walk, vector width and epilogue, with the usual block size and index width.
//! For those named by `--thorough` also every block size and index width, with the widest vectors; these change constants, not
//! code paths. Prints, for each architecture, how many instantiations were compiled, their bytes and the time. Ends with an
//! error if one of them does not compile.

use std::process::ExitCode;
use std::time::Instant;

use batchnorm_cuda::cuda::{DiskCache, Instantiation, compile_ahead};
use clap::Parser;
use rayon::prelude::*;

/// Compiles every kernel instantiation with NVRTC.
#[derive(Parser)]
struct Arguments {
    /// Compute capabilities, times ten.
    #[arg(long, value_delimiter = ',', default_value = "75,80,86,89,90,100,120")]
    architectures: Vec<u32>,
    /// Those of them that every block size and index width is compiled for.
    #[arg(long, value_delimiter = ',')]
    thorough: Vec<u32>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut failures = 0;
    for &architecture in &arguments.architectures {
        let thorough = arguments.thorough.contains(&architecture);
        let instantiations: Vec<Instantiation> = Instantiation::all()
            .into_iter()
            .filter(|one| is_usual(one) || (thorough && is_widest(one)))
            .collect();
        let start = Instant::now();
        let results: Vec<_> = instantiations
            .par_iter()
            .map(|one| compile_ahead(one, architecture, &DiskCache::Off))
            .collect();
        let bytes: usize = results.iter().flatten().map(Vec::len).sum();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            failures += 1;
            eprintln!("{error}");
        }
        println!(
            "sm_{architecture}: {} of {} instantiations compiled, {bytes} bytes, {:.1} s",
            results.iter().flatten().count(),
            results.len(),
            start.elapsed().as_secs_f64()
        );
    }
    if failures == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn is_usual(instantiation: &Instantiation) -> bool {
    instantiation.threads == 256 && !instantiation.wide_index
}

fn is_widest(instantiation: &Instantiation) -> bool {
    instantiation.vector as usize * instantiation.dtype.size() == 16
}
