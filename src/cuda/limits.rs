//! What a device can do, as far as plans depend on it: read from a device, or known of one that is not there.

/// Limits of a CUDA device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceLimits {
    /// The device's name.
    pub name: String,
    /// Compute capability times ten: 90 for 9.0.
    pub architecture: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Threads that one multiprocessor holds at a time.
    pub threads_per_multiprocessor: u32,
    /// Bytes of shared memory that one block may use, the opt-in beyond 48 KiB included.
    pub shared_memory_per_block: u32,
    /// Bytes of shared memory that the blocks of one multiprocessor share.
    pub shared_memory_per_multiprocessor: u32,
    /// Bytes of it that the driver takes for each block.
    pub shared_memory_reserved_per_block: u32,
    /// Blocks that one multiprocessor holds at a time.
    pub blocks_per_multiprocessor: u32,
    /// Blocks that a cluster may have at most; 1 where there are no clusters.
    pub largest_cluster: u32,
    /// Whether all blocks of a launch can be made to run at the same time, so that they may wait for each other.
    pub cooperative_launch: bool,
    /// Bytes per second between the memory and the chip, at the memory's highest clock.
    pub memory_bandwidth: u64,
    /// Bytes of the L2 cache.
    pub l2_cache: u64,
    /// Largest x dimension of a grid.
    pub grid: u32,
}

impl DeviceLimits {
    /// Names that [`DeviceLimits::named`] knows.
    pub const NAMES: [&'static str; 5] = ["t4", "a100", "rtx4090", "h200", "b200"];

    /// A well-known device, from its maker's data sheet and the CUDA C++ Programming Guide's table of compute
    /// capabilities.
    pub fn named(name: &str) -> Option<Self> {
        let (architecture, multiprocessors, threads_per_multiprocessor, blocks_per_multiprocessor) = match name {
            "t4" => (75, 40, 1024, 16),
            "a100" => (80, 108, 2048, 32),
            "rtx4090" => (89, 128, 1536, 24),
            "h200" => (90, 132, 2048, 32),
            "b200" => (100, 148, 2048, 32),
            _ => return None,
        };
        let (shared_kib, reserved_kib, l2_cache, memory_bandwidth) = match name {
            "t4" => (64, 0, 4 << 20, 320_064_000_000),
            "a100" => (163, 1, 40 << 20, 2_039_040_000_000),
            "rtx4090" => (99, 1, 72 << 20, 1_008_096_000_000),
            "h200" => (227, 1, 60 << 20, 4_916_736_000_000),
            _ => (227, 1, 126 << 20, 7_672_320_000_000),
        };
        Some(Self {
            name: name.to_owned(),
            architecture,
            multiprocessors,
            threads_per_multiprocessor,
            shared_memory_per_block: shared_kib << 10,
            shared_memory_per_multiprocessor: (shared_kib + reserved_kib) << 10,
            shared_memory_reserved_per_block: reserved_kib << 10,
            blocks_per_multiprocessor,
            largest_cluster: largest_cluster(architecture, architecture >= 90),
            cooperative_launch: true,
            memory_bandwidth,
            l2_cache,
            grid: i32::MAX as u32,
        })
    }
}

/// Blocks of the largest cluster. Every device with clusters allows 8; the large chips, whose groups of multiprocessors
/// are larger, allow 16 to a kernel that says it does not have to run elsewhere.
pub(super) const fn largest_cluster(architecture: u32, clusters: bool) -> u32 {
    match architecture {
        _ if !clusters => 1,
        90 | 100 | 103 => 16,
        _ => 8,
    }
}
