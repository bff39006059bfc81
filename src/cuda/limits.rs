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
        let (architecture, multiprocessors, threads_per_multiprocessor, shared_kib, l2_cache) = match name {
            "t4" => (75, 40, 1024, 64, 4 << 20),
            "a100" => (80, 108, 2048, 163, 40 << 20),
            "rtx4090" => (89, 128, 1536, 99, 72 << 20),
            "h200" => (90, 132, 2048, 227, 60 << 20),
            "b200" => (100, 148, 2048, 227, 126 << 20),
            _ => return None,
        };
        Some(Self {
            name: name.to_owned(),
            architecture,
            multiprocessors,
            threads_per_multiprocessor,
            shared_memory_per_block: shared_kib << 10,
            l2_cache,
            grid: i32::MAX as u32,
        })
    }
}
