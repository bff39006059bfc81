//! How long a launch is believed to take: a few lines of arithmetic over the costs of `tuning.rs`. By this plans are
//! compared. A modelled time is no measurement.

use super::kernel::Kernel;
use super::limits::DeviceLimits;
use super::plan::{KernelLaunch, Traffic};
use super::resident::{Resident, Team};
use super::tiling::Walk;
use super::tuning::Costs;

/// Nanoseconds for the launches of a plan, in order.
pub(super) fn modelled_time(kernels: &[KernelLaunch], tensor_bytes: u64, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let cached = tensor_bytes <= limits.l2_cache / 2;
    kernels
        .iter()
        .enumerate()
        .map(|(position, launch)| match &launch.instantiation.resident {
            Some(resident) => resident_time(launch, resident, limits, costs),
            None => general_time(launch, position > 0 && cached, limits, costs),
        })
        .sum()
}

/// Bytes per nanosecond between memory and `multiprocessors` of the chip.
fn rate(multiprocessors: u64, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let memory = limits.memory_bandwidth as f64 * 1e-9 * costs.efficiency;
    memory.min(multiprocessors as f64 * costs.multiprocessor_rate)
}

/// Launch, latency, and the bytes at the rate of the multiprocessors that have a block. What the kernel before has read
/// may come from the L2 cache.
fn general_time(launch: &KernelLaunch, reads_again: bool, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let busy = u64::from(launch.grid).min(u64::from(limits.multiprocessors));
    let rate = rate(busy, limits, costs);
    let Traffic { read, written, .. } = launch.traffic;
    let reading = read as f64 / if reads_again { costs.cache_speedup } else { 1.0 };
    let exchange = match launch.instantiation.kernel {
        Kernel::Statistics | Kernel::BackwardReduce => costs.block_exchange,
        _ => 0.0,
    };
    costs.launch + costs.latency + exchange + (reading + written as f64) / rate
}

/// As above; and what a team does while it moves nothing. That is hidden where other blocks of the multiprocessor, or the
/// copies of the next strip, move something meanwhile, all but once.
fn resident_time(launch: &KernelLaunch, resident: &Resident, limits: &DeviceLimits, costs: &Costs) -> f64 {
    let tiling = &launch.tiling;
    let multiprocessors = u64::from(limits.multiprocessors);
    let grid = u64::from(launch.grid);
    let teams = grid / tiling.splits;
    let rounds = tiling.strips.div_ceil(teams);
    let neighbours = grid.div_ceil(multiprocessors);
    let rate = rate(grid.min(multiprocessors), limits, costs);

    let exchange = match resident.team {
        Team::Block => costs.block_exchange,
        Team::Cluster(_) => costs.cluster_exchange,
        Team::Grid => costs.grid_exchange,
    };
    // Once for the statistics and once to apply them, for all blocks of a multiprocessor.
    let on_chip =
        2.0 * f64::from(launch.shared_bytes) / f64::from(resident.stages) * neighbours as f64 / costs.chip_rate;
    let starting = if resident.bulk {
        bulk_copies(launch) as f64 * costs.bulk_copy
    } else {
        0.0
    };
    let idle = costs.latency + exchange + on_chip;
    let hidden = neighbours > 1 || resident.stages > 1;
    let exposed = if hidden { 1 } else { rounds };
    let cooperative = if resident.team == Team::Grid {
        costs.cooperative
    } else {
        0.0
    };
    let moving = launch.traffic.bytes() as f64 / rate;
    costs.launch + cooperative + moving.max(rounds as f64 * starting) + exposed as f64 * idle
}

/// Bulk copies that a block starts for one strip and tensor: one for each row that its share touches.
fn bulk_copies(launch: &KernelLaunch) -> u64 {
    let tiling = &launch.tiling;
    match launch.instantiation.walk {
        Walk::Columns => tiling.share,
        Walk::Planes | Walk::PlanesWithEdges => tiling.share.div_ceil(tiling.slots) + 1,
    }
}
