//! Scratch memory of the passes of one shape.

use super::geometry::Geometry;
use super::memory::Sink;
use super::simd::{Lanes, Level};
use crate::element::{Element, Real};
use crate::shape::Shape;

/// What a step of one shape needs beside its operands, so that it allocates nothing.
#[derive(Debug)]
pub struct Workspace<T: Element> {
    /// Two numbers per part and channel: mean and variance, or the sums of the backward pass. There are few of them, and twice
    /// the digits cost nothing.
    partials: [Vec<f64>; 2],
    /// Two numbers per channel: what the backward pass subtracts from the gradient.
    gradient: [Vec<T::Param>; 2],
}

impl<T: Element> Workspace<T> {
    /// For tensors of `shape`.
    pub(super) fn new(shape: Shape) -> Self {
        let partials = if shape.is_empty() {
            0
        } else {
            Geometry::new(shape).parts() * shape.channels
        };
        let zeros = || vec![T::Param::ZERO; shape.channels];
        Self {
            partials: [vec![0.0; partials], vec![0.0; partials]],
            gradient: [zeros(), zeros()],
        }
    }

    /// Two numbers per part and channel.
    pub(super) fn partials(&mut self, channels: usize) -> Partials<'_, f64> {
        self.split(channels).0
    }

    /// Two vectors of one number per channel, by themselves.
    pub(super) fn vectors(&mut self) -> &mut [Vec<T::Param>; 2] {
        &mut self.gradient
    }

    /// Two numbers per part and channel, and two per channel.
    pub(super) fn split(&mut self, channels: usize) -> (Partials<'_, f64>, Partials<'_, T::Param>) {
        let [first, second] = &mut self.partials;
        let partials = Partials {
            numbers: [first.as_mut_slice().into(), second.as_mut_slice().into()],
            channels,
        };
        let [first, second] = &mut self.gradient;
        let gradient = Partials {
            numbers: [first.as_mut_slice().into(), second.as_mut_slice().into()],
            channels,
        };
        (partials, gradient)
    }
}

/// Two numbers for each channel of each part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partials<'a, P> {
    numbers: [Sink<'a, P>; 2],
    channels: usize,
}

impl<P: Real> Partials<'_, P> {
    /// The numbers of `count` channels from `channel` on.
    ///
    /// # Safety
    /// The part and the channels exist, and no other thread writes their numbers meanwhile.
    #[inline(always)]
    pub(super) unsafe fn load<S: Level>(&self, level: S, part: usize, channel: usize, count: usize) -> [Lanes<P>; 2] {
        let at = part * self.channels + channel;
        let [first, second] = self.numbers.map(Sink::source);
        // SAFETY: the caller's promise.
        unsafe { [first.load(level, at, count), second.load(level, at, count)] }
    }

    /// Writes the numbers of `count` channels from `channel` on.
    ///
    /// # Safety
    /// The part and the channels exist, and no other thread accesses their numbers meanwhile.
    #[inline(always)]
    pub(super) unsafe fn store<S: Level>(
        &self,
        level: S,
        part: usize,
        channel: usize,
        count: usize,
        values: &[Lanes<P>; 2],
    ) {
        for (numbers, values) in self.numbers.iter().zip(values) {
            // SAFETY: the caller's promise.
            unsafe { numbers.store(level, part * self.channels + channel, count, values) };
        }
    }
}
