//! Everything that can go wrong, with the argument, what was expected and what came.

use crate::element::Dtype;
use crate::shape::Shape;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused or failed.
///
/// Errors about arguments are found before anything is launched or changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer's length is not what the shape asks for.
    #[error("{argument}: expected {expected} elements for shape {shape}, got {got}")]
    Length {
        /// The argument's name.
        argument: &'static str,
        /// The shape of the call.
        shape: Shape,
        /// Elements the shape has.
        expected: usize,
        /// Elements the buffer has.
        got: usize,
    },

    /// A per-channel vector has the wrong length.
    #[error("{argument}: expected {expected} elements, one per channel, got {got}")]
    VectorLength {
        /// The argument's name.
        argument: &'static str,
        /// The module's `num_features`.
        expected: usize,
        /// Elements given.
        got: usize,
    },

    /// The shape's channels are not the module's.
    #[error("shape {shape}: expected {expected} channels (num_features), got {}", shape.channels)]
    Channels {
        /// The shape of the call.
        shape: Shape,
        /// The module's `num_features`.
        expected: usize,
    },

    /// Channels, height or width is 0. (A batch of 0 images is allowed.)
    #[error("shape {shape}: channels, height and width must be at least 1")]
    EmptyDimension {
        /// The shape of the call.
        shape: Shape,
    },

    /// The product of the dimensions does not fit the address space.
    #[error("shape {shape}: the tensor's size overflows")]
    ShapeOverflow {
        /// The shape of the call.
        shape: Shape,
    },

    /// One value has no variance.
    #[error("expected more than 1 value per channel when training, got input size {shape}")]
    OneValuePerChannel {
        /// The shape of the call.
        shape: Shape,
    },

    /// `num_features` is 0.
    #[error("num_features: expected at least 1, got 0")]
    NoFeatures,

    /// `eps` is negative or not finite.
    #[error("eps: expected a finite number of at least 0, got {eps}")]
    Eps {
        /// What was given.
        eps: f64,
    },

    /// `momentum` is not finite.
    #[error("momentum: expected a finite number, got {momentum}")]
    Momentum {
        /// What was given.
        momentum: f64,
    },

    /// Evaluation by running statistics was asked of a module that keeps none.
    #[error(
        "this module tracks no running statistics: evaluate by those of the batch \
         (forward_eval_batch_statistics)"
    )]
    NoRunningStatistics,

    /// Evaluation by the batch's statistics was asked of a module that keeps running statistics.
    #[error("this module tracks running statistics: evaluate with forward_eval")]
    HasRunningStatistics,

    /// Parameter gradients were asked of a module without parameters.
    #[error("this module has no weight and bias (affine is false): it has no parameter gradients")]
    NotAffine,

    /// Training would overwrite its input, which the backward pass needs.
    #[error("training cannot write y over x: the backward pass reads x")]
    InPlaceTraining,

    /// `saved` was prepared for another call.
    #[error("saved: prepared for {what} {expected}, used with {got}")]
    SavedMismatch {
        /// What differs: `shape`, `epilogue` or `device`.
        what: &'static str,
        /// What `saved` was prepared for.
        expected: String,
        /// What it was used with.
        got: String,
    },

    /// `saved` holds no statistics: no forward pass was run with it, or the last one failed.
    #[error("saved: holds no statistics, run a forward pass with it first")]
    SavedEmpty,

    /// The fused forms of the call and of the argument differ, such as a residual without its gradient's mask.
    #[error("{argument}: expected {expected}, got {got}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },

    /// A buffer belongs to another CUDA context. Contexts do not order each other's work, so the kernels would race.
    #[error(
        "{argument}: belongs to another CUDA context than the module (device {got}, module on device {expected}): \
         make both from the same Arc<CudaContext>"
    )]
    Context {
        /// The argument's name.
        argument: &'static str,
        /// Device ordinal of the module's context.
        expected: usize,
        /// Device ordinal of the buffer's context.
        got: usize,
    },

    /// The stream is being captured while `cudarc` records events for every buffer, which a graph cannot hold.
    #[error(
        "the stream is being captured while cudarc tracks events over several streams: call \
         CudaContext::disable_event_tracking before the buffers are allocated"
    )]
    CaptureWithEventTracking,

    /// The ranks of a synchronised batch norm do not do the same thing. Every rank that finds out gets this error.
    #[error("rank {rank} differs from the others in its {what}: expected {expected}, got {got}")]
    RanksDisagree {
        /// What differs.
        what: &'static str,
        /// The first rank that differs.
        rank: usize,
        /// What the others have.
        expected: String,
        /// What that rank has.
        got: String,
    },

    /// Ranks cannot reach each other: one has left or is late, or the library between them says so.
    #[error("collective operation failed at rank {rank}: {message}")]
    Collective {
        /// The rank that it happened to.
        rank: usize,
        /// What happened.
        message: String,
    },

    /// CUDA cannot be used on this machine.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),

    /// The memory of the device, or of the host, does not suffice.
    #[error("out of memory: {bytes} bytes asked for")]
    OutOfMemory {
        /// Bytes of the allocation that failed.
        bytes: usize,
    },

    /// A kernel did not compile.
    #[error("kernel {kernel} did not compile for sm_{architecture}:\n{log}")]
    Compile {
        /// The kernel's name.
        kernel: String,
        /// Compute capability times ten.
        architecture: u32,
        /// NVRTC's log.
        log: String,
    },

    /// NVRTC failed for another reason than the source.
    #[error("NVRTC: {call} failed: {message}")]
    Nvrtc {
        /// The NVRTC call.
        call: &'static str,
        /// NVRTC's name for the error.
        message: String,
    },

    /// The CUDA driver refused a call.
    #[error("CUDA driver: {call} failed: {message} (error {code})")]
    Driver {
        /// What was tried.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// The driver's name and description of it.
        message: String,
    },

    /// The CUDA context is broken for good: only a new process can use the device again.
    #[error(
        "the CUDA context is lost: {call} failed: {message} (error {code}); the process must be restarted to use the \
         device again"
    )]
    DeviceLost {
        /// What was tried.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// The driver's name and description of it.
        message: String,
    },

    /// A state dict lacks an entry, or has one too many, or one of the wrong kind.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What is wrong with a state dict. Nothing of the module has changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// An entry the module needs is not there.
    #[error("state dict: missing key {key:?}")]
    MissingKey {
        /// The entry's full name.
        key: String,
    },

    /// An entry is there that the module has no place for.
    #[error("state dict: unexpected key {key:?}")]
    UnexpectedKey {
        /// The entry's full name.
        key: String,
    },

    /// An entry's shape is wrong.
    #[error("state dict: {key:?}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The entry's full name.
        key: String,
        /// The shape the module needs.
        expected: Vec<usize>,
        /// The shape found.
        got: Vec<usize>,
    },

    /// An entry's type is wrong.
    #[error("state dict: {key:?}: expected dtype {expected}, got {got}")]
    Dtype {
        /// The entry's full name.
        key: String,
        /// The type the module needs.
        expected: String,
        /// The type found.
        got: String,
    },

    /// The bytes are no complete safetensors file.
    #[error("state dict: not a complete safetensors file: {message}")]
    Malformed {
        /// What the reader found.
        message: String,
    },

    /// The file could not be read or written.
    #[error("state dict: {path}: {message}")]
    File {
        /// The file's path.
        path: String,
        /// The operating system's message.
        message: String,
    },
}

