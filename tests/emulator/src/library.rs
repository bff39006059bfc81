//! The stand-in libraries from Rust's side: loading them, and calling what they export beside CUDA's interface.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// What a stream, a context or a thread was asked to do, by kind. Calls are counted when they are made, also those
/// that a capture only notes or that fail later on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Calls {
    /// Allocations of device memory.
    pub allocations: u64,
    /// Releases of device memory.
    pub frees: u64,
    /// Waiting for a stream, an event or the context.
    pub synchronizations: u64,
    /// Copies between host and device.
    pub host_copies: u64,
    /// Copies within device memory.
    pub device_copies: u64,
    /// Filling of device memory.
    pub memsets: u64,
    /// Recording of events, and streams made to wait for one.
    pub events: u64,
    /// Loading of modules.
    pub module_loads: u64,
    /// Kernel launches, without those refused and those that [`set_empty_launches`] left out.
    pub launches: u64,
}

impl std::ops::Sub for Calls {
    type Output = Calls;

    fn sub(self, before: Calls) -> Calls {
        Calls {
            allocations: self.allocations - before.allocations,
            frees: self.frees - before.frees,
            synchronizations: self.synchronizations - before.synchronizations,
            host_copies: self.host_copies - before.host_copies,
            device_copies: self.device_copies - before.device_copies,
            memsets: self.memsets - before.memsets,
            events: self.events - before.events,
            module_loads: self.module_loads - before.module_loads,
            launches: self.launches - before.launches,
        }
    }
}

/// A kernel launch that ran to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel.
    pub kernel: String,
    /// Blocks of the grid along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster along x, y, z; 1 where there are no clusters.
    pub cluster: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// Whether the launch was cooperative.
    pub cooperative: bool,
    /// Bytes of global memory that the kernel loaded, each as often as it was asked for.
    pub bytes_loaded: u64,
    /// Bytes of global memory that the kernel stored.
    pub bytes_stored: u64,
    /// Sectors of 32 bytes that the warps' loads touched, each as often as a warp loaded from it. Accesses of the lanes of
    /// a warp are one access where they are the same instruction; so this over `bytes_loaded / 32` tells how well they
    /// coalesce. Not counted under a random schedule ([`set_schedule`]).
    pub sectors_loaded: u64,
    /// The same of stores.
    pub sectors_stored: u64,
}

/// Device memory that a context has allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveMemory {
    /// Number of allocations.
    pub allocations: usize,
    /// Their bytes, as asked for.
    pub bytes: usize,
}

#[repr(C)]
struct LaunchView {
    kernel: *const c_char,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    shared_bytes: u32,
    cooperative: u32,
    bytes_loaded: u64,
    bytes_stored: u64,
    sectors_loaded: u64,
    sectors_stored: u64,
}

/// What both libraries export beside CUDA's interface. Handles travel as integers: the driver looks them up, so that a
/// wrong one is an error.
struct Library {
    set_driver_version: unsafe extern "C" fn(c_int),
    driver_version: unsafe extern "C" fn() -> c_int,
    set_no_device: unsafe extern "C" fn(bool),
    use_portable_fibers: unsafe extern "C" fn(bool),
    take_launches: unsafe extern "C" fn(usize, extern "C" fn(*const LaunchView, *mut c_void), *mut c_void) -> c_uint,
    stream_calls: unsafe extern "C" fn(usize, *mut Calls) -> c_uint,
    context_calls: unsafe extern "C" fn(usize, *mut Calls) -> c_uint,
    thread_calls: unsafe extern "C" fn(*mut Calls),
    live_memory: unsafe extern "C" fn(usize, *mut usize, *mut usize) -> c_uint,
    set_memory_limit: unsafe extern "C" fn(usize, usize) -> c_uint,
    set_empty_launches: unsafe extern "C" fn(usize, bool) -> c_uint,
    take_fault: unsafe extern "C" fn(extern "C" fn(*const c_char, *mut c_void), *mut c_void),
    set_schedule: unsafe extern "C" fn(bool, u64),
    watch_calls: unsafe extern "C" fn(u64, c_uint),
    end_watching: unsafe extern "C" fn(extern "C" fn(*const c_char, *mut c_void), *mut c_void),
    add_patch: unsafe extern "C" fn(*const c_char, *const c_char),
    clear_patches: unsafe extern "C" fn() -> usize,
    initialise: unsafe extern "C" fn(c_uint) -> c_uint,
    create_context: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, c_uint, c_int) -> c_uint,
    set_nvrtc_version: unsafe extern "C" fn(c_int, c_int),
    nvrtc_version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_uint,
}

