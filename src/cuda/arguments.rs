//! The structures that kernels take, field for field as the `.cu` files declare them.
//!
//! Every field is eight bytes wide, so that both compilers lay them out alike. An absent operand is the null pointer.

use cudarc::driver::DeviceRepr;
use cudarc::driver::sys::CUdeviceptr;

use super::tiling::Tiling;

/// `struct Partials` of `kernels/reduce.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Partials {
    pub(super) weight: CUdeviceptr,
    pub(super) first: CUdeviceptr,
    pub(super) second: CUdeviceptr,
    pub(super) arrived: CUdeviceptr,
    pub(super) ready: CUdeviceptr,
}

/// `struct Normalisation` of `kernels/normalise.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Normalisation {
    pub(super) pivot: CUdeviceptr,
    pub(super) mean_offset: CUdeviceptr,
    pub(super) invstd: CUdeviceptr,
    pub(super) weight: CUdeviceptr,
    pub(super) bias: CUdeviceptr,
    pub(super) eps: f64,
}

/// `struct Arguments` of `kernels/statistics.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Statistics {
    pub(super) x: CUdeviceptr,
    pub(super) pivot: CUdeviceptr,
    pub(super) mean_offset: CUdeviceptr,
    pub(super) invstd: CUdeviceptr,
    pub(super) variance: CUdeviceptr,
    pub(super) partials: Partials,
    pub(super) batches: CUdeviceptr,
    pub(super) momentum: CUdeviceptr,
    pub(super) eps: f64,
    pub(super) tiling: Tiling,
}

/// `struct RunningUpdate` of `kernels/running.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RunningUpdate {
    pub(super) mean: CUdeviceptr,
    pub(super) variance: CUdeviceptr,
    pub(super) batches: CUdeviceptr,
    pub(super) momentum: f64,
    pub(super) skip_non_finite: u64,
    pub(super) values: u64,
}

/// `struct Arguments` of `kernels/apply.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Apply {
    pub(super) x: CUdeviceptr,
    pub(super) z: CUdeviceptr,
    pub(super) y: CUdeviceptr,
    pub(super) normalisation: Normalisation,
    pub(super) update: RunningUpdate,
    pub(super) batch_variance: CUdeviceptr,
    pub(super) cumulative: CUdeviceptr,
    pub(super) tiling: Tiling,
}

/// `struct Arguments` of `kernels/resident_forward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ResidentForward {
    pub(super) x: CUdeviceptr,
    pub(super) z: CUdeviceptr,
    pub(super) y: CUdeviceptr,
    pub(super) pivot: CUdeviceptr,
    pub(super) mean_offset: CUdeviceptr,
    pub(super) invstd: CUdeviceptr,
    pub(super) weight: CUdeviceptr,
    pub(super) bias: CUdeviceptr,
    pub(super) update: RunningUpdate,
    pub(super) cumulative: u64,
    pub(super) finished: CUdeviceptr,
    pub(super) partials: Partials,
    pub(super) eps: f64,
    pub(super) tiling: Tiling,
}

/// The tensors with which `struct Arguments` begins in all kernels of the backward pass.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct BackwardTensors {
    pub(super) x: CUdeviceptr,
    pub(super) y: CUdeviceptr,
    pub(super) dy: CUdeviceptr,
    pub(super) dx: CUdeviceptr,
    pub(super) dz: CUdeviceptr,
}

/// `struct ParameterGradients` of `kernels/sums.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ParameterGradients {
    pub(super) weight: CUdeviceptr,
    pub(super) bias: CUdeviceptr,
    pub(super) accumulate: u64,
}

/// `struct Arguments` of `kernels/backward_reduce.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct BackwardReduce {
    pub(super) tensors: BackwardTensors,
    pub(super) normalisation: Normalisation,
    pub(super) partials: Partials,
    pub(super) sum: CUdeviceptr,
    pub(super) sum_centred: CUdeviceptr,
    pub(super) gradients: ParameterGradients,
    pub(super) tiling: Tiling,
}

/// `struct Arguments` of `kernels/backward_apply.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct BackwardApply {
    pub(super) tensors: BackwardTensors,
    pub(super) normalisation: Normalisation,
    pub(super) sum: CUdeviceptr,
    pub(super) sum_centred: CUdeviceptr,
    pub(super) mean: CUdeviceptr,
    pub(super) mean_centred: CUdeviceptr,
    pub(super) values: u64,
    pub(super) gradients: ParameterGradients,
    pub(super) tiling: Tiling,
}

/// `struct Arguments` of `kernels/resident_backward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ResidentBackward {
    pub(super) tensors: BackwardTensors,
    pub(super) normalisation: Normalisation,
    pub(super) partials: Partials,
    pub(super) gradients: ParameterGradients,
    pub(super) values: u64,
    pub(super) tiling: Tiling,
}

/// `struct Gathered` of `kernels/message.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Gathered {
    pub(super) messages: CUdeviceptr,
    pub(super) ranks: u64,
    pub(super) bytes: u64,
    pub(super) tag: i64,
    pub(super) channels: u64,
}

/// `struct Arguments` of `kernels/merge_statistics.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MergeStatistics {
    pub(super) gathered: Gathered,
    pub(super) pivot: CUdeviceptr,
    pub(super) mean_offset: CUdeviceptr,
    pub(super) invstd: CUdeviceptr,
    pub(super) variance: CUdeviceptr,
    pub(super) outcome: CUdeviceptr,
    pub(super) batches: CUdeviceptr,
    pub(super) momentum: CUdeviceptr,
    pub(super) eps: f64,
}

/// `struct Arguments` of `kernels/merge_sums.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MergeSums {
    pub(super) gathered: Gathered,
    pub(super) mean: CUdeviceptr,
    pub(super) mean_centred: CUdeviceptr,
    pub(super) outcome: CUdeviceptr,
}

/// `struct Arguments` of `kernels/update_running.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UpdateRunning {
    pub(super) mean: CUdeviceptr,
    pub(super) variance: CUdeviceptr,
    pub(super) batches: CUdeviceptr,
    pub(super) pivot: CUdeviceptr,
    pub(super) mean_offset: CUdeviceptr,
    pub(super) batch_variance: CUdeviceptr,
    pub(super) cumulative: CUdeviceptr,
    pub(super) momentum: f64,
    pub(super) skip_non_finite: u64,
    pub(super) outcome: CUdeviceptr,
    pub(super) channels: u64,
}

// SAFETY: plain structures of eight-byte numbers and device addresses, laid out as in C.
unsafe impl DeviceRepr for Statistics {}
// SAFETY: as above.
unsafe impl DeviceRepr for Apply {}
// SAFETY: as above.
unsafe impl DeviceRepr for BackwardReduce {}
// SAFETY: as above.
unsafe impl DeviceRepr for BackwardApply {}
// SAFETY: as above.
unsafe impl DeviceRepr for ResidentForward {}
// SAFETY: as above.
unsafe impl DeviceRepr for ResidentBackward {}
// SAFETY: as above.
unsafe impl DeviceRepr for MergeStatistics {}
// SAFETY: as above.
unsafe impl DeviceRepr for MergeSums {}
// SAFETY: as above.
unsafe impl DeviceRepr for UpdateRunning {}
