//! How long a launch is believed to take: a few lines of arithmetic over the costs of `tuning.rs`. By this plans are
//! compared. A modelled time is no measurement.

use super::kernel::Kernel;
use super::limits::DeviceLimits;
use super::plan::{KernelLaunch, Traffic};
use super::resident::{Resident, Team};
use super::tiling::{WARP, Walk};
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

/// Launch, latency, agreeing on sums, and what takes longer: the bytes at the rate of the multiprocessors that have a block, or
/// the arithmetic.
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
        Kernel::Statistics | Kernel::BackwardReduce if launch.tiling.splits > 1 => {
            block_exchange(launch, costs) + grid_exchange(launch, costs)
        }
        Kernel::Statistics | Kernel::BackwardReduce => block_exchange(launch, costs),
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

/// Strip by strip: values come, statistics are found, the team agrees, results are applied and stored while they are found.
/// With a second buffer, or another block on the multiprocessor, a part of this happens beside the strip before.
fn resident_time(launch: &KernelLaunch, resident: &Resident, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let tiling = &launch.tiling;
    let multiprocessors = u64::from(limits.multiprocessors);
    let grid = u64::from(launch.grid);
    let rounds = tiling.strips.div_ceil(grid / tiling.splits) as f64;
    let neighbours = grid.div_ceil(multiprocessors);
    let per_round = 1.0 / rate(grid.min(multiprocessors), limits, costs) / rounds;
    let loading = launch.traffic.read as f64 * per_round;
    let storing = launch.traffic.written as f64 * per_round;

    let (cooperative, exchange) = match resident.team {
        Team::Block => (0.0, 0.0),
        Team::Cluster(blocks) => (
            0.0,
            costs.cluster_exchange + f64::from(blocks) * costs.cluster_exchange_per_block,
        ),
        Team::Grid => (costs.cooperative, grid_exchange(launch, costs)),
    };
    let agreeing = block_exchange(launch, costs) + exchange;
    let threads = neighbours as f64 * f64::from(launch.block());
    let busy = (threads / costs.threads_that_fill).min(1.0);
    let work = chip_time(launch, resident, costs) * neighbours as f64 / busy;
    let (finding, applying) = (work * FINDING, work * (1.0 - FINDING));

    let alone = costs.latency + loading + finding + agreeing + storing.max(applying);
    let together = (loading + storing).max(work) + agreeing;
    let overlap = if neighbours > 1 || resident.stages > 1 {
        costs.overlap
    } else {
        0.0
    };
    costs.launch + cooperative + alone + (rounds - 1.0) * (alone + (together - alone).min(0.0) * overlap)
}

/// The part of the arithmetic of a strip that comes before its result.
const FINDING: f64 = 0.55;

/// What the threads of a block need to agree: along planes one warp joins the results of all.
fn block_exchange(launch: &KernelLaunch, costs: &Costs) -> f64 {
    costs.block_exchange + f64::from(launch.block()) / WARP as f64 * costs.block_exchange_per_warp
}

/// What blocks need to agree through global memory.
fn grid_exchange(launch: &KernelLaunch, costs: &Costs) -> f64 {
    costs.grid_exchange + launch.tiling.splits as f64 * costs.grid_exchange_per_block
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
