//! How long a launch is believed to take: a few lines of arithmetic over the costs of `tuning.rs`. By this plans are
//! compared. A modelled time is no measurement.

use super::kernel::Kernel;
use super::limits::DeviceLimits;
use super::plan::{KernelLaunch, Traffic};
use super::resident::{Resident, Team};
use super::tiling::Walk;
use super::tuning::Costs;

/// Nanoseconds for the launches of a plan, in order.
pub(super) fn modelled_time(kernels: &[KernelLaunch], limits: &DeviceLimits, costs: &Costs) -> f64 {
    let mut time = 0.0;
    let mut cached = false;
    for launch in kernels {
        time += match &launch.instantiation.resident {
            Some(resident) => resident_time(launch, resident, limits, costs),
            None => general_time(launch, cached, limits, costs),
        };
        cached = launch.traffic.tensors as f64 <= limits.l2_cache as f64 * costs.cached_part;
    }
    time
}

/// Bytes per nanosecond between memory and `multiprocessors` of the chip.
fn rate(multiprocessors: u64, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let memory = limits.memory_bandwidth as f64 * 1e-9 * costs.efficiency;
    memory.min(multiprocessors as f64 * costs.multiprocessor_rate)
}

/// Launch, latency, and what takes longer: the bytes at the rate of the multiprocessors that have a block, or the arithmetic.
/// What the kernel before has read may come from the L2 cache.
fn general_time(launch: &KernelLaunch, cached: bool, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let instantiation = &launch.instantiation;
    let busy = u64::from(launch.grid).min(u64::from(limits.multiprocessors));
    let Traffic { read, written, .. } = launch.traffic;
    let reading = read as f64 / if cached { costs.cache_speedup } else { 1.0 };
    let moving = (reading + written as f64) / rate(busy, limits, costs);
    let elements = (launch.tiling.outer * launch.tiling.stride) as f64;
    let threads = f64::from(THREADS_PER_MULTIPROCESSOR.max(launch.block()));
    let full = (threads / costs.threads_that_fill).min(1.0);
    let work = elements * arithmetic(instantiation.kernel) / costs.elements_rate / busy as f64 / full;
    let exchange = match instantiation.kernel {
        Kernel::Statistics | Kernel::BackwardReduce => costs.block_exchange,
        _ => 0.0,
    };
    costs.launch + costs.latency + exchange + moving.max(work)
}

/// What a kernel does with an element of x, in units of what a forward pass does: by the instructions of the compiled kernels
/// (21 of a forward pass in f16, 35 of a backward one).
fn arithmetic(kernel: Kernel) -> f64 {
    match kernel {
        Kernel::Statistics => 0.6,
        Kernel::Apply => 0.4,
        Kernel::BackwardReduce => 1.0,
        Kernel::BackwardApply => 0.65,
        Kernel::ResidentBackward => 1.65,
        _ => 1.0,
    }
}

/// Threads that share a multiprocessor where two blocks of 256 do, for which the general kernels are compiled.
const THREADS_PER_MULTIPROCESSOR: u32 = 512;

/// Memory moves while the chip works, if something else is there to be moved: another block of the multiprocessor, or the
/// next strip. Then the longer of both counts, and what a team does at its first strip; else all of it, strip by strip.
fn resident_time(launch: &KernelLaunch, resident: &Resident, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let tiling = &launch.tiling;
    let multiprocessors = u64::from(limits.multiprocessors);
    let grid = u64::from(launch.grid);
    let rounds = tiling.strips.div_ceil(grid / tiling.splits) as f64;
    let neighbours = grid.div_ceil(multiprocessors);
    let moving = launch.traffic.bytes() as f64 / rate(grid.min(multiprocessors), limits, costs);

    let blocks = tiling.splits as f64;
    let exchange = match resident.team {
        Team::Block => costs.block_exchange,
        Team::Cluster(_) => costs.cluster_exchange + blocks * costs.cluster_exchange_per_block,
        Team::Grid => costs.grid_exchange + blocks * costs.grid_exchange_per_block,
    };
    let threads = neighbours as f64 * f64::from(launch.block());
    let busy = (threads / costs.threads_that_fill).min(1.0);
    let work = chip_time(launch, resident, costs) * neighbours as f64 / busy;
    let agreeing = costs.latency + exchange;
    let cooperative = if resident.team == Team::Grid {
        costs.cooperative
    } else {
        0.0
    };
    let overlapped = rounds > 1.0 && (neighbours > 1 || resident.stages > 1);
    let strips = if overlapped {
        moving.max(rounds * (work + exchange)) + agreeing + work / 2.0
    } else {
        // While the results are applied, they are stored.
        moving + rounds * (agreeing + work / 2.0)
    };
    costs.launch + cooperative + strips
}

/// Nanoseconds that a block needs for the arithmetic of one strip, alone on its multiprocessor, if it had all the threads
/// that keep that busy.
fn chip_time(launch: &KernelLaunch, resident: &Resident, costs: &Costs) -> f64 {
    let (tiling, instantiation) = (&launch.tiling, &launch.instantiation);
    let held = match instantiation.kernel {
        Kernel::ResidentBackward => 2.0,
        _ => 1.0,
    };
    let vectors = (tiling.share * tiling.width) as f64;
    let elements = vectors * f64::from(instantiation.vector) * arithmetic(instantiation.kernel);
    // A vector is loaded from the chip twice; a thread that copies it spends a third instruction.
    let (accesses, starting) = if resident.bulk {
        (2.0, bulk_copies(launch) as f64 * costs.bulk_copy)
    } else {
        (3.0, 0.0)
    };
    elements / costs.elements_rate + held * vectors * accesses / costs.vectors_rate + starting
}

/// Bulk copies that a block starts for one strip and tensor: one for each row that its share touches.
fn bulk_copies(launch: &KernelLaunch) -> u64 {
    let tiling = &launch.tiling;
    match launch.instantiation.walk {
        Walk::Columns => tiling.share,
        Walk::Planes | Walk::PlanesWithEdges => tiling.share.div_ceil(tiling.slots) + 1,
    }
}