#[cfg(target_os = "linux")]
mod loading {
    use super::*;
    use crate::profiles::PROFILES;
    use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};

    fn open(name: &str) -> Handle {
        let path = format!("{}/{name}", env!("EMULATOR_LIBRARIES"));
        // SAFETY: the library is ours; its initialisers only construct its own tables.
        unsafe { Handle::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }
            .unwrap_or_else(|error| panic!("cannot load the stand-in library {path}: {error}"))
    }

    /// # Safety
    ///
    /// `F` is the type of the function that the library exports under this name.
    unsafe fn symbol<F: Copy>(library: &Handle, name: &str) -> F {
        // SAFETY: as the caller promises.
        *unsafe { library.get::<F>(name.as_bytes()) }
            .unwrap_or_else(|error| panic!("the stand-in library lacks {name}: {error}"))
    }

    pub(super) fn load() -> Library {
        // Kernels find the driver's functions in the global scope; the other names are libraries that refer to the
        // first.
        let driver = open("libcuda.so");
        let nvrtc = open("libnvrtc.so");
        for alias in ["libcuda.so.1", "libnvrtc.so.13", "libnvrtc.so.12"] {
            std::mem::forget(open(alias));
        }
        // SAFETY: the types are those of driver/control.cpp, driver/driver.cpp and driver/nvrtc.cpp.
        unsafe {
            configure(&driver, &nvrtc);
            let library = Library {
                set_driver_version: symbol(&driver, "stand_in_set_driver_version"),
                driver_version: symbol(&driver, "stand_in_driver_version"),
                set_no_device: symbol(&driver, "stand_in_set_no_device"),
                use_portable_fibers: symbol(&driver, "stand_in_use_portable_fibers"),
                take_launches: symbol(&driver, "stand_in_take_launches"),
                stream_calls: symbol(&driver, "stand_in_stream_calls"),
                context_calls: symbol(&driver, "stand_in_context_calls"),
                thread_calls: symbol(&driver, "stand_in_thread_calls"),
                live_memory: symbol(&driver, "stand_in_live_memory"),
                set_memory_limit: symbol(&driver, "stand_in_set_memory_limit"),
                set_empty_launches: symbol(&driver, "stand_in_set_empty_launches"),
                take_fault: symbol(&driver, "stand_in_take_fault"),
                set_schedule: symbol(&driver, "stand_in_set_schedule"),
                watch_calls: symbol(&driver, "stand_in_watch_calls"),
                end_watching: symbol(&driver, "stand_in_end_watching"),
                add_patch: symbol(&nvrtc, "stand_in_add_patch"),
                clear_patches: symbol(&nvrtc, "stand_in_clear_patches"),
                initialise: symbol(&driver, "cuInit"),
                create_context: symbol(&driver, "cuCtxCreate_v4"),
                set_nvrtc_version: symbol(&nvrtc, "stand_in_set_nvrtc_version"),
                nvrtc_version: symbol(&nvrtc, "nvrtcVersion"),
            };
            // They stay loaded for good: that is what makes the loader answer for their names.
            std::mem::forget((driver, nvrtc));
            library
        }
    }

    pub(super) fn load_nccl() {
        std::mem::forget(open("libnccl.so"));
    }

    /// # Safety
    ///
    /// The libraries are the stand-ins, and nobody uses them yet.
    unsafe fn configure(driver: &Handle, nvrtc: &Handle) {
        type AddDevice = unsafe extern "C" fn(*const c_char, usize, *const [c_int; 2], usize);
        type Configure = unsafe extern "C" fn(*const c_char, *const c_char);
        let text = |text: &str| CString::new(text).expect("no zero inside");
        // SAFETY: the types are those of driver/control.cpp and driver/nvrtc.cpp.
        let (add_device, configure) = unsafe {
            (
                symbol::<AddDevice>(driver, "stand_in_add_device"),
                symbol::<Configure>(nvrtc, "stand_in_nvrtc_configure"),
            )
        };
        for profile in &PROFILES {
            let attributes: Vec<[c_int; 2]> = profile
                .attributes()
                .into_iter()
                .map(|(attribute, value)| [attribute, value])
                .collect();
            let name = text(profile.device_name);
            // SAFETY: name and attributes live during the call, which copies them; a pair is two ints in a row.
            unsafe {
                add_device(
                    name.as_ptr(),
                    profile.memory_bytes,
                    attributes.as_ptr(),
                    attributes.len(),
                )
            };
        }
        let cache = text(env!("EMULATOR_CACHE"));
        let include = text(env!("EMULATOR_INCLUDE"));
        // SAFETY: both texts live during the call, which copies them.
        unsafe { configure(cache.as_ptr(), include.as_ptr()) };
    }
}

