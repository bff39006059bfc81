//! candle's memory on NVIDIA GPUs.

use std::ops::Range;

use candle_core::{CudaStorage, Result, Storage, Tensor};
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut};

use super::operation::Update;
use super::shared::Shared;
use super::storage::{Device, Moved, Place, Stored, change_all, memory};
use super::wrap;
use crate::backend::Backend as _;
use crate::cuda::Cuda;
use crate::element::{Plain, Real};

impl Device for Cuda {
    type Storage = CudaStorage;

    /// candle's own stream, so that passes are ordered with candle's kernels and no event is needed.
    fn beside(storage: &CudaStorage, shared: &Shared) -> Result<Self> {
        if let Some(cuda) = shared.cuda.get() {
            return Ok(cuda.clone());
        }
        let cuda = Cuda::on_stream(storage.device.cuda_stream()).map_err(wrap)?;
        Ok(shared.cuda.get_or_init(|| cuda).clone())
    }

    fn view<T: Stored>(storage: &CudaStorage, elements: Range<usize>) -> Result<CudaView<'_, T>> {
        Ok(storage.as_cuda_slice::<T>()?.slice(elements))
    }

    fn view_mut<T: Stored>(storage: &mut CudaStorage, elements: Range<usize>) -> Result<CudaViewMut<'_, T>> {
        Ok(storage.as_cuda_slice_mut::<T>()?.slice_mut(elements))
    }

    fn look<R>(tensor: &Tensor, look: impl FnOnce(Place<'_, Self>) -> Result<R>) -> Result<R> {
        let (storage, layout) = tensor.storage_and_layout();
        look((memory::<Self>(&storage)?, layout))
    }

    /// The kernels move them where they lie. The locks are held while launches are put on the stream, which waits for no
    /// other thread and runs no other task.
    fn moving<P: Real + Stored>(
        update: &Update,
        _channels: usize,
        pass: impl FnOnce(Moved<'_, Self>) -> Result<()>,
    ) -> Result<()> {
        change_all::<Self>(update, pass)
    }

    fn unwritten<T: Stored>(&self, len: usize) -> Result<CudaSlice<T>> {
        if len == 0 {
            return self.zeros(0).map_err(wrap);
        }
        // SAFETY: numbers of any bits are numbers, and the pass that the memory is made for writes every element before
        // anything on the stream can read one.
        unsafe { self.stream().alloc(len) }.map_err(|error| candle_core::Error::Cuda(Box::new(error)).bt())
    }

    fn split_at<T: Plain>(buffer: &mut CudaSlice<T>, middle: usize) -> [CudaViewMut<'_, T>; 2] {
        buffer.split_at_mut(middle).into()
    }

    fn into_storage<T: Stored>(buffer: CudaSlice<T>, beside: &CudaStorage) -> CudaStorage {
        CudaStorage::wrap_cuda_slice(buffer, beside.device.clone())
    }

    fn into_candle(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }
}
