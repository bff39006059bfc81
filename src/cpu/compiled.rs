//! The passes, compiled for each element type in this crate.
//!
//! A generic function is compiled by whoever names its types: every program that normalises, and each of its tests, would
//! compile every instruction set's kernels again. So the types are named here.

use half::{bf16, f16};

use super::gradients::Part;
use super::simd::Simd;
use super::workspace::Workspace;
use super::{Cpu, forward, gradients, synchronised};
use crate::backend::{BackwardPass, BatchStatistics, ForwardPass};
use crate::element::Element;
use crate::shape::Shape;

/// The passes over tensors of this type, with the best instructions of the machine, on one thread below `threads_from` bytes.
#[doc(hidden)]
pub trait Passes: Sized {
    /// See [`forward::forward`].
    fn run_forward(threads_from: usize, pass: ForwardPass<'_, '_, Cpu, Self>)
    where
        Self: Element;

    /// See [`gradients::backward`].
    fn run_backward(threads_from: usize, pass: &mut BackwardPass<'_, '_, Cpu, Self>, part: Part)
    where
        Self: Element;

    /// See [`synchronised::rank_statistics`].
    fn find_rank_statistics(
        threads_from: usize,
        shape: Shape,
        x: &[Self],
        saved: &mut BatchStatistics<Cpu, Self>,
        workspace: &mut Workspace<Self>,
    ) where
        Self: Element;
}

macro_rules! compile {
    ($($element:ty),+) => {
        $(impl Passes for $element {
            fn run_forward(threads_from: usize, pass: ForwardPass<'_, '_, Cpu, Self>) {
                forward::forward(Simd::detect(), threads_from, pass);
            }

            fn run_backward(threads_from: usize, pass: &mut BackwardPass<'_, '_, Cpu, Self>, part: Part) {
                gradients::backward(Simd::detect(), threads_from, pass, part);
            }

            fn find_rank_statistics(
                threads_from: usize,
                shape: Shape,
                x: &[Self],
                saved: &mut BatchStatistics<Cpu, Self>,
                workspace: &mut Workspace<Self>,
            ) {
                synchronised::rank_statistics(Simd::detect(), threads_from, shape, x, saved, workspace);
            }
        })+
    };
}

compile!(f16, bf16, f32, f64);
