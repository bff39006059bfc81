//! The devices that the stand-in presents: what the CUDA driver reports about real ones, and scaled-down ones.

/// What the driver reports about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// By which tests ask for it: see [`ordinal`].
    pub name: &'static str,
    /// What `cuDeviceGetName` says.
    pub device_name: &'static str,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Dynamic shared memory that a block may have without asking, in bytes.
    pub shared_per_block: u32,
    /// Dynamic shared memory that a block may have after asking, in bytes.
    pub shared_per_block_opt_in: u32,
    /// Shared memory of a multiprocessor, in bytes.
    pub shared_per_multiprocessor: u32,
    /// What the driver takes of it for each block, in bytes.
    pub shared_reserved_per_block: u32,
    /// Size of the L2 cache in bytes.
    pub l2_bytes: u32,
    /// Device memory in bytes.
    pub memory_bytes: usize,
    /// Registers of a multiprocessor, and the most that one block may have.
    pub registers: u32,
    /// Threads that a multiprocessor holds.
    pub threads_per_multiprocessor: u32,
    /// Blocks that a multiprocessor holds.
    pub blocks_per_multiprocessor: u32,
    /// Clock of the multiprocessors in kHz.
    pub clock_khz: u32,
    /// Clock of the memory in kHz; it moves data at both edges.
    pub memory_clock_khz: u32,
    /// Width of the memory bus in bits.
    pub memory_bus_bits: u32,
    /// Whether blocks can form clusters.
    pub clusters: bool,
    /// Largest x dimension of a grid.
    pub largest_grid: u32,
}

const H200: Profile = Profile {
    name: "h200",
    device_name: "NVIDIA H200",
    compute_capability: (9, 0),
    multiprocessors: 132,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 227 << 10,
    shared_per_multiprocessor: 228 << 10,
    shared_reserved_per_block: 1 << 10,
    l2_bytes: 60 << 20,
    memory_bytes: 143_156 << 20,
    registers: 64 << 10,
    threads_per_multiprocessor: 2048,
    blocks_per_multiprocessor: 32,
    clock_khz: 1_980_000,
    memory_clock_khz: 3_201_000,
    memory_bus_bits: 6144,
    clusters: true,
    largest_grid: i32::MAX as u32,
};

const T4: Profile = Profile {
    name: "t4",
    device_name: "Tesla T4",
    compute_capability: (7, 5),
    multiprocessors: 40,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 64 << 10,
    shared_per_multiprocessor: 64 << 10,
    shared_reserved_per_block: 0,
    l2_bytes: 4 << 20,
    memory_bytes: 15_843_721_216,
    registers: 64 << 10,
    threads_per_multiprocessor: 1024,
    blocks_per_multiprocessor: 16,
    clock_khz: 1_590_000,
    memory_clock_khz: 5_001_000,
    memory_bus_bits: 256,
    clusters: false,
    largest_grid: i32::MAX as u32,
};

const A100: Profile = Profile {
    name: "a100",
    device_name: "NVIDIA A100-SXM4-80GB",
    compute_capability: (8, 0),
    multiprocessors: 108,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 163 << 10,
    shared_per_multiprocessor: 164 << 10,
    shared_reserved_per_block: 1 << 10,
    l2_bytes: 40 << 20,
    memory_bytes: 81_251 << 20,
    registers: 64 << 10,
    threads_per_multiprocessor: 2048,
    blocks_per_multiprocessor: 32,
    clock_khz: 1_410_000,
    memory_clock_khz: 1_593_000,
    memory_bus_bits: 5120,
    clusters: false,
    largest_grid: i32::MAX as u32,
};

const RTX_4090: Profile = Profile {
    name: "rtx4090",
    device_name: "NVIDIA GeForce RTX 4090",
    compute_capability: (8, 9),
    multiprocessors: 128,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 99 << 10,
    shared_per_multiprocessor: 100 << 10,
    shared_reserved_per_block: 1 << 10,
    l2_bytes: 72 << 20,
    memory_bytes: 24_217 << 20,
    registers: 64 << 10,
    threads_per_multiprocessor: 1536,
    blocks_per_multiprocessor: 24,
    clock_khz: 2_520_000,
    memory_clock_khz: 10_501_000,
    memory_bus_bits: 384,
    clusters: false,
    largest_grid: i32::MAX as u32,
};

const B200: Profile = Profile {
    name: "b200",
    device_name: "NVIDIA B200",
    compute_capability: (10, 0),
    multiprocessors: 148,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 227 << 10,
    shared_per_multiprocessor: 228 << 10,
    shared_reserved_per_block: 1 << 10,
    l2_bytes: 132_644_864,
    memory_bytes: 182_642 << 20,
    registers: 64 << 10,
    threads_per_multiprocessor: 2048,
    blocks_per_multiprocessor: 32,
    clock_khz: 1_965_000,
    memory_clock_khz: 3_996_000,
    memory_bus_bits: 7680,
    clusters: true,
    largest_grid: i32::MAX as u32,
};

/// An H200 in small: what a large tensor does to the real one, a tensor of some kilobytes does to this.
const SMALL_90: Profile = Profile {
    name: "small-90",
    device_name: "Stand-in small-90",
    multiprocessors: 4,
    shared_per_block: 8 << 10,
    shared_per_block_opt_in: 8 << 10,
    shared_per_multiprocessor: 18 << 10,
    l2_bytes: 64 << 10,
    ..H200
};

