//! candle's memory on NVIDIA GPUs.

use std::ops::Range;

use candle_core::{CudaStorage, Result, Storage};
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut};

use super::shared::Shared;
use super::storage::{Device, Stored};
use super::wrap;
use crate::backend::Backend as _;
use crate::cuda::Cuda;
use crate::element::Plain;

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
