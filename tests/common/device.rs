//! The devices the tests run on.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use batchnorm_cuda::cuda::{CACHE_VARIABLE, DiskCache};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use batchnorm_cuda::{AsTensor, Backend, Backward, Cpu, Cuda, Element, Forward, Plain, Result};

/// A backend whose buffers can be cut, and whose pieces can be given to a pass.
///
/// The library takes pieces of each device's own kind (slices, `CudaView`); this trait gives both one name, so that a
/// test is written once.
pub trait Device: Backend {
    /// What a failed test calls it.
    const NAME: &'static str;

    /// Where a buffer's values lie on the device.
    fn address<T: Plain>(buffer: &Self::Buffer<T>) -> u64;

    fn part<T: Plain>(buffer: &Self::Buffer<T>, range: Range<usize>) -> Self::View<'_, T>;
    fn part_mut<T: Plain>(buffer: &mut Self::Buffer<T>, range: Range<usize>) -> Self::ViewMut<'_, T>;

    fn new_forward<'a, T: Element>(x: &'a Self::View<'_, T>, y: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T>;
    fn forward_in_place<'a, T: Element>(x: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T>;
    fn forward_add_relu<'a, T: Element>(
        forward: Forward<'a, Self, T>,
        z: &'a Self::View<'_, T>,
    ) -> Forward<'a, Self, T>;

    fn new_backward<'a, T: Element>(x: &'a Self::View<'_, T>, dy: &'a Self::View<'_, T>) -> Backward<'a, Self, T>;
    fn backward_in_place<'a, T: Element>(
        x: &'a Self::View<'_, T>,
        dy: &'a mut Self::ViewMut<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_dx<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        dx: &'a mut Self::ViewMut<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_add_relu<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        y: &'a Self::View<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_dz<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        dz: &'a mut Self::ViewMut<'_, T>,
    ) -> Result<Backward<'a, Self, T>>;

    /// A size for this device: `full`, or `reduced` where a stand-in runs all threads of a kernel one after another.
    fn size(full: usize, reduced: usize) -> usize;

    /// The same device with a stream of its own, if it has streams.
    fn with_own_stream(&self) -> Self;

    /// A buffer's values, on the host.
    fn download<T: Plain>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>> {
        self.to_vec(buffer.view())
    }
}

/// The methods of [`Device`] that read the same for every backend once its pieces are tensors. (Not generic code, because
/// a slice is a tensor itself and a `CudaView` is one behind a reference.)
macro_rules! passes {
    ($piece:ident => $read:expr, $piece_mut:ident => $write:expr) => {
        fn new_forward<'a, T: Element>(
            $piece: &'a Self::View<'_, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Forward<'a, Self, T> {
            Forward::new($read, $write)
        }

        fn forward_in_place<'a, T: Element>($piece_mut: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T> {
            Forward::in_place($write)
        }

        fn forward_add_relu<'a, T: Element>(
            forward: Forward<'a, Self, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Forward<'a, Self, T> {
            forward.add_relu($read)
        }

        fn new_backward<'a, T: Element>(
            x: &'a Self::View<'_, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Backward<'a, Self, T> {
            let dy = $read;
            let $piece = x;
            Backward::new($read, dy)
        }

        fn backward_in_place<'a, T: Element>(
            $piece: &'a Self::View<'_, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Backward<'a, Self, T> {
            Backward::in_place($read, $write)
        }

        fn backward_dx<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Backward<'a, Self, T> {
            backward.dx($write)
        }

        fn backward_add_relu<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Backward<'a, Self, T> {
            backward.add_relu($read)
        }

        fn backward_dz<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Result<Backward<'a, Self, T>> {
            backward.dz($write)
        }
    };
}

impl Device for Cpu {
    const NAME: &'static str = "cpu";

    fn size(full: usize, _reduced: usize) -> usize {
        full
    }

    fn with_own_stream(&self) -> Self {
        *self
    }

    fn address<T: Plain>(buffer: &Vec<T>) -> u64 {
        buffer.as_ptr() as u64
    }

    fn part<T: Plain>(buffer: &Vec<T>, range: Range<usize>) -> &[T] {
        &buffer[range]
    }

    fn part_mut<T: Plain>(buffer: &mut Vec<T>, range: Range<usize>) -> &mut [T] {
        &mut buffer[range]
    }

    passes!(piece => *piece, piece_mut => *piece_mut);
}

impl Device for Cuda {
    const NAME: &'static str = "cuda";

