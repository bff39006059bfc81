//! The halves of a synchronised pass, and what joins the ranks' messages between them.
//!
//! Kernels write their results straight into this rank's message, so that no launch is spent on packing it. Nothing here
//! knows how many values the other ranks have: that is in their messages, on the device.

use std::sync::Arc;

use cudarc::driver::CudaView;
use cudarc::driver::sys::CUdeviceptr;

use super::Cuda;
use super::arguments::{self, Gathered};
use super::device::Prepared;
use super::launch::{BackwardPart, Operand, WorkspaceOperands, alignment, launch_kernel};
use super::plan::{Alignment, Operation, Problem, Stage, Tracking};
use super::workspace::Workspace;
use crate::backend::{BackwardPass, BatchStatistics, RunningUpdate};
use crate::config::Momentum;
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::shape::Shape;
use crate::sync::{Exchange, Kind, Layout, MergeStatistics, SyncBackend};

impl SyncBackend for Cuda {
    fn prepare_synchronised<T: Element>(&self, shape: Shape, epilogue: Epilogue, ranks: usize) -> Result<Workspace<T>> {
        let workspace = Workspace::new(self, shape, epilogue)?;
        for operation in [Operation::Train, Operation::Backward] {
            for stage in [Stage::Rank, Stage::Merge { ranks }, Stage::Apply, Stage::Update] {
                self.prepared(Problem {
                    alignment: Alignment::FULL,
                    ..problem::<T>(operation, stage, shape).epilogue(epilogue)
                })?;
            }
        }
        Ok(workspace)
    }

    fn ready_to_meet(&self) -> Result<()> {
        self.check_capture()
    }

    fn rank_statistics<T: Element>(
        &self,
        shape: Shape,
        x: &CudaView<'_, T>,
        saved: &mut BatchStatistics<Self, T>,
        workspace: &mut Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let stream = &**self.stream();
        let x = Operand::read(x, stream);
        // Of this rank alone it is of no use; the kernel writes it all the same, and the merge writes over it.
        let invstd = Operand::buffer_mut(&mut saved.invstd, stream);
        let workspace = WorkspaceOperands::new(workspace, stream);
        let own = Operand::buffer_mut(&mut exchange.statistics, stream);
        let [pivot, mean_offset, variance] = [0, 1, 2].map(|vector| vector_of(&own, exchange.layout, vector));
        let prepared = self.prepared(Problem {
            alignment: alignment([x.present()]),
            ..problem::<T>(Operation::Train, Stage::Rank, shape)
        })?;
        self.run(&prepared, |stream, function, launch| {
            let arguments = arguments::Statistics {
                x: x.address,
                pivot,
                mean_offset,
                invstd: invstd.address,
                variance,
                partials: workspace.partials(),
                batches: 0,
                momentum: 0,
                eps: 0.0,
                tiling: launch.tiling,
            };
            launch_kernel(stream, function, launch, &arguments)
        })
    }

    fn merge_statistics<T: Element>(
        &self,
        pass: MergeStatistics<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let stream = &**self.stream();
        let saved = pass.saved;
        let pivot = Operand::buffer_mut(&mut saved.pivot, stream);
        let mean_offset = Operand::buffer_mut(&mut saved.mean_offset, stream);
        let invstd = Operand::buffer_mut(&mut saved.invstd, stream);
        let workspace = WorkspaceOperands::new(pass.workspace, stream);
        let batches = Operand::read_if(pass.batches.as_ref(), stream);
        let messages = Operand::buffer(&exchange.gathered, stream);
        let outcome = Operand::buffer_mut(&mut exchange.outcome, stream);
        let layout = exchange.layout;
        let arguments = arguments::MergeStatistics {
            gathered: gathered(&messages, layout, Kind::Statistics),
            pivot: pivot.address,
            mean_offset: mean_offset.address,
            invstd: invstd.address,
            variance: workspace.first.address,
            outcome: outcome.address,
            batches: batches.address,
            momentum: workspace.momentum.address,
            eps: pass.eps,
        };
        let ranks = layout.ranks();
        let tracking = match batches.present() {
            Some(_) => Tracking::CumulativeAverage,
            None => Tracking::Momentum,
        };
        let prepared = self.prepared(Problem {
            tracking,
            ..problem::<T>(Operation::Train, Stage::Merge { ranks }, pass.shape)
        })?;
        self.run(&prepared, |stream, function, launch| {
            launch_kernel(stream, function, launch, &arguments)
        })
    }

