//! Synchronised batch norm: several ranks, each with its part of a batch, normalise by the statistics of the whole.

mod collective;
mod message;
mod thread_group;

pub use self::collective::Collective;
pub use self::message::Exchange;
pub(crate) use self::message::{Kind, Layout, ONE_VALUE, RANKS_DISAGREE, SOUND};
pub use self::thread_group::ThreadRank;

use std::sync::atomic::{AtomicU16, Ordering};

use crate::backend::{
    AsTensor, AsTensorMut, Backend, BackwardPass, BackwardStatistics, BatchStatistics, ForwardPass, ForwardStatistics,
    GradientFlow, InputOutput, RunningUpdate,
};
use crate::batch_norm::{BatchNorm2d, Saved};
use crate::config::{BatchNorm2dConfig, Momentum};
use crate::element::{Element, Real};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::request::{Backward, Forward, Gradients};
use crate::shape::Shape;

/// What a device must be able to do beside [`Backend`] to share a batch with other ranks. Both backends can.
pub trait SyncBackend: Backend {
    /// Compiles, loads and allocates what synchronised training of a shape needs. The batch may be empty.
    ///
    /// # Errors
    /// [`Error::Compile`], [`Error::OutOfMemory`] and the driver's.
    #[doc(hidden)]
    fn prepare_synchronised<T: Element>(
        &self,
        shape: Shape,
        epilogue: Epilogue,
        ranks: usize,
    ) -> Result<Self::Workspace<T>>;

    /// Refuses what would go wrong in the midst of a pass, before anything has been launched or sent.
    ///
    /// # Errors
    /// [`Error::CaptureWithEventTracking`] on CUDA; the driver's.
    #[doc(hidden)]
    fn ready_to_meet(&self) -> Result<()>;

