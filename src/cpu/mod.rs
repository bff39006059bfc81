//! The CPU backend: parallel over channels and parts of the batch, vectorised, and bit for bit the same on any number of
//! threads.
//!
//! `forward` and `gradients` translate what the module asks for into a pass of three phases: reduce, finish, apply.
//! `geometry` cuts the tensors into tasks, `schedule` runs them. The work of one task is a kernel, compiled for several
//! instruction sets by `simd`: `statistics` and `apply` forward, `backward` backward, written with `reduce` (sums),
//! `elementwise` (one visit to each element) and `coefficients` (what a channel is computed with). `compiled` has it all
//! compiled in this crate, for each element type.

mod apply;
mod backward;
mod coefficients;
mod compiled;
mod elementwise;
mod forward;
mod geometry;
mod gradients;
mod memory;
mod reduce;
mod schedule;
mod simd;
mod statistics;
mod synchronised;
#[cfg(test)]
mod tests;
mod workspace;

pub(crate) use compiled::Passes;
#[cfg(feature = "candle")]
pub(crate) use forward::{count, move_running};
pub use workspace::Workspace;

use crate::backend::{AsTensor, AsTensorMut, Backend, BackwardPass, ForwardPass};
use crate::element::{Element, Plain};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::sealed::Sealed;
use crate::shape::Shape;

use geometry::Geometry;

/// The CPU as a device: buffers are vectors, slices or arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    threads_from: usize,
}

impl Default for Cpu {
    fn default() -> Self {
        // Below this, waking other threads may take longer than they save: in a row of calls, between which they do not fall
        // asleep, two were the faster ones from less than 1 MiB on on an EPYC, and from 1 to 2 MiB on on a Xeon with AVX-512
        // (`timings --crossover`; README.md has the figures).
        Cpu { threads_from: 1 << 20 }
    }
}

impl Cpu {
    /// The CPU, with the threads of the [`rayon`] pool that calls are made from.
    pub fn new() -> Self {
        Cpu::default()
    }

    /// Passes over tensors of fewer bytes in total, x alone forward, x and dy backward, keep to the calling thread. Where that
    /// pays is the machine's affair: `cargo run --release --example timings -- --crossover` measures it. No result depends on
    /// it. The default is 1 MiB.
    pub fn threads_from(self, bytes: usize) -> Self {
        Cpu { threads_from: bytes }
    }
}

impl Sealed for Cpu {}
impl<T: Plain> Sealed for [T] {}
impl<T: Plain> Sealed for Vec<T> {}
impl<T: Plain, const N: usize> Sealed for [T; N] {}

impl<T: Plain> AsTensor<Cpu, T> for [T] {
    fn view(&self) -> &[T] {
        self
    }
}
impl<T: Plain> AsTensor<Cpu, T> for Vec<T> {
    fn view(&self) -> &[T] {
        self
    }
}
impl<T: Plain, const N: usize> AsTensor<Cpu, T> for [T; N] {
    fn view(&self) -> &[T] {
        self
    }
}
impl<T: Plain> AsTensorMut<Cpu, T> for [T] {
    fn view_mut(&mut self) -> &mut [T] {
        self
    }
}
impl<T: Plain> AsTensorMut<Cpu, T> for Vec<T> {
    fn view_mut(&mut self) -> &mut [T] {
        self
    }
}
impl<T: Plain, const N: usize> AsTensorMut<Cpu, T> for [T; N] {
    fn view_mut(&mut self) -> &mut [T] {
        self
    }
}

impl Backend for Cpu {
    type Buffer<T: Plain> = Vec<T>;
    type View<'a, T: Plain> = &'a [T];
    type ViewMut<'a, T: Plain> = &'a mut [T];
    type Workspace<T: Element> = Workspace<T>;

    fn zeros<T: Plain>(&self, len: usize) -> Result<Vec<T>> {
        let mut zeros = with_capacity(len)?;
        zeros.resize(len, T::default());
        Ok(zeros)
    }

    fn upload<T: Plain>(&self, values: &[T]) -> Result<Vec<T>> {
        let mut buffer = with_capacity(values.len())?;
        buffer.extend_from_slice(values);
        Ok(buffer)
    }

    fn to_vec<T: Plain>(&self, from: &[T]) -> Result<Vec<T>> {
        self.upload(from)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn copy<T: Plain>(&self, from: &[T], to: &mut [T]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn view_len<T: Plain>(view: &&[T]) -> usize {
        view.len()
    }

    fn view_mut_len<T: Plain>(view: &&mut [T]) -> usize {
        view.len()
    }

    fn read_only<'a, T: Plain>(view: Self::ViewMut<'a, T>) -> Self::View<'a, T> {
        view
    }

    fn check_view<T: Plain>(&self, _argument: &'static str, _view: &&[T]) -> Result<()> {
        Ok(())
    }

    fn check_view_mut<T: Plain>(&self, _argument: &'static str, _view: &&mut [T]) -> Result<()> {
        Ok(())
    }

    fn same_device(&self, _other: &Self) -> bool {
        true
    }

    fn prepare<T: Element>(&self, shape: Shape, _epilogue: Epilogue) -> Result<Workspace<T>> {
        Ok(Workspace::new(shape))
    }

    fn prepare_evaluation<T: Element>(&self, _shape: Shape, _epilogue: Epilogue, _backward: bool) -> Result<()> {
        Ok(())
    }

    fn forward<T: Element>(&self, pass: ForwardPass<'_, '_, Self, T>) -> Result<()> {
        T::run_forward(self.threads_from, pass);
        Ok(())
    }

    fn backward<T: Element>(&self, mut pass: BackwardPass<'_, '_, Self, T>) -> Result<()> {
        T::run_backward(self.threads_from, &mut pass, gradients::Part::Whole);
        Ok(())
    }
}

/// Whether results are written past the caches: where they would not stay there until they are read, and runs are long
/// enough that few lines are written in two steps. On an EPYC with 512 KB and 32 MB of cache, evaluation of 1.6 MB is slower
/// that way, and nearly everything of 3.2 MB faster.
fn streams<T: Element>(geometry: &Geometry) -> bool {
    const CACHED: usize = 2 << 20;
    const LONG: usize = 512;
    geometry.channels() * geometry.values() * size_of::<T>() > CACHED && geometry.row_len() * size_of::<T>() >= LONG
}

/// Room for `len` elements, or an error where there is none.
fn with_capacity<T: Plain>(len: usize) -> Result<Vec<T>> {
    let mut buffer = Vec::new();
    buffer
        .try_reserve_exact(len)
        .map_err(|_| Error::out_of_memory::<T>(len))?;
    Ok(buffer)
}
