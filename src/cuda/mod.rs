//! The CUDA backend: kernels under `kernels/`, compiled at run time, launched on the caller's stream.
//!
//! | file | what it does |
//! |---|---|
//! | `probe` | finds out whether there is a driver, a device, NVRTC |
//! | `limits`, `kernel` | plain values: what a device can do, which kernels there are |
//! | `tiling`, `resident`, [`plan`] | pure decisions: how a tensor is cut up, which kernels run, how many bytes they move |
//! | `model`, `tuning` | how long a plan is believed to take; every number that was chosen and not derived |
//! | `nvrtc`, `compile`, `disk_cache`, `device` | from source to a loaded kernel, once |
//! | `workspace`, `arguments`, `launch`, `synchronised` | carries a plan out on a stream |
//! | `nccl` | with the feature of that name: ranks on several GPUs |

mod arguments;
mod compile;
mod device;
mod disk_cache;
mod driver_error;
mod kernel;
mod launch;
mod limits;
mod model;
#[cfg(feature = "nccl")]
mod nccl;
mod nvrtc;
pub mod plan;
mod probe;
mod resident;
mod synchronised;
mod tiling;
mod tuning;
mod workspace;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, DeviceSlice, ValidAsZeroBits, result,
};

pub use self::compile::{OPTIONS as COMPILE_OPTIONS, compile_ahead};
pub use self::device::CompileReport;
pub use self::disk_cache::{CACHE_VARIABLE, DiskCache};
pub use self::kernel::{Instantiation, Kernel};
pub use self::limits::DeviceLimits;
#[cfg(feature = "nccl")]
pub use self::nccl::is_nccl_available;
pub use self::probe::is_available;
pub use self::tiling::Walk;
pub use self::workspace::Workspace;
pub use crate::error::{OLDEST_ARCHITECTURE, Unavailable};

use self::device::Device;
use self::driver_error::{allocation_error, driver_error, event_error};
use self::launch::BackwardPart;
use self::plan::{Alignment, Choice, Operation, Problem};
use crate::backend::{AsTensor, AsTensorMut, Backend, BackwardPass, ForwardPass};
use crate::element::{Element, Plain};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::sealed::Sealed;
use crate::shape::Shape;

/// A CUDA device as a backend: a context and the stream on which everything is launched.
///
/// Clones share both. Kernels that are loaded in a context are shared by all who use it.
#[derive(Clone)]
pub struct Cuda {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    choice: Choice,
}

impl Cuda {
    /// The device with this ordinal, its primary context and that context's default stream: for simple programs.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with what is missing; the driver's.
    pub fn new(ordinal: usize) -> Result<Self> {
        probe::check_device(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(|error| driver_error("making a context", error))?;
        Self::on_stream(context.default_stream())
    }

    /// The caller's stream and its context. Compiled kernels are cached on disk as [`DiskCache::Default`] says.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the device is too old, or NVRTC is missing; the driver's.
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        Self::with_cache(stream, DiskCache::Default)
    }

    /// As [`Cuda::on_stream`], with another disk cache.
    ///
    /// # Errors
    /// As [`Cuda::on_stream`].
    pub fn with_cache(stream: Arc<CudaStream>, cache: DiskCache) -> Result<Self> {
        is_available()?;
        Ok(Self {
            device: Device::shared(stream.context(), &cache)?,
            stream,
            choice: Choice::default(),
        })
    }

    /// The same device and stream, with passes that take only the paths which the choice allows: for tests and for finding
    /// out what is fastest. Whatever was prepared by a `Cuda` goes with the choice of that one.
    pub fn with_choice(&self, choice: Choice) -> Self {
        Self { choice, ..self.clone() }
    }

    /// Which paths passes may take.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// What will run for a problem on this device, as its kernels are loaded: compiles and loads them.
    ///
    /// It is the plan of the choice, but for what only the driver knows: where it has no room for as many blocks at a time
    /// as the plan asks for, there are fewer teams, or the general path is taken.
    ///
    /// # Errors
    /// As [`Plan::new`](plan::Plan::new); a kernel that does not compile; the driver's.
    pub fn plan(&self, problem: &Problem) -> Result<plan::Plan> {
        let problem = problem.canonical();
        self.device
            .prepare(&problem, &self.choice)
            .map(|prepared| prepared.plan.clone())
    }

