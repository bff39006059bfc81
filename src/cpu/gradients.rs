//! The backward pass: what the module asks for, as a [`Pass`] over tasks.

use std::ops::Range;

use super::Cpu;
use super::backward::{
    ApplyGradient, Everywhere, FinishSums, GradientElements, Mask, Parameters, Recomputed, Stored, TaskSums,
};
use super::coefficients::{Normalisation, Statistics};
use super::geometry::{Geometry, Task};
use super::memory::{Sink, Source};
use super::schedule::{Pass, Phases, run};
use super::simd::{Fence, Simd};
use super::streams;
use super::workspace::Partials;
use crate::backend::{BackwardEpilogue, BackwardPass, BackwardStatistics, GradientFlow};
use crate::element::{Element, Real};

/// Which part of a backward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// A synchronised pass before the ranks meet: the sums, not yet divided by the number of values.
    Sums,
    /// A synchronised pass after they have met: the gradients at x and z.
    Elements,
    /// Its end: the gradients at weight and bias. Last, so that they are as they were if the ranks do not meet.
    Parameters,
}

/// Runs a backward pass, or a part of one, with the instructions of `simd`, on one thread below `threads_from` bytes.
pub(super) fn backward<T: Element>(
    simd: Simd,
    threads_from: usize,
    pass: &mut BackwardPass<'_, '_, Cpu, T>,
    part: Part,
) {
    let (dy, dx) = match &mut pass.flow {
        GradientFlow::Stops { dy } => (Source::from(*dy), None),
        GradientFlow::Separate { dy, dx } => (Source::from(*dy), Some(Sink::from(&mut **dx))),
        GradientFlow::InPlace { dy } => {
            let dx = Sink::from(&mut **dy);
            (dx.source(), Some(dx))
        }
    };
    let (statistics, training) = match pass.statistics {
        BackwardStatistics::Running { mean, variance } => {
            let eps = T::Param::from_f64(pass.eps);
            (Statistics::Running { mean, variance, eps }, false)
        }
        BackwardStatistics::Batch(saved) => (Statistics::of_batch(saved), true),
    };
    let (partials, gradient) = pass.workspace.split(pass.shape.channels);
    let geometry = Geometry::new(pass.shape);
    let gradients = Gradients {
        simd,
        threads_from,
        geometry,
        normalisation: Normalisation {
            statistics,
            weight: pass.weight,
            bias: pass.bias,
        },
        training,
        part,
        partials,
        gradient,
        parameters: pass
            .parameters
            .as_mut()
            .filter(|_| part != Part::Sums)
            .map(|parameters| Parameters {
                weight: Sink::from(&mut *parameters.weight),
                bias: Sink::from(&mut *parameters.bias),
                accumulate: parameters.accumulate,
            }),
        elements: GradientElements {
            x: Source::from(pass.x),
            dy,
            mask: (),
            dx,
            dz: None,
            streamed: streams::<T>(&geometry),
        },
    };
    match &mut pass.epilogue {
        BackwardEpilogue::Identity => gradients.run(Everywhere, None),
        BackwardEpilogue::Relu => gradients.run(Recomputed, None),
        BackwardEpilogue::AddRelu { y, dz } => {
            let dz = dz.as_mut().map(|dz| Sink::from(&mut **dz));
            gradients.run(Stored { y: (*y).into() }, dz);
        }
    }
}

/// A backward pass in the backend's terms.
struct Gradients<'a, T: Element, E> {
    simd: Simd,
    threads_from: usize,
    geometry: Geometry,
    normalisation: Normalisation<'a, T::Param>,
    /// Whether the gradient flows through the statistics too.
    training: bool,
    part: Part,
    partials: Partials<'a, f64>,
    gradient: Partials<'a, T::Param>,
    parameters: Option<Parameters<'a, T::Param>>,
    elements: GradientElements<'a, T, E>,
}

impl<'a, T: Element> Gradients<'a, T, ()> {
    fn run<E: Mask<T>>(self, mask: E, dz: Option<Sink<'a, T>>) {
        let GradientElements {
            x, dy, dx, streamed, ..
        } = self.elements;
        let gradients = Gradients {
            simd: self.simd,
            threads_from: self.threads_from,
            geometry: self.geometry,
            normalisation: self.normalisation,
            training: self.training,
            part: self.part,
            partials: self.partials,
            gradient: self.gradient,
            parameters: self.parameters,
            elements: GradientElements {
                x,
                dy,
                mask,
                dx,
                dz,
                streamed,
            },
        };
        if let Some(phases) = gradients.phases() {
            run(&self.geometry, phases, self.threads_from, &gradients);
        }
    }
}

impl<T: Element, E: Mask<T>> Gradients<'_, T, E> {
    /// What there is to do for what was asked.
    fn phases(&self) -> Option<Phases> {
        match self.part {
            Part::Whole => {}
            Part::Sums => return Some(Phases::Reduce),
            Part::Elements => return Some(Phases::Apply),
            Part::Parameters => return self.parameters.is_some().then_some(Phases::Finish),
        }
        let dx = self.elements.dx.is_some();
        let elements = dx || self.elements.dz.is_some();
        match (self.parameters.is_some(), elements) {
            _ if dx && self.training => Some(Phases::ReduceThenApply),
            (true, true) => Some(Phases::Both),
            (true, false) => Some(Phases::Reduce),
            (false, true) => Some(Phases::Apply),
            (false, false) => None,
        }
    }
}

impl<T: Element, E: Mask<T>> Pass for Gradients<'_, T, E> {
    fn bytes_per_channel(&self) -> usize {
        2 * self.geometry.values() * size_of::<T>()
    }

    fn reduce(&self, task: &Task) {
        self.simd.run(TaskSums {
            geometry: &self.geometry,
            task,
            normalisation: self.normalisation,
            x: self.elements.x,
            dy: self.elements.dy,
            mask: self.elements.mask,
            partials: self.partials,
        });
    }

    fn finish(&self, channels: Range<usize>) {
        // All ranks' number of values is not known before they meet.
        let values = if self.part == Part::Sums {
            1
        } else {
            self.geometry.values()
        };
        self.simd.run(FinishSums::<T> {
            geometry: &self.geometry,
            values,
            channels,
            normalisation: self.normalisation,
            partials: self.partials,
            gradient: self.gradient,
            parameters: self.parameters,
        });
    }

    fn apply(&self, task: &Task) {
        self.simd.run(ApplyGradient {
            geometry: &self.geometry,
            task,
            normalisation: self.normalisation,
            gradient: (self.training && self.elements.dx.is_some()).then_some(self.gradient),
            elements: self.elements,
        });
    }

    fn publish(&self) {
        self.simd.run(Fence);
    }
}