/// The oldest compute capability the kernels are compiled for, times ten.
pub const OLDEST_ARCHITECTURE: u32 = 75;

/// Why CUDA cannot be used on this machine, and how to get what is missing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The driver's library is not there.
    #[error(
        "no CUDA driver: none of {} could be loaded; install NVIDIA's driver for the GPU of this machine \
         (https://www.nvidia.com/drivers)", .tried.join(", ")
    )]
    NoDriver {
        /// The libraries looked for.
        tried: Vec<String>,
    },

    /// The driver is there but does not start.
    #[error("the CUDA driver does not start: {call} gave error {code}; is the kernel module of the driver loaded?")]
    DriverFailed {
        /// The driver's function.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
    },

    /// The driver is there, a GPU is not.
    #[error(
        "no CUDA device: the driver is there but sees no GPU; check `nvidia-smi` and the environment variable \
         CUDA_VISIBLE_DEVICES"
    )]
    NoDevice,

    /// The device asked for is not there.
    #[error("no CUDA device {ordinal}: there are {count}, counted from 0")]
    NoSuchDevice {
        /// What was asked for.
        ordinal: usize,
        /// How many devices there are.
        count: usize,
    },

    /// The device is older than the kernels.
    #[error(
        "device {name} has compute capability {}.{}: at least {}.{} is needed",
        .architecture / 10, .architecture % 10, OLDEST_ARCHITECTURE / 10, OLDEST_ARCHITECTURE % 10
    )]
    DeviceTooOld {
        /// The device's name.
        name: String,
        /// Its compute capability times ten.
        architecture: u32,
    },

    /// NVRTC's library is not there.
    #[error(
        "no NVRTC: none of {} could be loaded; it comes with the CUDA toolkit, or with `pip install nvidia-cuda-nvrtc` \
         (then add the folder of the library to LD_LIBRARY_PATH)", .tried.join(", ")
    )]
    NoNvrtc {
        /// The libraries looked for.
        tried: Vec<String>,
    },

    /// NCCL's library is not there.
    #[cfg(feature = "nccl")]
    #[error(
        "no NCCL: {tried} could not be loaded; it comes with NVIDIA's packages libnccl2 and libnccl-dev, or with `pip install \
         nvidia-nccl-cu13` (then make a link {tried} beside the wheel's libnccl.so.2, and add the folder to LD_LIBRARY_PATH)"
    )]
    NoNccl {
        /// The library looked for.
        tried: String,
    },

    /// NVRTC's code would be newer than the driver understands.
    #[error(
        "NVRTC {}.{} is newer than the CUDA {}.{} of the driver: install NVRTC {} or a newer driver",
        nvrtc.0, nvrtc.1, driver.0, driver.1, driver.0
    )]
    NvrtcTooNew {
        /// NVRTC's version.
        nvrtc: (u32, u32),
        /// The CUDA version the driver supports.
        driver: (u32, u32),
    },
}

impl Error {
    /// So many elements are too many.
    pub(crate) fn out_of_memory<T>(len: usize) -> Self {
        Error::OutOfMemory {
            bytes: len.saturating_mul(size_of::<T>()),
        }
    }

    /// Refuses a tensor whose length is not the shape's.
    pub(crate) fn check_length(argument: &'static str, shape: Shape, got: usize) -> Result<()> {
        let expected = shape.len()?;
        if got == expected {
            Ok(())
        } else {
            Err(Error::Length {
                argument,
                shape,
                expected,
                got,
            })
        }
    }
}

impl StateError {
    pub(crate) fn dtype(key: String, expected: Dtype, got: impl std::fmt::Debug) -> Self {
        StateError::Dtype {
            key,
            expected: expected.to_string(),
            got: format!("{got:?}").to_lowercase(),
        }
    }
}