    /// The stream that everything is launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// What the device can do.
    pub fn limits(&self) -> &DeviceLimits {
        &self.device.limits
    }

    /// What compiling and loading kernels has cost so far in this context.
    pub fn compile_report(&self) -> CompileReport {
        self.device.report()
    }

    /// Zeros.
    fn allocate<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
        // The driver allocates no empty memory, so an empty buffer owns a place for one element that it does not show.
        let mut buffer = self.reserve(len.max(1))?;
        self.stream
            .memset_zeros(&mut buffer)
            .map_err(|error| driver_error("filling with zeros", error))?;
        if len == buffer.len() {
            Ok(buffer)
        } else {
            self.emptied(buffer)
        }
    }

    /// Memory for `len` elements, at least one, to be written before it is read.
    fn reserve<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        if len > isize::MAX as usize / size_of::<T>() {
            return Err(Error::out_of_memory::<T>(len));
        }
        // SAFETY: the callers fill the memory before anyone sees it.
        unsafe { self.stream.alloc(len) }.map_err(|error| allocation_error(len * size_of::<T>(), error))
    }

    /// A buffer of no elements that owns what this one owned.
    fn emptied<T>(&self, buffer: CudaSlice<T>) -> Result<CudaSlice<T>> {
        let (context, address) = (self.stream.context(), buffer.leak());
        // An error of a call in `leak`, which cudarc keeps, comes out here rather than as the panic that is next.
        let made = context
            .check_err()
            .map_err(|error| driver_error("making an event", error))
            .and_then(|()| {
                // cudarc gives a buffer two events, and where it can make none this function of it panics.
                // SAFETY: the address is of memory that nobody owns any more, and there is room for no elements at all.
                catch_unwind(AssertUnwindSafe(|| unsafe {
                    self.stream.upgrade_device_ptr(address, 0)
                }))
                .map_err(|panic| event_error(&*panic))
            });
        if made.is_err() {
            // SAFETY: nobody else has the address, and nothing was launched that reads it.
            let _ = unsafe {
                if context.has_async_alloc() {
                    result::free_async(address, self.stream.cu_stream())
                } else {
                    result::free_sync(address)
                }
            };
        }
        made
    }

    fn check_context(&self, argument: &'static str, stream: &CudaStream) -> Result<()> {
        let (own, other) = (self.stream.context(), stream.context());
        if Arc::ptr_eq(own, other) {
            Ok(())
        } else {
            Err(Error::Context {
                argument,
                expected: own.ordinal(),
                got: other.ordinal(),
            })
        }
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda")
            .field("device", &self.device.limits.name)
            .field("ordinal", &self.stream.context().ordinal())
            .field("context", &Arc::as_ptr(self.stream.context()))
            .field("choice", &self.choice.to_string())
            .finish()
    }
}

impl Sealed for Cuda {}
impl<T: Plain> Sealed for CudaSlice<T> {}
impl<T: Plain> Sealed for CudaView<'_, T> {}
impl<T: Plain> Sealed for CudaViewMut<'_, T> {}

impl<T: Plain> AsTensor<Cuda, T> for CudaSlice<T> {
    fn view(&self) -> CudaView<'_, T> {
        self.as_view()
    }
}
impl<T: Plain> AsTensor<Cuda, T> for CudaView<'_, T> {
    fn view(&self) -> CudaView<'_, T> {
        self.slice(..)
    }
}
impl<T: Plain> AsTensor<Cuda, T> for CudaViewMut<'_, T> {
    fn view(&self) -> CudaView<'_, T> {
        self.as_view()
    }
}
impl<T: Plain> AsTensorMut<Cuda, T> for CudaSlice<T> {
    fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.as_view_mut()
    }
}
impl<T: Plain> AsTensorMut<Cuda, T> for CudaViewMut<'_, T> {
    fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.slice_mut(..)
    }
}

