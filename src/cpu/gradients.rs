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

/// Runs a backward pass with the instructions of `simd`, on one thread below `threads_from` bytes.
pub(super) fn backward<T: Element>(simd: Simd, threads_from: usize, pass: BackwardPass<'_, '_, Cpu, T>) {
    let (dy, dx) = match pass.flow {
        GradientFlow::Stops { dy } => (Source::from(dy), None),
        GradientFlow::Separate { dy, dx } => (Source::from(dy), Some(Sink::from(dx))),
        GradientFlow::InPlace { dy } => {
            let dx = Sink::from(dy);
            (dx.source(), Some(dx))
        }
    };
    let (statistics, training) = match pass.statistics {
        BackwardStatistics::Running { mean, variance } => {
            let eps = T::Param::from_f64(pass.eps);
            (Statistics::Running { mean, variance, eps }, false)
        }
        BackwardStatistics::Batch(saved) => {
            let statistics = Statistics::Batch {
                pivot: Source::from(saved.pivot.as_slice()),
                offset: Source::from(saved.mean_offset.as_slice()),
                invstd: Source::from(saved.invstd.as_slice()),
            };
            (statistics, true)
        }
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
        partials,
        gradient,
        parameters: pass.parameters.map(|parameters| Parameters {
            weight: Sink::from(parameters.weight),
            bias: Sink::from(parameters.bias),
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
    match pass.epilogue {
        BackwardEpilogue::Identity => gradients.run(Everywhere, None),
        BackwardEpilogue::Relu => gradients.run(Recomputed, None),
        BackwardEpilogue::AddRelu { y, dz } => gradients.run(Stored { y: y.into() }, dz.map(Sink::from)),
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
    partials: Partials<'a, T::Param>,
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
        self.simd.run(FinishSums::<T> {
            geometry: &self.geometry,
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
