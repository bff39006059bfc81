//! Every number that was chosen and not derived: what plans try, and what they believe things to cost. Plain data.
//!
//! The costs were fitted by `examples/tune.rs` to what a sweep over 47 passes took on an NVIDIA H200
//! (`benches/results/h200-sweep.json`): by them these passes take 3.9 % longer, in the mean, than by the fastest ways of that
//! sweep, and 37 % at most. Modelled times are off by about 20 % in the mean. These are the passes that they were fitted to: no
//! others were held against them, and no other device. Two are not the fit's: `multiprocessor_rate` (3578) and `cached_part`
//! (1.43) came out as what no chip does, and were set by hand to what one can at most; all were rounded.

// ---- the general path: one kernel reads, another one reads again -----------------------------------------------------

/// Block sizes, preferred first.
pub(super) const BLOCK_SIZES: [u64; 4] = [256, 128, 64, 32];

/// Planes of fewer vectors than this do not pay for reading their ends lane by lane.
pub(super) const SHORTEST_PLANE_WITH_EDGES: u64 = 8;

/// A strip of columns is about this many vectors wide: 256 bytes of every row. Wider strips would have more of their
/// per-channel numbers read per task, narrower ones would break up what lies together in memory.
pub(super) const COLUMN_VECTORS: u64 = 16;

/// The same where a kernel reduces: the last block of a strip joins the results of all others for all its channels, which
/// the strips do side by side.
pub(super) const REDUCED_COLUMN_VECTORS: u64 = 8;

/// Vectors that a thread has under way at a time, per tensor that a kernel reads.
pub(super) const VECTORS_IN_FLIGHT: u64 = 4;

/// Tasks per multiprocessor that keep memory busy until the last one ends.
pub(super) const TASKS_PER_MULTIPROCESSOR: u64 = 8;

/// The same where a kernel reduces: each task leaves a result that the last one must join.
pub(super) const REDUCED_TASKS_PER_MULTIPROCESSOR: u64 = 4;

/// Vectors that every thread of a task takes of each tensor, at least: with fewer, what a task reads per channel would be
/// no small part of its work.
pub(super) const VECTORS_PER_TASK: u64 = 8;

// ---- the resident path: what is tried ----------------------------------------------------------------------------------

/// Block sizes.
pub(super) const RESIDENT_BLOCK_SIZES: [u64; 3] = [256, 512, 1024];

/// Threads per multiprocessor that a resident kernel is compiled for, so 64 registers for each, along whole planes; and so
/// 128 registers where each lane has numbers of its own, or vectors stick out of a plane.
pub(super) const RESIDENT_THREADS_PLANES: u64 = 1024;
/// See [`RESIDENT_THREADS_PLANES`].
pub(super) const RESIDENT_THREADS_OTHERS: u64 = 512;

/// Blocks of a cluster.
pub(super) const CLUSTER_SIZES: [u32; 4] = [2, 4, 8, 16];

/// Teams that a cooperative launch is cut into, beside as many as fit.
pub(super) const GRID_TEAMS: [u64; 5] = [1, 2, 4, 8, 16];

/// Widths of a strip of columns, in vectors: 64 and 128 bytes of every pixel in NHWC.
pub(super) const RESIDENT_COLUMN_VECTORS: [u64; 2] = [4, 8];

/// Bytes of a vector.
pub(super) const RESIDENT_VECTOR_BYTES: [u64; 2] = [16, 8];

// ---- what things cost, in nanoseconds and bytes ------------------------------------------------------------------------

/// What a modelled time is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// From one launch of a stream to the next, in nanoseconds.
    pub launch: f64,
    /// What a cooperative launch costs beyond that.
    pub cooperative: f64,
    /// The part of the memory's bandwidth that a copy reaches.
    pub efficiency: f64,
    /// Bytes per nanosecond that one multiprocessor moves at most, between memory and chip.
    pub multiprocessor_rate: f64,
    /// From the request for memory to its arrival.
    pub latency: f64,
    /// Agreeing on a strip's result: in a block, beside what each of its warps adds.
    pub block_exchange: f64,
    /// In a block, for each warp whose threads' results are joined.
    pub block_exchange_per_warp: f64,
    /// In a cluster, beside what each of its blocks adds.
    pub cluster_exchange: f64,
    /// In a cluster, for each block that is waited for and joined.
    pub cluster_exchange_per_block: f64,
    /// In a grid team, beside what each of its blocks adds.
    pub grid_exchange: f64,
    /// In a grid team, for each block that counts itself in and is joined.
    pub grid_exchange_per_block: f64,
    /// Starting one bulk copy, in nanoseconds.
    pub bulk_copy: f64,
    /// Elements that one multiprocessor takes through statistics and application in a nanosecond.
    pub elements_rate: f64,
    /// Vectors that it moves between its shared memory and registers in a nanosecond.
    pub vectors_rate: f64,
    /// Threads that keep it busy.
    pub threads_that_fill: f64,
    /// The part of the L2 cache that still holds what a kernel has read when the next one reads it again.
    pub cached_part: f64,
    /// How much faster than memory the L2 cache serves that.
    pub cache_speedup: f64,
    /// How far a strip's copies, arithmetic and stores run beside those of the next one, from 0 to 1: with a second buffer,
    /// or other blocks of the multiprocessor.
    pub overlap: f64,
}

impl Costs {
    /// How many there are.
    pub const COUNT: usize = 18;

    /// All of them, to be changed one by one.
    pub fn values_mut(&mut self) -> [&mut f64; Self::COUNT] {
        [
            &mut self.launch,
            &mut self.cooperative,
            &mut self.efficiency,
            &mut self.multiprocessor_rate,
            &mut self.latency,
            &mut self.block_exchange,
            &mut self.block_exchange_per_warp,
            &mut self.cluster_exchange,
            &mut self.cluster_exchange_per_block,
            &mut self.grid_exchange,
            &mut self.grid_exchange_per_block,
            &mut self.bulk_copy,
            &mut self.elements_rate,
            &mut self.vectors_rate,
            &mut self.threads_that_fill,
            &mut self.cached_part,
            &mut self.cache_speedup,
            &mut self.overlap,
        ]
    }
}

impl Default for Costs {
    /// Those that plans go by.
    fn default() -> Self {
        COSTS
    }
}

/// The costs that plans go by.
pub(super) const COSTS: Costs = Costs {
    launch: 3040.0,
    cooperative: 5870.0,
    efficiency: 0.775,
    multiprocessor_rate: 126.0,
    latency: 907.0,
    block_exchange: 488.0,
    block_exchange_per_warp: 74.0,
    cluster_exchange: 2980.0,
    cluster_exchange_per_block: 99.0,
    grid_exchange: 3370.0,
    grid_exchange_per_block: 22.4,
    bulk_copy: 4.4,
    elements_rate: 30.0,
    vectors_rate: 21.8,
    threads_that_fill: 729.0,
    cached_part: 1.0,
    cache_speedup: 1.67,
    overlap: 0.32,
};
