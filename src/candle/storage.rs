//! Where candle's numbers lie, on each device that this crate has a backend for, and how results become candle's.

use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use candle_core::backend::BackendStorage as _;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Error, InplaceOp1, Layout, Result, Storage, Tensor, Var, WithDType,
};
use half::vec::HalfBitsVecExt as _;
use half::{bf16, f16};

use super::operation::{NAME, Update};
use super::shared::Shared;
use crate::backend::Backend;
use crate::config::Momentum;
use crate::cpu::{Cpu, count, move_running};
use crate::element::{Plain, Real};

/// Where a tensor of candle's lies.
pub(super) type Place<'a, D> = (&'a <D as Device>::Storage, &'a Layout);

/// Running statistics for a pass to move, and how.
pub(super) struct Moved<'a, D: Device> {
    pub(super) mean: &'a mut D::Storage,
    pub(super) variance: &'a mut D::Storage,
    pub(super) batches: &'a mut D::Storage,
    pub(super) momentum: Momentum,
    pub(super) skip_non_finite: bool,
}

/// A backend that works in candle's memory.
pub(super) trait Device: Backend {
    /// candle's memory on this device.
    type Storage: 'static;

    /// The backend for work beside this memory.
    fn beside(storage: &Self::Storage, shared: &Shared) -> Result<Self>;

    /// Elements of a tensor, to be read.
    fn view<T: Stored>(storage: &Self::Storage, elements: Range<usize>) -> Result<Self::View<'_, T>>;

    /// Elements of a tensor, to be written.
    fn view_mut<T: Stored>(storage: &mut Self::Storage, elements: Range<usize>) -> Result<Self::ViewMut<'_, T>>;

