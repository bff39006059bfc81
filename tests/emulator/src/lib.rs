//! A stand-in for the CUDA driver and for NVRTC: this project's kernel sources run on the CPU, on a machine without a
//! GPU, with `cudarc`'s calls unmodified.
//!
//! [`install`] loads two libraries, `libcuda` and `libnvrtc`, before `cudarc` looks for them; from then on the
//! process has one device for each of the [`PROFILES`], and a test picks its device by its ordinal:
//!
//! ```no_run
//! emulator::install();
//! // CudaContext::new(emulator::ordinal("small-90"))
//! ```
//!
//! Work is done in the thread that calls, at once. Every access of a kernel to memory is checked: its bounds, whether it
//! loads what nobody wrote, and whether something orders it after those accesses of other threads that it must not meet.
//! What a kernel does wrong makes its launch fail, and [`last_fault`] tells what it was. Beside CUDA's own interface, the functions here
//! tell what was launched ([`launches`]), what was called ([`thread_calls`]) and what is allocated ([`live_memory`]),
//! let a call fail ([`inject_fault`]), and set what a real machine would fix.
//!
//! Handles are passed as the raw pointers that `cudarc` gives (`CudaStream::cu_stream`, `CudaContext::cu_ctx`). The
//! null stream is that of the calling thread's current context. As all tests of a process share the context of a
//! device and its null stream, that stream's launches and calls are kept for each thread apart; a test that counts
//! what belongs to a context makes its own by [`create_context`].
//!
//! It is for Linux. Elsewhere the crate compiles, and [`install`] panics.

#![deny(missing_docs)]

mod library;
mod profiles;

pub use library::{
    Calls, Launch, LiveMemory, SourcePatches, WatchedCalls, context_calls, create_context, driver_version,
    inject_fault, install, install_nccl, last_fault, launches, live_memory, nvrtc_version, patch_sources,
    set_driver_version, set_empty_launches, set_memory_limit, set_no_device, set_nvrtc_version, set_schedule,
    stream_calls, thread_calls, use_portable_fibers, watch_calls,
};
pub use profiles::{PROFILES, Profile, ordinal};

/// Whether the stand-in works on this system.
pub const SUPPORTED: bool = cfg!(target_os = "linux");

/// The folder of the stand-in's libraries, for a process that is to find only some of them.
#[cfg(target_os = "linux")]
pub const LIBRARIES: &str = env!("EMULATOR_LIBRARIES");

/// Changes when kernels must be compiled anew although their source is the same: when the stand-in itself has changed.
/// Whoever keeps its images from one run to the next keeps them under this name.
pub const FINGERPRINT: &str = env!("EMULATOR_FINGERPRINT");