    fn update_running<T: Element>(
        &self,
        shape: Shape,
        saved: &BatchStatistics<Self, T>,
        workspace: &mut Workspace<T>,
        mut update: RunningUpdate<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let stream = &**self.stream();
        let mean = Operand::written(&mut update.mean, stream);
        let variance = Operand::written(&mut update.variance, stream);
        let batches = Operand::written(&mut update.batches, stream);
        let pivot = Operand::buffer(&saved.pivot, stream);
        let mean_offset = Operand::buffer(&saved.mean_offset, stream);
        let workspace = WorkspaceOperands::new(workspace, stream);
        let outcome = Operand::buffer(&exchange.outcome, stream);
        let (tracking, cumulative, momentum) = match update.momentum {
            Momentum::Factor(momentum) => (Tracking::Momentum, 0, momentum),
            Momentum::CumulativeAverage => (Tracking::CumulativeAverage, workspace.momentum.address, 0.0),
        };
        let arguments = arguments::UpdateRunning {
            mean: mean.address,
            variance: variance.address,
            batches: batches.address,
            pivot: pivot.address,
            mean_offset: mean_offset.address,
            batch_variance: workspace.first.address,
            cumulative,
            momentum,
            skip_non_finite: u64::from(update.skip_non_finite),
            outcome: outcome.address,
            channels: shape.channels as u64,
        };
        let prepared = self.prepared(Problem {
            tracking,
            ..problem::<T>(Operation::Train, Stage::Update, shape)
        })?;
        self.run(&prepared, |stream, function, launch| {
            launch_kernel(stream, function, launch, &arguments)
        })
    }

    fn rank_sums<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let own = Operand::buffer_mut(&mut exchange.sums, self.stream());
        let [sum, sum_centred] = [0, 1].map(|vector| vector_of(&own, exchange.layout, vector));
        self.launch_backward(pass, BackwardPart::Sums { sum, sum_centred })
    }

    fn merge_sums<T: Element>(
        &self,
        shape: Shape,
        workspace: &mut Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let stream = &**self.stream();
        let workspace = WorkspaceOperands::new(workspace, stream);
        let messages = Operand::buffer(&exchange.gathered, stream);
        let outcome = Operand::buffer_mut(&mut exchange.outcome, stream);
        let arguments = arguments::MergeSums {
            gathered: gathered(&messages, exchange.layout, Kind::Sums),
            mean: workspace.first.address,
            mean_centred: workspace.second.address,
            outcome: outcome.address,
        };
        let ranks = exchange.layout.ranks();
        let prepared = self.prepared(problem::<T>(Operation::Backward, Stage::Merge { ranks }, shape))?;
        self.run(&prepared, |stream, function, launch| {
            launch_kernel(stream, function, launch, &arguments)
        })
    }

    fn rank_gradient<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let own = Operand::buffer(&exchange.sums, self.stream());
        let [sum, sum_centred] = [0, 1].map(|vector| vector_of(&own, exchange.layout, vector));
        self.launch_backward(pass, BackwardPart::Elements { sum, sum_centred })
    }
}

impl Cuda {
    fn prepared(&self, problem: Problem) -> Result<Arc<Prepared>> {
        self.device.prepare(&problem, &self.choice)
    }
}

/// A part of a synchronised pass over tensors of this shape.
fn problem<T: Element>(operation: Operation, stage: Stage, shape: Shape) -> Problem {
    Problem {
        stage,
        ..Problem::new(operation, shape, T::DTYPE)
    }
    .canonical()
}

/// Where a vector of a message lies.
fn vector_of(message: &Operand<'_>, layout: Layout, vector: usize) -> CUdeviceptr {
    message.address + layout.offset(vector) as CUdeviceptr
}

fn gathered(messages: &Operand<'_>, layout: Layout, kind: Kind) -> Gathered {
    Gathered {
        messages: messages.address,
        ranks: layout.ranks() as u64,
        bytes: (layout.words() * size_of::<i64>()) as u64,
        tag: layout.tag(kind),
        channels: layout.channels() as u64,
    }
}