impl Backend for Cuda {
    type Buffer<T: Plain> = CudaSlice<T>;
    type View<'a, T: Plain> = CudaView<'a, T>;
    type ViewMut<'a, T: Plain> = CudaViewMut<'a, T>;
    type Workspace<T: Element> = Workspace<T>;

    fn zeros<T: Plain>(&self, len: usize) -> Result<CudaSlice<T>> {
        self.allocate(len)
    }

    fn upload<T: Plain>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        if values.is_empty() {
            return self.allocate(0);
        }
        let mut buffer = self.reserve(values.len())?;
        self.stream
            .memcpy_htod(values, &mut buffer)
            .map_err(|error| driver_error("copying to the device", error))?;
        // The values may be gone before an asynchronous copy has read them.
        self.synchronize()?;
        Ok(buffer)
    }

    fn to_vec<T: Plain>(&self, from: CudaView<'_, T>) -> Result<Vec<T>> {
        let mut values = vec![T::default(); from.len()];
        if values.is_empty() {
            return Ok(values);
        }
        self.stream
            .memcpy_dtoh(&from, &mut values)
            .map_err(|error| driver_error("copying to the host", error))?;
        self.synchronize()?;
        Ok(values)
    }

    fn synchronize(&self) -> Result<()> {
        self.stream
            .synchronize()
            .map_err(|error| driver_error("waiting for the stream", error))
    }

    fn copy<T: Plain>(&self, from: CudaView<'_, T>, mut to: CudaViewMut<'_, T>) -> Result<()> {
        self.stream
            .memcpy_dtod(&from, &mut to)
            .map_err(|error| driver_error("copying on the device", error))
    }

    fn view_len<T: Plain>(view: &CudaView<'_, T>) -> usize {
        view.len()
    }

    fn view_mut_len<T: Plain>(view: &CudaViewMut<'_, T>) -> usize {
        view.len()
    }

    fn read_only<'a, T: Plain>(view: Self::ViewMut<'a, T>) -> Self::View<'a, T> {
        view.into_view()
    }

    fn check_view<T: Plain>(&self, argument: &'static str, view: &CudaView<'_, T>) -> Result<()> {
        self.check_context(argument, view.stream())
    }

    fn check_view_mut<T: Plain>(&self, argument: &'static str, view: &CudaViewMut<'_, T>) -> Result<()> {
        self.check_context(argument, view.stream())
    }

    fn same_device(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.stream.context(), other.stream.context()) && self.choice == other.choice
    }

    fn prepare<T: Element>(&self, shape: Shape, epilogue: Epilogue) -> Result<Workspace<T>> {
        let workspace = Workspace::new(self, shape, epilogue)?;
        for operation in [Operation::Train, Operation::Backward] {
            if shape.values_per_channel()? > 1 {
                self.prepare_operation::<T>(operation, shape, epilogue)?;
            }
        }
        Ok(workspace)
    }

    fn prepare_evaluation<T: Element>(&self, shape: Shape, epilogue: Epilogue, backward: bool) -> Result<()> {
        let operation = if backward {
            Operation::BackwardEval
        } else {
            Operation::Eval
        };
        self.prepare_operation::<T>(operation, shape, epilogue)
    }

    fn forward<T: Element>(&self, pass: ForwardPass<'_, '_, Self, T>) -> Result<()> {
        self.launch_forward(pass)
    }

    fn backward<T: Element>(&self, mut pass: BackwardPass<'_, '_, Self, T>) -> Result<()> {
        self.launch_backward(&mut pass, BackwardPart::Whole)
    }
}

impl Cuda {
    /// Compiles and loads the kernels of a pass over aligned tensors. What else tells plans apart (which gradients, how the
    /// running statistics move) changes arguments, not kernels.
    fn prepare_operation<T: Element>(&self, operation: Operation, shape: Shape, epilogue: Epilogue) -> Result<()> {
        let problem = Problem {
            alignment: Alignment::FULL,
            ..Problem::new(operation, shape, T::DTYPE).epilogue(epilogue)
        };
        self.device.prepare(&problem, &self.choice).map(|_| ())
    }
}
