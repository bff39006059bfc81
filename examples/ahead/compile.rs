//! Compiles what plans ask for before they run, by all cores at once: what runs compiles its kernels one after the other.

use std::collections::HashSet;

use batchnorm_cuda::cuda::plan::Plan;
use batchnorm_cuda::cuda::{DiskCache, Instantiation, compile_ahead};
use rayon::prelude::*;

/// Fills the cache on disk, as long as `go_on` says so. What cannot be compiled will say so when it runs.
pub fn compile(plans: &[Plan], architecture: u32, cache: &DiskCache, go_on: impl Fn() -> bool + Sync) {
    let launches = plans.iter().flat_map(|plan| &plan.kernels);
    let wanted: HashSet<Instantiation> = launches.map(|launch| launch.instantiation).collect();
    wanted.into_par_iter().for_each(|instantiation| {
        if go_on() {
            let _ = compile_ahead(&instantiation, architecture, cache);
        }
    });
}