    /// Gives the memory of a tensor, locked to be read, to `look`.
    fn look<R>(tensor: &Tensor, look: impl FnOnce(Place<'_, Self>) -> Result<R>) -> Result<R>;

    /// Runs a pass that is to move running statistics of `channels` channels.
    fn moving<P: Real + Stored>(
        update: &Update,
        channels: usize,
        pass: impl FnOnce(Moved<'_, Self>) -> Result<()>,
    ) -> Result<()>;

    /// Memory for a result. What it holds is of no account: the pass writes every element.
    fn unwritten<T: Stored>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// The first `middle` elements of a buffer, and the others.
    fn split_at<T: Plain>(buffer: &mut Self::Buffer<T>, middle: usize) -> [Self::ViewMut<'_, T>; 2];

    /// Makes candle's memory of a buffer, on the device of `beside`.
    fn into_storage<T: Stored>(buffer: Self::Buffer<T>, beside: &Self::Storage) -> Self::Storage;

    /// candle's memory, of this device.
    fn into_candle(storage: Self::Storage) -> Storage;
}

/// A number of candle's that this crate has too.
#[cfg(not(feature = "candle-cuda"))]
pub(super) trait Stored: StoredOnCpu {}
#[cfg(not(feature = "candle-cuda"))]
impl<T: StoredOnCpu> Stored for T {}

/// A number of candle's that this crate has too.
#[cfg(feature = "candle-cuda")]
pub(super) trait Stored: StoredOnCpu + candle_core::cuda_backend::CudaDType {}
#[cfg(feature = "candle-cuda")]
impl<T: StoredOnCpu + candle_core::cuda_backend::CudaDType> Stored for T {}

/// What candle has no generic method for.
pub(super) trait StoredOnCpu: Plain + WithDType {
    /// The elements, if they are of this type.
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;

    /// So many elements of any value, at the cost of an allocation alone: memory that comes zeroed is not written again.
    fn any(len: usize) -> Vec<Self>;
}

macro_rules! stored_on_cpu {
    ($($type:ty, $variant:ident, $len:ident => $any:expr);+ $(;)?) => {
        $(
            impl StoredOnCpu for $type {
                fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                    match storage {
                        CpuStorage::$variant(elements) => Some(elements),
                        _ => None,
                    }
                }

                fn any($len: usize) -> Vec<Self> {
                    $any
                }
            }
        )+
    };
}

stored_on_cpu! {
    f32, F32, len => vec![0.0; len];
    f64, F64, len => vec![0.0; len];
    i64, I64, len => vec![0; len];
    // The standard library asks for zeroed memory only where it knows the number type.
    f16, F16, len => vec![0u16; len].reinterpret_into();
    bf16, BF16, len => vec![0u16; len].reinterpret_into();
}

impl Device for Cpu {
    type Storage = CpuStorage;

    fn beside(_storage: &CpuStorage, _shared: &Shared) -> Result<Self> {
        Ok(Cpu::new())
    }

    fn view<T: Stored>(storage: &CpuStorage, elements: Range<usize>) -> Result<&[T]> {
        Ok(&storage.as_slice::<T>()?[elements])
    }

    fn view_mut<T: Stored>(storage: &mut CpuStorage, elements: Range<usize>) -> Result<&mut [T]> {
        let got = storage.dtype();
        match T::elements_mut(storage) {
            Some(all) => Ok(&mut all[elements]),
            None => Err(Error::UnexpectedDType {
                msg: NAME,
                expected: T::DTYPE,
                got,
            }
            .bt()),
        }
    }

    /// As candle's own operations lock their arguments, which [`Tensor::storage_and_layout`] does not: where a writer waits,
    /// a thread that holds the lock already, and has taken up another task of its pool in a pass, gets it once more.
    fn look<R>(tensor: &Tensor, look: impl FnOnce(Place<'_, Self>) -> Result<R>) -> Result<R> {
        let look = Look {
            look: RefCell::new(Some(look)),
            result: RefCell::new(None),
        };
        tensor.apply_op1_no_bwd(&look)?;
        look.result.into_inner().ok_or_else(other_device)
    }

    /// The pass moves statistics of its own, all the way to those of the batch. No lock is held meanwhile: a thread that
    /// waits in a pass takes up other tasks of its pool, and one of those may want the same lock.
    fn moving<P: Real + Stored>(
        update: &Update,
        channels: usize,
        pass: impl FnOnce(Moved<'_, Self>) -> Result<()>,
    ) -> Result<()> {
        // `0 · -0 + 1 · b` is b, bit for bit, for a zero of either sign too.
        let vector = || P::to_cpu_storage_owned(vec![-P::ZERO; channels]);
        let (mut batch_mean, mut batch_variance) = (vector(), vector());
        pass(Moved {
            mean: &mut batch_mean,
            variance: &mut batch_variance,
            batches: &mut CpuStorage::I64(vec![0]),
            momentum: Momentum::Factor(1.0),
            skip_non_finite: false,
        })?;
        let batch_mean: &[P] = Self::view(&batch_mean, 0..channels)?;
        let batch_variance: &[P] = Self::view(&batch_variance, 0..channels)?;
        change_all::<Self>(update, |moved| {
            let batches: &mut [i64] = Self::view_mut(moved.batches, 0..1)?;
            let mean: &mut [P] = Self::view_mut(moved.mean, 0..channels)?;
            let variance: &mut [P] = Self::view_mut(moved.variance, 0..channels)?;
            let factor = count(&mut batches[0], moved.momentum);
            let batch = batch_mean
                .iter()
                .zip(batch_variance)
                .map(|(&mean, &variance)| [mean, variance]);
            move_running([mean, variance], factor, moved.skip_non_finite, batch);
            Ok(())
        })
    }

    fn unwritten<T: Stored>(&self, len: usize) -> Result<Vec<T>> {
        Ok(T::any(len))
    }

    fn split_at<T: Plain>(buffer: &mut Vec<T>, middle: usize) -> [&mut [T]; 2] {
        buffer.split_at_mut(middle).into()
    }

    fn into_storage<T: Stored>(buffer: Vec<T>, _beside: &CpuStorage) -> CpuStorage {
        T::to_cpu_storage_owned(buffer)
    }

    fn into_candle(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }
}

/// candle's memory, which must be on this device.
pub(super) fn memory<D: Device>(storage: &Storage) -> Result<&D::Storage> {
    let memory: &dyn Any = match storage {
        Storage::Cpu(memory) => memory,
        Storage::Cuda(memory) => memory,
        Storage::Metal(memory) => memory,
    };
    memory.downcast_ref().ok_or_else(other_device)
}

/// Gives the running statistics to `change`, locked to be written: the mean first, then the variance, then the count.
pub(super) fn change_all<D: Device>(
    update: &Update,
    change_them: impl FnOnce(Moved<'_, D>) -> Result<()>,
) -> Result<()> {
    change::<D, _>(&update.mean, |mean| {
        change::<D, _>(&update.variance, |variance| {
            change::<D, _>(&update.batches, |batches| {
                change_them(Moved {
                    mean,
                    variance,
                    batches,
                    momentum: update.momentum,
                    skip_non_finite: update.skip_non_finite,
                })
            })
        })
    })
}

/// Gives the memory of a variable to `change`. candle hands it out to operations in place alone.
fn change<D: Device, R>(variable: &Var, change: impl FnOnce(&mut D::Storage) -> Result<R>) -> Result<R> {
    let change = InPlace::<D, _, R> {
        change: RefCell::new(Some(change)),
        result: RefCell::new(None),
        device: PhantomData,
    };
    variable.inplace_op1(&change)?;
    change.result.into_inner().ok_or_else(other_device)
}

struct InPlace<D, F, R> {
    change: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
    device: PhantomData<D>,
}

impl<D: Device, F: FnOnce(&mut D::Storage) -> Result<R>, R> InPlace<D, F, R> {
    fn run(&self, memory: &mut dyn Any) -> Result<()> {
        if let (Some(change), Some(memory)) = (self.change.take(), memory.downcast_mut()) {
            self.result.replace(Some(change(memory)?));
        }
        Ok(())
    }
}

impl<D: Device, F: FnOnce(&mut D::Storage) -> Result<R>, R> InplaceOp1 for InPlace<D, F, R> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> Result<()> {
        self.run(storage)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _layout: &Layout) -> Result<()> {
        self.run(storage)
    }
}

struct Look<F, R> {
    look: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
}

/// An operation that yields nothing to candle.
impl<F: FnOnce(Place<'_, Cpu>) -> Result<R>, R> CustomOp1 for Look<F, R> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, memory: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, candle_core::Shape)> {
        if let Some(look) = self.look.take() {
            self.result.replace(Some(look((memory, layout))?));
        }
        Ok((CpuStorage::U8(Vec::new()), 0.into()))
    }
}

fn other_device() -> Error {
    Error::msg(format_args!("{NAME}: a tensor lies on another device than the others")).bt()
}