#[cfg(not(target_os = "linux"))]
mod loading {
    pub(super) fn load_nccl() {}

    pub(super) fn load() -> super::Library {
        panic!("the stand-in driver is for Linux; on this system use a real one")
    }
}

static LIBRARY: OnceLock<Library> = OnceLock::new();

fn library() -> &'static Library {
    LIBRARY.get_or_init(loading::load)
}

/// Makes this process use the stand-in driver and the stand-in NVRTC, whatever else is installed.
///
/// To be called before the first call of `cudarc`; further calls, from any thread, do nothing.
///
/// # Panics
///
/// On systems other than Linux, and if the libraries cannot be loaded.
pub fn install() {
    library();
}

/// [`install`], and a stand-in for NCCL too, between ranks that are threads of this process.
///
/// To be called before the first call of `cudarc`; further calls, from any thread, do nothing.
///
/// # Panics
///
/// As [`install`].
pub fn install_nccl() {
    static NCCL: OnceLock<()> = OnceLock::new();
    install();
    NCCL.get_or_init(loading::load_nccl);
}

fn check(what: &str, status: c_uint) {
    assert_eq!(status, 0, "{what}: not a live handle");
}

/// The launches on this stream since the last call, oldest first: of the last 65 536 at most.
///
/// # Panics
///
/// If the handle is no stream, or null where the thread has no context.
pub fn launches<S>(stream: *mut S) -> Vec<Launch> {
    extern "C" fn each(view: *const LaunchView, list: *mut c_void) {
        // SAFETY: the driver passes a launch that lives during this call, and back what was passed to it below.
        let (view, list) = unsafe { (&*view, &mut *list.cast::<Vec<Launch>>()) };
        // SAFETY: the name is a C string that lives as long as the launch.
        let kernel = unsafe { CStr::from_ptr(view.kernel) };
        list.push(Launch {
            kernel: kernel.to_string_lossy().into_owned(),
            grid: view.grid,
            block: view.block,
            cluster: view.cluster,
            shared_bytes: view.shared_bytes,
            cooperative: view.cooperative != 0,
            bytes_loaded: view.bytes_loaded,
            bytes_stored: view.bytes_stored,
            sectors_loaded: view.sectors_loaded,
            sectors_stored: view.sectors_stored,
        });
    }
    let mut list: Vec<Launch> = Vec::new();
    // SAFETY: `each` gets the list back while it is borrowed here alone; the handle is looked up, not followed.
    let status = unsafe { (library().take_launches)(stream as usize, each, (&raw mut list).cast()) };
    check("launches", status);
    list
}

/// What the stream was asked to do so far.
///
/// # Panics
///
/// If the handle is no stream, or null where the thread has no context.
pub fn stream_calls<S>(stream: *mut S) -> Calls {
    let mut calls = Calls::default();
    // SAFETY: the driver writes as many counters as `Calls` has; the handle is looked up, not followed.
    let status = unsafe { (library().stream_calls)(stream as usize, &mut calls) };
    check("stream_calls", status);
    calls
}

/// What the context, and with it all its streams, was asked to do so far.
///
/// # Panics
///
/// If the handle is no context.
pub fn context_calls<C>(context: *mut C) -> Calls {
    let mut calls = Calls::default();
    // SAFETY: the driver writes as many counters as `Calls` has; the handle is looked up, not followed.
    let status = unsafe { (library().context_calls)(context as usize, &mut calls) };
    check("context_calls", status);
    calls
}

/// What the calling thread asked of the driver so far: no other test interferes.
pub fn thread_calls() -> Calls {
    let mut calls = Calls::default();
    // SAFETY: the driver writes as many counters as `Calls` has.
    unsafe { (library().thread_calls)(&mut calls) };
    calls
}