/// A B200 in small, with room on chip for every walk of the resident kernels.
const SMALL_100: Profile = Profile {
    name: "small-100",
    device_name: "Stand-in small-100",
    multiprocessors: 3,
    shared_per_block: 32 << 10,
    shared_per_block_opt_in: 32 << 10,
    shared_per_multiprocessor: 66 << 10,
    l2_bytes: 96 << 10,
    ..B200
};

/// The same, of which other programs have taken nearly all registers: fewer blocks run at a time than its limits promise.
const SMALL_CROWDED: Profile = Profile {
    name: "small-crowded",
    device_name: "Stand-in small-crowded",
    registers: 8 << 10,
    ..SMALL_100
};

/// A T4 in small.
const SMALL_75: Profile = Profile {
    name: "small-75",
    device_name: "Stand-in small-75",
    multiprocessors: 2,
    shared_per_block: 8 << 10,
    shared_per_block_opt_in: 8 << 10,
    shared_per_multiprocessor: 16 << 10,
    l2_bytes: 32 << 10,
    ..T4
};

/// The same with next to no grid, so that a block takes one task after another.
const SMALL_GRID: Profile = Profile {
    name: "small-grid",
    device_name: "Stand-in small-grid",
    largest_grid: 3,
    ..SMALL_75
};

/// A device for which NVRTC 13 makes no code any more.
const TOO_OLD: Profile = Profile {
    name: "too-old",
    device_name: "NVIDIA GeForce GTX 1080 Ti",
    compute_capability: (6, 1),
    multiprocessors: 28,
    shared_per_block: 48 << 10,
    shared_per_block_opt_in: 48 << 10,
    shared_per_multiprocessor: 96 << 10,
    shared_reserved_per_block: 0,
    l2_bytes: 2816 << 10,
    memory_bytes: 11_178 << 20,
    registers: 64 << 10,
    threads_per_multiprocessor: 2048,
    blocks_per_multiprocessor: 32,
    clock_khz: 1_582_000,
    memory_clock_khz: 5_505_000,
    memory_bus_bits: 352,
    clusters: false,
    largest_grid: i32::MAX as u32,
};

/// The devices in the order of their ordinals.
pub const PROFILES: [Profile; 11] = [
    H200,
    T4,
    A100,
    RTX_4090,
    B200,
    SMALL_90,
    SMALL_100,
    SMALL_CROWDED,
    SMALL_75,
    SMALL_GRID,
    TOO_OLD,
];

/// The ordinal under which the stand-in presents the device of this name, for `CudaContext::new`.
///
/// # Panics
///
/// If no profile has the name.
pub fn ordinal(name: &str) -> usize {
    PROFILES
        .iter()
        .position(|profile| profile.name == name)
        .unwrap_or_else(|| panic!("there is no device profile named {name}"))
}

impl Profile {
    /// The profile of the device with this ordinal.
    ///
    /// # Panics
    ///
    /// If there is no such device.
    pub fn at(ordinal: usize) -> &'static Profile {
        static ALL: [Profile; PROFILES.len()] = PROFILES;
        &ALL[ordinal]
    }

    /// What `cuDeviceGetAttribute` answers, as pairs of `CUdevice_attribute` and value; all others are 0.
    pub fn attributes(&self) -> Vec<(i32, i32)> {
        let number = |value: u32| i32::try_from(value).expect("an attribute is an int");
        vec![
            (1, 1024),                      // MAX_THREADS_PER_BLOCK
            (2, 1024),                      // MAX_BLOCK_DIM_X
            (3, 1024),                      // MAX_BLOCK_DIM_Y
            (4, 64),                        // MAX_BLOCK_DIM_Z
            (5, number(self.largest_grid)), // MAX_GRID_DIM_X
            (6, 65535),                     // MAX_GRID_DIM_Y
            (7, 65535),                     // MAX_GRID_DIM_Z
            (8, number(self.shared_per_block)),
            (9, 64 << 10),  // TOTAL_CONSTANT_MEMORY
            (10, 32),       // WARP_SIZE
            (11, i32::MAX), // MAX_PITCH
            (12, number(self.registers)),
            (13, number(self.clock_khz)),
            (14, 512), // TEXTURE_ALIGNMENT
            (15, 1),   // GPU_OVERLAP
            (16, number(self.multiprocessors)),
            (19, 1), // CAN_MAP_HOST_MEMORY
            (31, 1), // CONCURRENT_KERNELS
            (36, number(self.memory_clock_khz)),
            (37, number(self.memory_bus_bits)),
            (38, number(self.l2_bytes)),
            (39, number(self.threads_per_multiprocessor)),
            (40, 2), // ASYNC_ENGINE_COUNT
            (41, 1), // UNIFIED_ADDRESSING
            (75, number(self.compute_capability.0)),
            (76, number(self.compute_capability.1)),
            (78, 1), // STREAM_PRIORITIES_SUPPORTED
            (79, 1), // GLOBAL_L1_CACHE_SUPPORTED
            (80, 1), // LOCAL_L1_CACHE_SUPPORTED
            (81, number(self.shared_per_multiprocessor)),
            (82, number(self.registers)),
            (83, 1), // MANAGED_MEMORY
            (95, 1), // COOPERATIVE_LAUNCH
            (97, number(self.shared_per_block_opt_in)),
            (106, number(self.blocks_per_multiprocessor)),
            (111, number(self.shared_reserved_per_block)),
            (115, 1), // MEMORY_POOLS_SUPPORTED
            (120, i32::from(self.clusters)),
        ]
    }
}
