//! The backward pass: sums per channel, then the gradients at x and z.

use std::ops::Range;

use super::apply::normalised;
use super::coefficients::{Centres, Coefficients, NORMALISATION, Normalisation, SCALE, Table, less_rest};
use super::elementwise::{Order, Visitor, centred, visit, write};
use super::geometry::{Geometry, Task};
use super::memory::{Sink, Source};
use super::reduce::{Block, Terms, Tree, interleaved_sums, pairwise, planar_sums};
use super::simd::{Kernel, Lanes, Level, blocks, lanes, narrow, splat, widen};
use super::workspace::Partials;
use crate::element::{Element, Real};

/// Index of what is subtracted from all gradients of a channel: Σ g / n, and what the rest of the mean makes of the slope.
const GRADIENT_MEAN: usize = NORMALISATION;
/// Index of what is added per unit of x - mean: -invstd · dweight / n.
const GRADIENT_SLOPE: usize = NORMALISATION + 1;
/// How many coefficients the gradient at x has.
const COEFFICIENTS: usize = NORMALISATION + 2;

/// Where the epilogue lets the gradient through.
pub(super) trait Mask<T: Element>: Copy + Send + Sync {
    /// The gradient `dy` of a block behind the mask, `x` being x - mean as [`centred`] has it.
    ///
    /// # Safety
    /// The block is inside the tensors, and no thread writes to what is read.
    unsafe fn pass<S: Level>(
        self,
        level: S,
        block: Block,
        dy: Lanes<T::Param>,
        x: Lanes<T::Param>,
        coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param>;
}

/// Everywhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Everywhere;

/// Where y, computed again from x, is not <= 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recomputed;

/// Where y, read, is not <= 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'a, T> {
    pub(super) y: Source<'a, T>,
}

impl<T: Element> Mask<T> for Everywhere {
    #[inline(always)]
    unsafe fn pass<S: Level>(
        self,
        _level: S,
        _block: Block,
        dy: Lanes<T::Param>,
        _x: Lanes<T::Param>,
        _coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param> {
        dy
    }
}

impl<T: Element> Mask<T> for Recomputed {
    #[inline(always)]
    unsafe fn pass<S: Level>(
        self,
        level: S,
        block: Block,
        dy: Lanes<T::Param>,
        x: Lanes<T::Param>,
        coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param> {
        // As it was stored: rounding can make a 0 of a positive value.
        let stored: [T; _] = narrow(level, &normalised(level, x, coefficients, block.position), block.lanes);
        level.pass(dy, widen(level, &stored, block.lanes))
    }
}

impl<T: Element> Mask<T> for Stored<'_, T> {
    #[inline(always)]
    unsafe fn pass<S: Level>(
        self,
        level: S,
        block: Block,
        dy: Lanes<T::Param>,
        _x: Lanes<T::Param>,
        _coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param> {
        // SAFETY: the caller's promise.
        level.pass(dy, unsafe { self.y.load_block(level, block) })
    }
}

/// Σ g and Σ g · (x - mean), the mean as it was rounded, in one task, into `partials`; g is dy behind the mask.
pub(super) struct TaskSums<'a, T: Element, E> {
    pub(super) geometry: &'a Geometry,
    pub(super) task: &'a Task,
    pub(super) normalisation: Normalisation<'a, T::Param>,
    pub(super) x: Source<'a, T>,
    pub(super) dy: Source<'a, T>,
    pub(super) mask: E,
    pub(super) partials: Partials<'a, f64>,
}

impl<T: Element, E: Mask<T>> Kernel for TaskSums<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        let Task { channels, chunks } = self.task;
        let mut table = Table::<T::Param, NORMALISATION>::new();
        // SAFETY: nothing writes statistics in a backward pass.
        unsafe { self.normalisation.fill(level, channels, &mut table) };
        let part = Geometry::part_of(chunks);
        match self.geometry {
            Geometry::Planar(planar) => {
                for (index, channel) in channels.clone().enumerate() {
                    let mut total = [0.0; 2];
                    for chunk in chunks.clone() {
                        let terms = GradientTerms {
                            level,
                            sums: &self,
                            coefficients: &table.uniform(index),
                            ahead: Some(planar.ahead(channel, chunk, chunks)),
                        };
                        let sums = planar_sums(level, planar.runs(channel, chunk), &terms);
                        total = [total[0] + sums[0].to_f64(), total[1] + sums[1].to_f64()];
                    }
                    let total = [splat(total[0]), splat(total[1])];
                    // SAFETY: no other task has this channel and part.
                    unsafe { self.partials.store(level, part, channel, 1, &total) };
                }
            }
            Geometry::Interleaved(interleaved) => {
                table.repeat(channels.len(), interleaved.repeats());
                let mut total = Table::<f64, 2>::new();
                let mut sums = Table::<T::Param, 2>::new();
                for chunk in chunks.clone() {
                    let pixels = interleaved.pixels(&(chunk..chunk + 1));
                    let terms = GradientTerms {
                        level,
                        sums: &self,
                        coefficients: &table,
                        ahead: None,
                    };
                    interleaved_sums(level, interleaved, channels, &pixels, &mut sums, &terms);
                    for (at, _) in blocks(channels.len()) {
                        for sum in 0..2 {
                            let added = sums.at(sum, at);
                            total.add(level, sum, at, lanes(|i| added[i].to_f64()));
                        }
                    }
                }
                for (at, count) in blocks(channels.len()) {
                    let total = [total.at(0, at), total.at(1, at)];
                    // SAFETY: no other task has these channels and this part.
                    unsafe { self.partials.store(level, part, channels.start + at, count, &total) };
                }
            }
        }
    }
}