/// What the context has allocated at present.
///
/// # Panics
///
/// If the handle is no context.
pub fn live_memory<C>(context: *mut C) -> LiveMemory {
    let (mut allocations, mut bytes) = (0, 0);
    // SAFETY: both results are written to variables that outlive the call; the handle is looked up, not followed.
    let status = unsafe { (library().live_memory)(context as usize, &mut allocations, &mut bytes) };
    check("live_memory", status);
    LiveMemory { allocations, bytes }
}

/// How many bytes the context may have allocated at a time; at first it is the device's memory.
///
/// # Panics
///
/// If the handle is no context.
pub fn set_memory_limit<C>(context: *mut C, bytes: usize) {
    // SAFETY: the handle is looked up, not followed.
    let status = unsafe { (library().set_memory_limit)(context as usize, bytes) };
    check("set_memory_limit", status);
}

/// Whether launches in this context return at once: nothing is checked, run or written down. For measuring what a
/// launch costs the host.
///
/// # Panics
///
/// If the handle is no context.
pub fn set_empty_launches<C>(context: *mut C, empty: bool) {
    // SAFETY: the handle is looked up, not followed.
    let status = unsafe { (library().set_empty_launches)(context as usize, empty) };
    check("set_empty_launches", status);
}

/// A new context on a device, which becomes the calling thread's current one.
/// `CudaContext::from_raw_context` takes it; nobody else allocates, launches or counts in it.
///
/// # Panics
///
/// If there is no such device.
pub fn create_context(ordinal: usize) -> *mut c_void {
    let ordinal = c_int::try_from(ordinal).expect("no such device");
    let mut context = std::ptr::null_mut();
    // SAFETY: the context is written to a variable that outlives the call; parameters are optional.
    let status = unsafe {
        (library().initialise)(0);
        (library().create_context)(&mut context, std::ptr::null_mut(), 0, ordinal)
    };
    assert_eq!(status, 0, "create_context: no device {ordinal}");
    context
}

/// What a kernel did wrong in the last launch of the calling thread that failed, if one did since the last call:
/// kernel, source line, block and thread, and what it was.
pub fn last_fault() -> Option<String> {
    extern "C" fn each(text: *const c_char, fault: *mut c_void) {
        // SAFETY: the driver passes a C string that lives during this call, and back what was passed to it below.
        let (text, fault) = unsafe { (CStr::from_ptr(text), &mut *fault.cast::<Option<String>>()) };
        *fault = Some(text.to_string_lossy().into_owned());
    }
    let mut fault: Option<String> = None;
    // SAFETY: `each` gets the variable back while it is borrowed here alone.
    unsafe { (library().take_fault)(each, (&raw mut fault).cast()) };
    fault
}

/// In which order the calling thread's launches run the threads of a kernel, from now on.
///
/// Without a seed each runs until it must wait, in the order of their numbers, and bulk copies end as late as they may.
/// A seed stands for one of very many other orders, the same one every time: of blocks, which then also run several at a
/// time, and of threads, which lose their turn in the midst of accesses; bulk copies end at any time.
pub fn set_schedule(seed: Option<u64>) {
    // SAFETY: a boolean and an integer are passed.
    unsafe { (library().set_schedule)(seed.is_some(), seed.unwrap_or(0)) }
}

/// The calling thread's calls of the driver and of NVRTC are noted, and one of them may be made to fail, as long as this
/// lives. See [`watch_calls`] and [`inject_fault`].
#[must_use = "calls are noted as long as this lives"]
pub struct WatchedCalls {
    /// Calls belong to the thread.
    not_send: PhantomData<*const ()>,
}

/// Notes the calls that the calling thread makes from now on: all that may fail for reasons of the machine. Not noted are
/// questions for the text of an error, and for NVRTC's version, which fail by a wrong argument only.
///
/// # Panics
///
/// If the thread's calls are watched already.
pub fn watch_calls() -> WatchedCalls {
    inject_fault(0, 0)
}

/// Lets the call of this number, counted from 0 as [`watch_calls`] notes them, fail with this code (`CUresult`, or
/// `nvrtcResult` of a function of NVRTC) before it does anything. All calls after it work again.
///
/// # Panics
///
/// If the thread's calls are watched already.
pub fn inject_fault(number: u64, code: u32) -> WatchedCalls {
    assert!(!WATCHED.replace(true), "one watch at a time");
    // SAFETY: integers are passed.
    unsafe { (library().watch_calls)(number, code) };
    WatchedCalls { not_send: PhantomData }
}