    fn size(full: usize, reduced: usize) -> usize {
        match driver() {
            Driver::Real => full,
            Driver::StandIn => reduced,
        }
    }

    fn with_own_stream(&self) -> Self {
        on_own_stream(self.stream().context()).with_choice(*self.choice())
    }

    fn address<T: Plain>(buffer: &CudaSlice<T>) -> u64 {
        buffer.device_ptr(buffer.stream()).0
    }

    fn part<T: Plain>(buffer: &CudaSlice<T>, range: Range<usize>) -> CudaView<'_, T> {
        buffer.slice(range)
    }

    fn part_mut<T: Plain>(buffer: &mut CudaSlice<T>, range: Range<usize>) -> CudaViewMut<'_, T> {
        buffer.slice_mut(range)
    }

    passes!(piece => piece, piece_mut => piece_mut);
}

/// The CPU.
pub fn cpu() -> Cpu {
    Cpu::new()
}

/// A CUDA device with a stream of the caller's own: the real one, or the stand-in where there is none.
pub fn cuda() -> Cuda {
    cuda_device(0)
}

/// The CUDA device with this ordinal, with a stream of the caller's own.
pub fn cuda_device(ordinal: usize) -> Cuda {
    driver();
    // One context for each device: a test does not wait for the work of another, but shares its compiled kernels.
    static CONTEXTS: Mutex<Vec<Arc<CudaContext>>> = Mutex::new(Vec::new());
    let mut contexts = CONTEXTS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let known = contexts.iter().position(|context| context.ordinal() == ordinal);
    let at = known.unwrap_or_else(|| {
        contexts.push(CudaContext::new(ordinal).expect("a context"));
        contexts.len() - 1
    });
    on_own_stream(&contexts[at])
}

/// A backend on a new stream of a context.
pub fn on_own_stream(context: &Arc<CudaContext>) -> Cuda {
    on_stream(context.new_stream().expect("a stream"))
}

/// A backend on a stream.
pub fn on_stream(stream: Arc<CudaStream>) -> Cuda {
    Cuda::with_cache(stream, kernel_cache()).expect("a device and NVRTC")
}

/// Compiled kernels are kept from run to run, but apart from those of the user who runs the tests.
fn kernel_cache() -> DiskCache {
    if std::env::var_os(CACHE_VARIABLE).is_some() {
        return DiskCache::Default;
    }
    DiskCache::Folder(Path::new(env!("CARGO_TARGET_TMPDIR")).join(match driver() {
        Driver::Real => "kernels".to_owned(),
        Driver::StandIn => format!("stand-in-kernels-{}", emulator::FINGERPRINT),
    }))
}

/// What answers CUDA's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    Real,
    StandIn,
}

/// The driver of this process, chosen at the first call: a real one if it has a device and `BATCHNORM_TEST_STAND_IN` is
/// not 1, else the stand-in.
pub fn driver() -> Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    *DRIVER.get_or_init(|| {
        let forced = std::env::var_os("BATCHNORM_TEST_STAND_IN").is_some_and(|value| value == "1");
        let (driver, name) = if !forced && real_devices() > 0 {
            (Driver::Real, "the real driver")
        } else {
            emulator::install();
            (Driver::StandIn, "the stand-in driver")
        };
        say(&format!("CUDA tests run on {name}"));
        driver
    })
}

/// How many devices a real driver has, if there is one at all.
///
/// By hand, because `cudarc` panics without a driver, and goes on using the first library it finds.
fn real_devices() -> i32 {
    type Init = unsafe extern "C" fn(u32) -> i32;
    type DeviceCount = unsafe extern "C" fn(*mut i32) -> i32;
    let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    let mut count = 0;
    // SAFETY: the driver's initialisers have no demands, and these are the types of its two functions in cuda.h.
    unsafe {
        let Ok(library) = libloading::Library::new(name) else {
            return 0;
        };
        // A test may have installed the stand-in already, which then answers for this name too.
        if library.get::<*const ()>(b"stand_in_add_device").is_ok() {
            return 0;
        }
        let (Ok(init), Ok(device_count)) = (
            library.get::<Init>(b"cuInit"),
            library.get::<DeviceCount>(b"cuDeviceGetCount"),
        ) else {
            return 0;
        };
        if init(0) == 0 && device_count(&mut count) == 0 {
            count
        } else {
            0
        }
    }
}

/// A line of output that is shown even of a test that passes.
pub fn say(line: &str) {
    // The harness keeps what the print macros write.
    writeln!(std::io::stderr(), "{line}").expect("standard error");
}