/// g and x - mean. Meanwhile what is read next of x and dy is fetched: where runs are short for their distance, a machine
/// does not foresee it by itself.
struct GradientTerms<'a, 'b, S, T: Element, E, C> {
    level: S,
    sums: &'a TaskSums<'b, T, E>,
    coefficients: &'a C,
    /// How far behind a value is the one that is read next in its place.
    ahead: Option<usize>,
}

impl<S: Level, T: Element, E: Mask<T>, C: Coefficients<T::Param>> Terms<T::Param>
    for GradientTerms<'_, '_, S, T, E, C>
{
    #[inline(always)]
    fn terms(&self, block: Block) -> [Lanes<T::Param>; 2] {
        let Self {
            level,
            sums,
            coefficients,
            ahead,
        } = *self;
        if let Some(ahead) = ahead {
            sums.x.prefetch(level, block.at.wrapping_add(ahead));
            sums.dy.prefetch(level, block.at.wrapping_add(ahead));
        }
        // SAFETY: the geometry's blocks are inside tensors of its shape. No other task has this block, so that none writes
        // there, in place or not.
        unsafe {
            let x = sums.x.load_block(level, block);
            let dy = sums.dy.load_block(level, block);
            let x = centred(level, x, coefficients, block.position);
            let gradient = sums.mask.pass(level, block, dy, x, coefficients);
            [gradient, x]
        }
    }
}

/// What becomes of the sums: the gradients at weight and bias, and what the gradient at x needs of them.
pub(super) struct FinishSums<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    /// What the sums are divided by for the gradient at x.
    pub(super) values: usize,
    pub(super) channels: Range<usize>,
    pub(super) normalisation: Normalisation<'a, T::Param>,
    pub(super) partials: Partials<'a, f64>,
    pub(super) gradient: Partials<'a, T::Param>,
    pub(super) parameters: Option<Parameters<'a, T::Param>>,
}

/// Where the gradients at weight and bias go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameters<'a, P> {
    pub(super) weight: Sink<'a, P>,
    pub(super) bias: Sink<'a, P>,
    pub(super) accumulate: bool,
}

impl<T: Element> Kernel for FinishSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        let values = self.values as f64;
        for (at, count) in blocks(self.channels.len()) {
            let channel = self.channels.start + at;
            let sums = PartSums {
                level,
                partials: self.partials,
                channel,
                count,
            };
            let [bias, products] = pairwise(&sums, self.geometry.parts());
            // SAFETY: nothing writes statistics in a backward pass.
            let Centres { rest, invstd, .. } = unsafe { self.normalisation.centres(level, channel, count) };
            let weight: Lanes<T::Param> = lanes(|i| {
                let products = less_rest(products[i], rest[i].to_f64(), bias[i]);
                T::Param::from_f64(products * invstd[i].to_f64())
            });
            let bias: Lanes<T::Param> = lanes(|i| T::Param::from_f64(bias[i]));
            // Ranks that meet tell each other the sums in this precision. Of one rank's the quotients are the same.
            let slope = lanes(|i| -(invstd[i] * weight[i]));
            let gradient = [bias, slope].map(|sums| lanes(|i| T::Param::from_f64(sums[i].to_f64() / values)));
            // SAFETY: no other task has these channels.
            unsafe {
                self.gradient.store(level, 0, channel, count, &gradient);
                if let Some(parameters) = self.parameters {
                    parameters.put(level, parameters.weight, channel, count, &weight);
                    parameters.put(level, parameters.bias, channel, count, &bias);
                }
            }
        }
    }
}

/// The sums of all parts of some channels.
struct PartSums<'a, S> {
    level: S,
    partials: Partials<'a, f64>,
    channel: usize,
    count: usize,
}

impl<S: Level> Tree for PartSums<'_, S> {
    type Node = [Lanes<f64>; 2];

    #[inline(always)]
    fn leaf(&self, part: usize) -> Self::Node {
        // SAFETY: all parts of these channels have been computed, and nothing writes them any more.
        unsafe { self.partials.load(self.level, part, self.channel, self.count) }
    }

    #[inline(always)]
    fn join(&self, first: Self::Node, second: Self::Node) -> Self::Node {
        [
            lanes(|i| first[0][i] + second[0][i]),
            lanes(|i| first[1][i] + second[1][i]),
        ]
    }
}