impl WatchedCalls {
    /// Ends the watch: the names of the functions that were called, in their order.
    pub fn finish(self) -> Vec<String> {
        let calls = end_watching();
        std::mem::forget(self);
        calls
    }
}

impl Drop for WatchedCalls {
    fn drop(&mut self) {
        end_watching();
    }
}

fn end_watching() -> Vec<String> {
    extern "C" fn each(name: *const c_char, calls: *mut c_void) {
        // SAFETY: the driver passes a C string that lives during this call, and back what was passed to it below.
        let (name, calls) = unsafe { (CStr::from_ptr(name), &mut *calls.cast::<Vec<String>>()) };
        calls.push(name.to_string_lossy().into_owned());
    }
    WATCHED.set(false);
    let mut calls: Vec<String> = Vec::new();
    // SAFETY: `each` gets the list back while it is borrowed here alone.
    unsafe { (library().end_watching)(each, (&raw mut calls).cast()) };
    calls
}

/// Changes of kernel sources in the programs that the calling thread makes with NVRTC, as long as this lives: for
/// seeding bugs. See [`patch_sources`].
#[must_use = "the sources are as they were once this is dropped"]
pub struct SourcePatches {
    /// Patches belong to the thread.
    not_send: PhantomData<*const ()>,
}

/// Replaces texts in the sources that the calling thread gives to NVRTC from now on: each `find` by its `replace`,
/// wherever it stands. A source without the text stays as it is.
///
/// Compiled kernels are not asked whether their source was patched: a test that does this brings a context of its own,
/// and no cache of kernels on disk.
///
/// # Panics
///
/// If patches of this thread are alive already, or a text has a zero byte.
pub fn patch_sources(patches: &[(&str, &str)]) -> SourcePatches {
    let text = |text: &str| CString::new(text).expect("a patch has no zero byte");
    assert!(!PATCHED.replace(true), "one set of patches at a time");
    for (find, replace) in patches {
        let (find, replace) = (text(find), text(replace));
        // SAFETY: both texts live during the call, which copies them.
        unsafe { (library().add_patch)(find.as_ptr(), replace.as_ptr()) };
    }
    SourcePatches { not_send: PhantomData }
}

impl SourcePatches {
    /// Ends the patches; how often any of them found its text.
    pub fn finish(self) -> usize {
        let applied = end_patches();
        std::mem::forget(self);
        applied
    }
}

impl Drop for SourcePatches {
    fn drop(&mut self) {
        end_patches();
    }
}

thread_local! {
    /// Whether the thread has patches alive.
    static PATCHED: Cell<bool> = const { Cell::new(false) };
    /// Whether the thread's calls are watched.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

fn end_patches() -> usize {
    PATCHED.set(false);
    // SAFETY: nothing is passed.
    unsafe { (library().clear_patches)() }
}

/// What `cuDriverGetVersion` says: 1000 · major + 10 · minor.
pub fn driver_version() -> i32 {
    // SAFETY: nothing is passed.
    unsafe { (library().driver_version)() }
}

/// Makes the driver be of this version (at first 13000) for the whole process.
pub fn set_driver_version(version: i32) {
    // SAFETY: an integer is passed.
    unsafe { (library().set_driver_version)(version) }
}

/// What `nvrtcVersion` says: major and minor.
pub fn nvrtc_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both results are written to variables that outlive the call.
    unsafe { (library().nvrtc_version)(&mut major, &mut minor) };
    (major, minor)
}

/// Makes NVRTC be of this version (at first 13.0) for the whole process.
pub fn set_nvrtc_version(major: i32, minor: i32) {
    // SAFETY: integers are passed.
    unsafe { (library().set_nvrtc_version)(major, minor) }
}

/// Whether the driver finds no device: `cuInit` then says `CUDA_ERROR_NO_DEVICE`, in the whole process.
pub fn set_no_device(none: bool) {
    // SAFETY: a boolean is passed.
    unsafe { (library().set_no_device)(none) }
}

/// Whether launches switch between CUDA threads by the C library's `swapcontext` rather than by the stand-in's own
/// code, where it has such code (x86-64). Slower; it is what other processors use.
pub fn use_portable_fibers(portable: bool) {
    // SAFETY: a boolean is passed.
    unsafe { (library().use_portable_fibers)(portable) }
}
