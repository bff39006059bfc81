//! Scratch memory of one step: partial results, counters, and what one kernel leaves for the next.

use cudarc::driver::CudaSlice;

use super::Cuda;
use super::plan::{Alignment, Choice, Operation, Plan, Problem, Stage};
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::shape::Shape;

/// What passes over one shape need beside their operands. It belongs to a [`Saved`](crate::Saved): passes that overlap
/// must not share it.
#[derive(Debug)]
pub struct Workspace<T: Element> {
    /// Partial results: how many values each stands for.
    pub(super) partial_weight: CudaSlice<u64>,
    /// Partial results: mean, or sum of gradients.
    pub(super) partial_first: CudaSlice<T::Param>,
    /// Partial results: variance, or sum of gradients times distances.
    pub(super) partial_second: CudaSlice<T::Param>,
    /// Blocks that have arrived, per strip. Zero between passes, as are the next two: whoever is last resets the counter.
    pub(super) arrived: CudaSlice<u32>,
    /// Per strip: the total of a grid team being there, and blocks that have read it.
    pub(super) ready: CudaSlice<u32>,
    /// One number: strips that a resident kernel is done with.
    pub(super) finished: CudaSlice<u32>,
    /// Per channel: the batch variance, or the sum of gradients.
    pub(super) first: CudaSlice<T::Param>,
    /// Per channel: the sum of gradients times distances.
    pub(super) second: CudaSlice<T::Param>,
    /// One number: the factor of this step where the momentum is a cumulative average.
    pub(super) momentum: CudaSlice<T::Param>,
}

impl<T: Element> Workspace<T> {
    /// Room for every pass over the shape, however its operands are aligned.
    pub(super) fn new(cuda: &Cuda, shape: Shape, epilogue: Epilogue) -> Result<Self> {
        let (mut partials, mut counters) = (1, 1);
        for operation in [Operation::Train, Operation::Backward, Operation::BackwardEval] {
            // The part of a synchronised pass may be cut up in another way than the whole of one.
            for (alignment, stage) in Alignment::all(T::DTYPE)
                .flat_map(|alignment| [Stage::Whole, Stage::Rank].map(|stage| (alignment, stage)))
            {
                // A batch that cannot be normalised has no plan, and the pass will say so.
                if (operation, stage) == (Operation::Train, Stage::Whole) && shape.values_per_channel()? == 1 {
                    continue;
                }
                let problem = Problem {
                    alignment,
                    stage,
                    ..Problem::new(operation, shape, T::DTYPE).epilogue(epilogue)
                };
                // What the driver finds too large takes the general path.
                for choice in [cuda.choice, Choice::GENERAL] {
                    let plan = Plan::chosen(&problem, &cuda.device.limits, &choice)?;
                    partials = plan.partials().max(partials);
                    counters = plan.counters().max(counters);
                }
            }
        }
        Ok(Self {
            partial_weight: cuda.allocate(partials as usize)?,
            partial_first: cuda.allocate(partials as usize)?,
            partial_second: cuda.allocate(partials as usize)?,
            arrived: cuda.allocate(counters as usize)?,
            ready: cuda.allocate(counters as usize)?,
            finished: cuda.allocate(1)?,
            first: cuda.allocate(shape.channels)?,
            second: cuda.allocate(shape.channels)?,
            momentum: cuda.allocate(1)?,
        })
    }
}