impl<P: Real> Parameters<'_, P> {
    /// Writes or adds the gradients of `count` channels from `channel` on.
    ///
    /// # Safety
    /// The channels exist, and no other thread accesses their gradients meanwhile.
    #[inline(always)]
    unsafe fn put<S: Level>(&self, level: S, to: Sink<'_, P>, channel: usize, count: usize, values: &Lanes<P>) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.accumulate {
                let before = to.source().load(level, channel, count);
                to.store(level, channel, count, &lanes(|i| before[i] + values[i]));
            } else {
                to.store(level, channel, count, values);
            }
        }
    }
}

/// `dx = weight · invstd · (g - (Σ g + x̂ · dweight) / n)` and `dz = g` for the elements of one task; g is dy behind the
/// mask. In evaluation, where the statistics are constants, `dx = weight · invstd · g`.
pub(super) struct ApplyGradient<'a, T: Element, E> {
    pub(super) geometry: &'a Geometry,
    pub(super) task: &'a Task,
    pub(super) normalisation: Normalisation<'a, T::Param>,
    /// Σ g / n and -invstd · dweight / n per channel, in training.
    pub(super) gradient: Option<Partials<'a, T::Param>>,
    pub(super) elements: GradientElements<'a, T, E>,
}

/// The tensors of a backward pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct GradientElements<'a, T: Element, E> {
    pub(super) x: Source<'a, T>,
    pub(super) dy: Source<'a, T>,
    pub(super) mask: E,
    pub(super) dx: Option<Sink<'a, T>>,
    pub(super) dz: Option<Sink<'a, T>>,
    /// Whether dx and dz are written past the caches.
    pub(super) streamed: bool,
}

impl<T: Element, E: Mask<T>> Kernel for ApplyGradient<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        let channels = &self.task.channels;
        let mut table = Table::<_, COEFFICIENTS>::new();
        // SAFETY: nothing writes statistics in a backward pass.
        unsafe { self.normalisation.fill(level, channels, &mut table) };
        match self.gradient {
            Some(gradient) => {
                for (at, count) in blocks(channels.len()) {
                    // SAFETY: the numbers of these channels are complete before any of their elements is computed.
                    let ([mean, slope], Centres { rest, .. }) = unsafe {
                        (
                            gradient.load(level, 0, channels.start + at, count),
                            self.normalisation.centres(level, channels.start + at, count),
                        )
                    };
                    table.set_coefficient(GRADIENT_MEAN, at, &lanes(|i| less_rest(mean[i], -rest[i], slope[i])));
                    table.set_coefficient(GRADIENT_SLOPE, at, &slope);
                }
                self.visit::<S, true>(level, &mut table);
            }
            None => self.visit::<S, false>(level, &mut table),
        }
    }
}

impl<T: Element, E: Mask<T>> ApplyGradient<'_, T, E> {
    #[inline(always)]
    fn visit<S: Level, const TRAINING: bool>(&self, level: S, table: &mut Table<T::Param, COEFFICIENTS>) {
        let elements = self.elements;
        let aligned = if elements.streamed {
            elements.dx.or(elements.dz)
        } else {
            None
        };
        let order = Order::of(elements.dx.or(elements.dz), &[elements.x, elements.dy]);
        let visitor = GradientBlock::<_, _, _, TRAINING> { level, elements };
        visit(level, self.geometry, self.task, table, aligned, order, &visitor);
    }
}

struct GradientBlock<'a, S, T: Element, E, const TRAINING: bool> {
    level: S,
    elements: GradientElements<'a, T, E>,
}

impl<S: Level, T: Element, E: Mask<T>, const TRAINING: bool> Visitor<T::Param>
    for GradientBlock<'_, S, T, E, TRAINING>
{
    #[inline(always)]
    fn visit(&self, block: Block, coefficients: &impl Coefficients<T::Param>, aligned: bool) {
        let Self { level, elements } = *self;
        // SAFETY: the geometry's blocks are inside tensors of its shape, and no other task has this block. In place, it is
        // read before it is written. What is aligned is so for dx, or for dz if there is no dx.
        unsafe {
            let x = elements.x.load_block(level, block);
            let dy = elements.dy.load_block(level, block);
            let x = centred(level, x, coefficients, block.position);
            let gradient = elements.mask.pass(level, block, dy, x, coefficients);
            if let Some(dx) = elements.dx {
                let scale = coefficients.at(SCALE, block.position);
                let value = if TRAINING {
                    let mean = coefficients.at(GRADIENT_MEAN, block.position);
                    let slope = coefficients.at(GRADIENT_SLOPE, block.position);
                    level.mul(scale, level.mul_add(x, slope, level.sub(gradient, mean)))
                } else {
                    level.mul(scale, gradient)
                };
                write(level, dx, block, &value, aligned);
            }
            if let Some(dz) = elements.dz {
                let alike = |dx: Sink<'_, T>| dx.until_line(block.at) == dz.until_line(block.at);
                let aligned = aligned && elements.dx.is_none_or(alike);
                write(level, dz, block, &gradient, aligned);
            }
        }
    }
}
