//! The forward pass's elements: normalise, scale, shift, epilogue.

use super::coefficients::{Coefficients, NORMALISATION, Normalisation, SCALE, SHIFT, Table};
use super::elementwise::{Order, Visitor, centred, visit, write};
use super::geometry::{Geometry, Task};
use super::memory::{Sink, Source};
use super::reduce::Block;
use super::simd::{Kernel, Lanes, Level};
use crate::element::{Element, Real};

/// `y = epilogue(fma(x - mean, scale, shift))` for the elements of one task, with the numbers of
/// [`coefficients`](super::coefficients).
pub(super) struct Apply<'a, T: Element, E> {
    pub(super) geometry: &'a Geometry,
    pub(super) task: &'a Task,
    pub(super) normalisation: Normalisation<'a, T::Param>,
    pub(super) elements: Elements<'a, T, E>,
}

/// The tensors of a forward pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elements<'a, T: Element, E> {
    pub(super) x: Source<'a, T>,
    pub(super) y: Sink<'a, T>,
    pub(super) epilogue: E,
    /// Whether y is written past the caches.
    pub(super) streamed: bool,
}

/// What is done to the normalised values before they are rounded.
pub(super) trait Epilogue<T: Element>: Copy + Send + Sync {
    /// Does it.
    ///
    /// # Safety
    /// The block is inside the tensors, and no thread writes to what is read.
    unsafe fn finish<S: Level>(self, level: S, block: Block, value: Lanes<T::Param>) -> Lanes<T::Param>;
}

/// Nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity;

/// relu: 0 for what is not above it, but NaN for NaN, which a maximum would drop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relu;

/// relu of the sum with z.
#[derive(Clone, Copy, Debug)]
pub(super) struct AddRelu<'a, T> {
    pub(super) z: Source<'a, T>,
}

impl<T: Element> Epilogue<T> for Identity {
    #[inline(always)]
    unsafe fn finish<S: Level>(self, _level: S, _block: Block, value: Lanes<T::Param>) -> Lanes<T::Param> {
        value
    }
}

impl<T: Element> Epilogue<T> for Relu {
    #[inline(always)]
    unsafe fn finish<S: Level>(self, level: S, _block: Block, value: Lanes<T::Param>) -> Lanes<T::Param> {
        level.pass(value, value)
    }
}

impl<T: Element> Epilogue<T> for AddRelu<'_, T> {
    #[inline(always)]
    unsafe fn finish<S: Level>(self, level: S, block: Block, value: Lanes<T::Param>) -> Lanes<T::Param> {
        // SAFETY: the caller's promise.
        let z = unsafe { self.z.load_block(level, block) };
        let sum = level.add(value, z);
        level.pass(sum, sum)
    }
}

/// `fma(x - mean, scale, shift)`.
#[inline(always)]
pub(super) fn normalised<S: Level, P: Real>(
    level: S,
    centred: Lanes<P>,
    coefficients: &impl Coefficients<P>,
    position: usize,
) -> Lanes<P> {
    let scale = coefficients.at(SCALE, position);
    let shift = coefficients.at(SHIFT, position);
    level.mul_add(centred, scale, shift)
}

impl<T: Element, E: Epilogue<T>> Kernel for Apply<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        let mut table = Table::<_, NORMALISATION>::new();
        // SAFETY: what the channels are normalised by is complete before any of their elements is computed.
        unsafe { self.normalisation.fill(level, &self.task.channels, &mut table) };
        let visitor = ApplyBlock {
            level,
            elements: self.elements,
        };
        let aligned = if self.elements.streamed {
            Some(self.elements.y)
        } else {
            None
        };
        let order = Order::of(Some(self.elements.y), &[self.elements.x]);
        visit(level, self.geometry, self.task, &mut table, aligned, order, &visitor);
    }
}

struct ApplyBlock<'a, S, T: Element, E> {
    level: S,
    elements: Elements<'a, T, E>,
}

impl<S: Level, T: Element, E: Epilogue<T>> Visitor<T::Param> for ApplyBlock<'_, S, T, E> {
    #[inline(always)]
    fn visit(&self, block: Block, coefficients: &impl Coefficients<T::Param>, aligned: bool) {
        let Elements { x, y, epilogue, .. } = self.elements;
        let level = self.level;
        // SAFETY: the geometry's blocks are inside tensors of its shape, and no other task has this block. In place, it is
        // read before it is written. What is aligned is so for y.
        unsafe {
            let x = x.load_block(level, block);
            let x = centred(level, x, coefficients, block.position);
            let value = normalised(level, x, coefficients, block.position);
            let value = epilogue.finish(level, block, value);
            write(level, y, block, &value, aligned);
        }
    }
}