    /// Writes the statistics of this rank's batch, which is not empty, to its message.
    ///
    /// # Errors
    /// The driver's.
    #[doc(hidden)]
    fn rank_statistics<T: Element>(
        &self,
        shape: Shape,
        x: &Self::View<'_, T>,
        saved: &mut BatchStatistics<Self, T>,
        workspace: &mut Self::Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;

    /// Makes `saved` the statistics of all ranks' values, from their messages.
    ///
    /// # Errors
    /// The driver's; on the CPU, where the outcome is known at once, [`Error::RanksDisagree`] and
    /// [`Error::OneValuePerChannel`] too.
    #[doc(hidden)]
    fn merge_statistics<T: Element>(
        &self,
        pass: MergeStatistics<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;

    /// Moves the running statistics towards those of all ranks, unless these have no value, or one.
    ///
    /// # Errors
    /// The driver's.
    #[doc(hidden)]
    fn update_running<T: Element>(
        &self,
        shape: Shape,
        saved: &BatchStatistics<Self, T>,
        workspace: &mut Self::Workspace<T>,
        update: RunningUpdate<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;

    /// Writes the sums over the gradient of this rank's batch, which is not empty, to its message.
    ///
    /// # Errors
    /// The driver's.
    #[doc(hidden)]
    fn rank_sums<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;

    /// Leaves in `workspace` what [`SyncBackend::rank_gradient`] needs of all ranks' sums.
    ///
    /// # Errors
    /// The driver's; on the CPU [`Error::RanksDisagree`] too.
    #[doc(hidden)]
    fn merge_sums<T: Element>(
        &self,
        shape: Shape,
        workspace: &mut Self::Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;

    /// The gradient at x (and at the residual) of this rank's batch, which is not empty, and last the gradients at weight and
    /// bias where they are wanted: so that they are as they were if the ranks do not meet.
    ///
    /// # Errors
    /// The driver's.
    #[doc(hidden)]
    fn rank_gradient<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()>;
}

/// What becomes of all ranks' statistics.
#[doc(hidden)]
pub struct MergeStatistics<'a, B: Backend, T: Element> {
    /// The shape of this rank's batch.
    pub shape: Shape,
    /// Added to the variance.
    pub eps: f64,
    /// Gets them.
    pub saved: &'a mut BatchStatistics<B, T>,
    /// Scratch; keeps the variance for [`SyncBackend::update_running`].
    pub workspace: &'a mut B::Workspace<T>,
    /// `num_batches_tracked` before this batch, if the running statistics move by a cumulative average.
    pub batches: Option<B::View<'a, i64>>,
}

/// Batch normalisation in training over several ranks (GPUs, machines, threads): each has its part of a batch, and all
/// normalise by the statistics of the whole, as PyTorch's `torch.nn.SyncBatchNorm`.
///
/// It is a [`BatchNorm2d`] with a [`Collective`]: [`SyncBatchNorm::new`] takes both, as
/// `torch.nn.SyncBatchNorm.convert_sync_batchnorm` takes a module. Every rank has one, with the same configuration.
/// Whatever is not training is the module's own: [`SyncBatchNorm::module`].
///
/// # What is synchronised
///
/// - **Forward**: each rank finds the count, pivot, mean and variance of its own batch; one all-gather (16 bytes and three
///   numbers per channel from each rank) brings them to all; each joins them in the order of the ranks, in double precision,
///   and normalises its batch. So all ranks have the same bits in [`SyncSaved::mean`] and in the running statistics, on every
///   run. The running variance is the unbiased one of the whole batch.
/// - **Backward**: the gradient at x needs Σ dy and Σ dy · (x - mean) of the whole batch. They are gathered and added up in
///   the same way. A pass that does not ask for the gradient at x has no use for them and meets nobody.
/// - **Not synchronised: the gradients at weight and bias.** Each rank gets the sums over its own batch, as in PyTorch, where
///   `DistributedDataParallel` averages them with all other gradients. Add (or average) them over the ranks before the
///   optimiser's step, or weights drift apart.
///
/// Batches may differ in size, from rank to rank and from step to step; a rank may have an empty one. It then meets the
/// others all the same, and its running statistics move as theirs do. Each rank prepares for its own shape; H and W need not
/// agree either. A batch that is empty on all ranks changes nothing.
///
/// # When something goes wrong
///
/// - Ranks whose modules differ (channels, parameter type, eps, momentum, affine and so on) get [`Error::RanksDisagree`] from
///   [`SyncBatchNorm::new`], every one of them.
/// - A rank whose arguments are wrong gets its error before it meets the others, and may call again: they wait.
/// - Messages of all passes have the same length, and say which pass of which module they belong to. So a rank that runs
///   another pass than the others, or that of another module of as many channels, is found out: at once on the CPU, where all ranks get [`Error::RanksDisagree`]; on CUDA,
///   where no pass waits for the device, results are NaN, the running statistics stay, and [`SyncSaved::check`] says why.
/// - One value per channel on one rank is enough, if others have more. One on all ranks together is
///   [`Error::OneValuePerChannel`]: at once on the CPU, and on CUDA by [`SyncSaved::check`]; there y is the bias.
/// - Ranks that are gone or silent are the collective's business. Those of a [`ThreadRank`] group get [`Error::Collective`]
///   when one of them is dropped or panics, or after the group's time is up. NCCL's own calls return errors that it knows of;
///   a rank that never comes keeps the others' GPUs waiting in NCCL's kernel, and it is for the program to end that (give
///   each step a time limit, and abort the communicator or the process): see `examples/nccl_ranks.rs`.
/// - After an error the running statistics are as they were, unless the error is of a launch that the driver had already
///   taken. Ranks that had met by then may have gone on.
///
/// # Graphs
///
/// A pass allocates nothing and waits for nothing if its collective does not: with NCCL a step can be captured in a CUDA
/// graph, and the replayed graph goes on meeting and counting.
#[derive(Debug)]
pub struct SyncBatchNorm<B: SyncBackend, C: Collective<B>, P: Real = f32> {
    module: BatchNorm2d<B, P>,
    collective: C,
    /// The same on all ranks, and another one for the modules that they made before and after.
    number: u16,
}

/// As [`Saved`], of a synchronised step: with the messages. Made by [`SyncBatchNorm::prepare`].
#[derive(Debug)]
pub struct SyncSaved<B: Backend, T: Element> {
    saved: Saved<B, T>,
    exchange: Exchange<B>,
}

impl<B: Backend, T: Element> SyncSaved<B, T> {
    /// The shape of this rank's batch.
    pub fn shape(&self) -> Shape {
        self.saved.shape
    }

    /// The epilogue it was prepared for.
    pub fn epilogue(&self) -> Epilogue {
        self.saved.epilogue
    }

    /// The mean per channel of all ranks' values, as the last forward pass found it. Copies to the host and waits.
    ///
    /// # Errors
    /// [`Error::SavedEmpty`] before the first forward pass; the driver's.
    pub fn mean(&self) -> Result<Vec<T::Param>> {
        self.saved.mean()
    }

    /// `1 / sqrt(biased variance + eps)` per channel of all ranks' values. Copies to the host and waits.
    ///
    /// # Errors
    /// [`Error::SavedEmpty`] before the first forward pass; the driver's.
    pub fn invstd(&self) -> Result<Vec<T::Param>> {
        self.saved.invstd()
    }

    /// Values per channel of all ranks together in the last forward pass. Copies to the host and waits.
    ///
    /// # Errors
    /// As [`SyncSaved::check`].
    pub fn values_per_channel(&self) -> Result<u64> {
        let outcome = self.saved.backend.read(&self.exchange.outcome)?;
        match outcome[0] {
            SOUND => Ok(outcome[1] as u64),
            ONE_VALUE => Err(Error::OneValuePerChannel {
                shape: self.saved.shape,
            }),
            _ => Err(Error::RanksDisagree {
                what: "pass",
                rank: self.rank_of_another_pass()?,
                expected: "the same pass of the same module on every rank".into(),
                got: "the message of another".into(),
            }),
        }
    }

    /// Whether the ranks ran the same pass and had a variance, the last time they met. On CUDA a pass cannot say so itself,
    /// because it does not wait for the device. Copies to the host and waits.
    ///
    /// # Errors
    /// [`Error::RanksDisagree`], [`Error::OneValuePerChannel`]; the driver's.
    pub fn check(&self) -> Result<()> {
        self.values_per_channel().map(|_| ())
    }

    /// The first rank whose message differs in kind from that of rank 0, of those last gathered.
    fn rank_of_another_pass(&self) -> Result<usize> {
        let Exchange { layout, gathered, .. } = &self.exchange;
        let words = self.saved.backend.read(gathered)?;
        let mut tags = words.chunks_exact(layout.words()).map(|message| message[0]);
        let first = tags.next();
        Ok(tags.position(|tag| Some(tag) != first).map_or(0, |at| at + 1))
    }
}

impl<B: SyncBackend, C: Collective<B>, P: Real> SyncBatchNorm<B, C, P> {
    /// Synchronises a module over the ranks of `collective`, all of which call this at the same time: they compare what
    /// their modules are. Parameters are not compared. Allocates, and waits for the device.
    ///
    /// # Errors
    /// [`Error::RanksDisagree`] where modules differ; [`Error::Argument`] for a rank beyond the world's size; what the
    /// collective says.
    pub fn new(module: BatchNorm2d<B, P>, collective: C) -> Result<Self> {
        let (rank, ranks) = (collective.rank(), collective.world_size());
        if rank >= ranks {
            return Err(Error::Argument {
                argument: "collective",
                expected: format!("a rank below the world's size, {ranks}"),
                got: format!("rank {rank}"),
            });
        }
        let backend = module.backend();
        let own = backend.upload(&Likeness::of::<P>(module.config()).0)?;
        let mut gathered = backend.zeros(Likeness::WORDS * ranks)?;
        collective.all_gather(backend, own.view(), gathered.view_mut())?;
        let number = Likeness::compare(&backend.read(&gathered)?)?;
        Ok(Self {
            module,
            collective,
            number,
        })
    }

    /// The module: evaluation, parameters, running statistics, state.
    pub fn module(&self) -> &BatchNorm2d<B, P> {
        &self.module
    }

    /// The module, for an optimiser or a state dict. Ranks must stay alike.
    pub fn module_mut(&mut self) -> &mut BatchNorm2d<B, P> {
        &mut self.module
    }

    /// The module alone.
    pub fn into_module(self) -> BatchNorm2d<B, P> {
        self.module
    }

    /// How the ranks reach each other.
    pub fn collective(&self) -> &C {
        &self.collective
    }

    /// As [`BatchNorm2d::prepare`], for this rank's batch; the others are not asked. The batch may be empty, or of one value
    /// per channel. A backward pass that does not ask for the gradient at x may compile at its first use.
    ///
    /// # Errors
    /// As [`BatchNorm2d::prepare`].
    pub fn prepare<T: Element<Param = P>>(&self, shape: Shape) -> Result<SyncSaved<B, T>> {
        self.prepare_fused(shape, Epilogue::Identity)
    }

    /// As [`SyncBatchNorm::prepare`], for passes with a fused `epilogue`.
    ///
    /// # Errors
    /// As [`BatchNorm2d::prepare`].
    pub fn prepare_fused<T: Element<Param = P>>(&self, shape: Shape, epilogue: Epilogue) -> Result<SyncSaved<B, T>> {
        let backend = self.module.backend();
        let ranks = self.collective.world_size();
        let saved = self.module.prepare_with(shape, epilogue, || {
            backend.prepare_synchronised::<T>(shape, epilogue, ranks)
        })?;
        let layout = Layout::new::<P>(shape.channels, ranks, self.number);
        Ok(SyncSaved {
            saved,
            exchange: Exchange::new(backend, layout, shape.values_per_channel()?)?,
        })
    }

    /// `y = bn(x)` by the statistics of all ranks' batches, towards which the running statistics move. All ranks call it.
    ///
    /// `x` and `y` have the shape of `saved`.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_train`]; what the collective says. See [`SyncBatchNorm`] for what ranks can do wrong.
    pub fn forward_train<T, X, Y>(&mut self, x: &X, y: &mut Y, saved: &mut SyncSaved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
        Y: AsTensorMut<B, T> + ?Sized,
    {
        self.forward_train_with(Forward::new(x, y), saved)
    }

    /// [`SyncBatchNorm::forward_train`] with a fused epilogue: that of `saved`.
    ///
    /// # Errors
    /// As [`SyncBatchNorm::forward_train`], and [`Error::InPlaceTraining`].
    pub fn forward_train_with<T>(&mut self, forward: Forward<'_, B, T>, saved: &mut SyncSaved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        let BatchNorm2d {
            backend,
            config,
            parameters,
            running,
        } = &mut self.module;
        let SyncSaved { saved, exchange } = saved;
        if let InputOutput::InPlace { .. } = forward.tensors {
            return Err(Error::InPlaceTraining);
        }
        check_exchange(exchange, &self.collective)?;
        saved.check_prepared(backend, config.num_features, forward.epilogue())?;
        let shape = saved.shape;
        forward.validate(backend, shape)?;
        if self.collective.world_size() == 1 && shape.values_per_channel()? == 1 {
            return Err(Error::OneValuePerChannel { shape });
        }
        backend.ready_to_meet()?;

        // Only a pass that came to its end leaves statistics that a backward pass may use.
        saved.filled = false;
        if let (InputOutput::Separate { x, .. }, false) = (&forward.tensors, shape.is_empty()) {
            backend.rank_statistics(shape, x, &mut saved.statistics, &mut saved.workspace, exchange)?;
        }
        self.collective
            .all_gather(backend, exchange.statistics.view(), exchange.gathered.view_mut())?;
        let cumulative = config.momentum == Momentum::CumulativeAverage;
        backend.merge_statistics(
            MergeStatistics {
                shape,
                eps: config.eps,
                saved: &mut saved.statistics,
                workspace: &mut saved.workspace,
                batches: running
                    .as_ref()
                    .filter(|_| cumulative)
                    .map(|running| running.batches.view()),
            },
            exchange,
        )?;
        if !shape.is_empty() {
            backend.forward(ForwardPass {
                shape,
                eps: config.eps,
                tensors: forward.tensors,
                epilogue: forward.epilogue,
                weight: parameters.as_ref().map(|parameters| parameters.weight.view()),
                bias: parameters.as_ref().map(|parameters| parameters.bias.view()),
                statistics: ForwardStatistics::Saved(&saved.statistics),
            })?;
        }
        if let Some(running) = running {
            let update = RunningUpdate {
                mean: running.mean.view_mut(),
                variance: running.variance.view_mut(),
                batches: running.batches.view_mut(),
                momentum: config.momentum,
                skip_non_finite: config.skip_non_finite,
            };
            backend.update_running(shape, &saved.statistics, &mut saved.workspace, update, exchange)?;
        }
        saved.filled = true;
        Ok(())
    }

    /// Gradients of a synchronised training pass: at x into `dx`, at weight and bias over what `gradients` holds, the
    /// latter of this rank's batch alone. All ranks call it.
    ///
    /// `dx = weight · invstd · (dy - (Σ dy + x̂ · Σ dy · x̂) / n)` with sums and n over all ranks. `saved` is that of the
    /// forward pass; its statistics stay.
    ///
    /// # Errors
    /// As [`BatchNorm2d::backward`]; what the collective says.
    pub fn backward<T, X, D, G>(
        &self,
        x: &X,
        dy: &D,
        saved: &mut SyncSaved<B, T>,
        dx: &mut G,
        gradients: &mut Gradients<B, P>,
    ) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
        D: AsTensor<B, T> + ?Sized,
        G: AsTensorMut<B, T> + ?Sized,
    {
        self.backward_with(Backward::new(x, dy).dx(dx).parameters(gradients), saved)
    }

    /// Those gradients of a synchronised training pass that `backward` asks for, through its fused epilogue. The ranks meet
    /// if it asks for the gradient at x: all must, or none.
    ///
    /// # Errors
    /// As [`SyncBatchNorm::backward`].
    pub fn backward_with<T>(&self, backward: Backward<'_, B, T>, saved: &mut SyncSaved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        let SyncSaved { saved, exchange } = saved;
        if let GradientFlow::Stops { .. } = backward.flow {
            return self.module.backward_with(backward, saved);
        }
        let backend = self.module.backend();
        check_exchange(exchange, &self.collective)?;
        saved.check_prepared(backend, self.module.config().num_features, backward.epilogue())?;
        saved.check_filled()?;
        self.module.check_backward(&backward, saved.shape)?;
        backend.ready_to_meet()?;
        let Saved {
            shape,
            statistics,
            workspace,
            ..
        } = saved;
        let shape = *shape;
        if shape.is_empty() {
            self.gather_sums(exchange)?;
            backend.merge_sums::<T>(shape, workspace, exchange)?;
            return self.module.zero_parameter_gradients(backward);
        }
        let mut pass = self
            .module
            .backward_pass(backward, shape, BackwardStatistics::Batch(statistics), workspace);
        backend.rank_sums(&mut pass, exchange)?;
        self.gather_sums(exchange)?;
        backend.merge_sums::<T>(shape, pass.workspace, exchange)?;
        backend.rank_gradient(&mut pass, exchange)
    }

    fn gather_sums(&self, exchange: &mut Exchange<B>) -> Result<()> {
        let Exchange { sums, gathered, .. } = exchange;
        self.collective
            .all_gather(self.module.backend(), sums.view(), gathered.view_mut())
    }
}

/// Refuses messages that were made for another group.
fn check_exchange<B: Backend>(exchange: &Exchange<B>, collective: &impl Collective<B>) -> Result<()> {
    let (made_for, ranks) = (exchange.layout.ranks(), collective.world_size());
    if made_for == ranks {
        return Ok(());
    }
    Err(Error::SavedMismatch {
        what: "group",
        expected: format!("{made_for} ranks"),
        got: format!("{ranks} ranks"),
    })
}

/// Counts the modules of this process, from 0 again after 65,535.
static NEXT_NUMBER: AtomicU16 = AtomicU16::new(0);

/// What the modules of all ranks must have in common, one word for each.
struct Likeness([i64; Likeness::WORDS]);

impl Likeness {
    const NAMES: [&str; 7] = [
        "num_features",
        "bytes per parameter",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "skip_non_finite",
    ];
    /// Behind what is compared, a number for the module: that of rank 0 is taken by all.
    const WORDS: usize = Self::NAMES.len() + 1;

    fn of<P: Real>(config: &BatchNorm2dConfig) -> Self {
        let momentum = match config.momentum {
            Momentum::Factor(momentum) => momentum,
            // No module has this factor.
            Momentum::CumulativeAverage => f64::NAN,
        };
        Self([
            config.num_features as i64,
            P::DTYPE.size() as i64,
            config.eps.to_bits() as i64,
            momentum.to_bits() as i64,
            config.affine.into(),
            config.track_running_stats.into(),
            config.skip_non_finite.into(),
            NEXT_NUMBER.fetch_add(1, Ordering::Relaxed).into(),
        ])
    }

    /// Finds the first rank that differs from rank 0, the same on every rank; else gives the module's number.
    fn compare(gathered: &[i64]) -> Result<u16> {
        let (ranks, _) = gathered.as_chunks::<{ Likeness::WORDS }>();
        for (rank, other) in ranks.iter().enumerate() {
            for (at, what) in Self::NAMES.into_iter().enumerate() {
                if other[at] != ranks[0][at] {
                    return Err(Error::RanksDisagree {
                        what,
                        rank,
                        expected: Self::describe(what, ranks[0][at]),
                        got: Self::describe(what, other[at]),
                    });
                }
            }
        }
        Ok(ranks[0][Self::NAMES.len()] as u16)
    }

    fn describe(what: &str, word: i64) -> String {
        let number = f64::from_bits(word as u64);
        match what {
            "momentum" if number.is_nan() => "the cumulative average".into(),
            "eps" | "momentum" => number.to_string(),
            "num_features" | "bytes per parameter" => word.to_string(),
            _ => (word != 0).to_string(),
        }
    }
}
