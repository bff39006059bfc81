//! What will run for a shape on a device: which kernels, with which launch shapes, moving how many bytes.
//!
//! Pure: no CUDA call is made here, so that every decision can be looked at and tested for any device on any machine. And
//! the only source of launch shapes: the launcher decides nothing.
//!
//! ```
//! use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem};
//! use batchnorm_cuda::cuda::DeviceLimits;
//! use batchnorm_cuda::{Dtype, Shape};
//!
//! # fn main() -> batchnorm_cuda::Result<()> {
//! let problem = Problem::new(Operation::Train, Shape::nchw(32, 64, 56, 56), Dtype::F16);
//! let plan = Plan::new(&problem, &DeviceLimits::named("h200").unwrap())?;
//! println!("{plan}");
//! assert_eq!(plan.traffic_ratio(), 1.0); // x is read once and y written once: no implementation can do with less
//!
//! let general = Plan::chosen(&problem, &DeviceLimits::named("h200").unwrap(), &Choice::GENERAL)?;
//! assert_eq!(general.traffic_ratio(), 1.5); // x is read twice: once for its statistics, once to be normalised
//! # Ok(())
//! # }
//! ```

use super::kernel::{Instantiation, Kernel};
use super::limits::DeviceLimits;
use super::model;
use super::resident::{self, Candidate, STAGED_NUMBERS};
pub use super::resident::{Resident, Team};
use super::tiling::{self, Demand};
pub use super::tiling::{Alignment, Tiling};
use super::tuning;
pub use super::tuning::Costs;
use crate::element::Dtype;
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::shape::Shape;

/// What is to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Forward by batch statistics.
    Train,
    /// Forward by running statistics.
    Eval,
    /// Backward through batch statistics.
    Backward,
    /// Backward by running statistics, which are constants.
    BackwardEval,
}

impl Operation {
    /// All operations.
    pub const ALL: [Operation; 4] = [
        Operation::Train,
        Operation::Eval,
        Operation::Backward,
        Operation::BackwardEval,
    ];

    /// `train`, `eval`, `backward` or `backward_eval`.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Train => "train",
            Operation::Eval => "eval",
            Operation::Backward => "backward",
            Operation::BackwardEval => "backward_eval",
        }
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Operation::ALL
            .into_iter()
            .find(|operation| operation.name() == text)
            .ok_or_else(|| format!("unknown operation {text:?}: expected train, eval, backward or backward_eval"))
    }
}

/// How running statistics move in a training pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tracking {
    /// Not at all.
    None,
    /// By a fixed momentum.
    Momentum,
    /// By a cumulative average.
    CumulativeAverage,
}

/// Which part of a pass runs. A synchronised batch norm runs its passes in parts, between which the ranks tell each other
/// what they have found; whatever runs on one device alone is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// All of it.
    Whole,
    /// What a rank finds in its own batch: statistics, or sums over the gradient.
    Rank,
    /// All ranks' results from those of each.
    Merge {
        /// How many ranks.
        ranks: usize,
    },
    /// What follows from all ranks' results for the elements of this rank's batch.
    Apply,
    /// The running statistics moved by those of all ranks.
    Update,
}

impl Stage {
    /// Whether it passes over channels, and over no tensor.
    const fn per_channel(self) -> bool {
        matches!(self, Stage::Merge { .. } | Stage::Update)
    }
}

/// Everything that a plan depends on, but the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// What is to be computed.
    pub operation: Operation,
    /// Which part of it, in training over several ranks.
    pub stage: Stage,
    /// The shape of every tensor.
    pub shape: Shape,
    /// The element type of every tensor.
    pub dtype: Dtype,
    /// What is fused.
    pub epilogue: Epilogue,
    /// How the tensors' addresses lie to one another.
    pub alignment: Alignment,
    /// Whether there are a weight and a bias.
    pub affine: bool,
    /// Training: how running statistics move.
    pub tracking: Tracking,
    /// Backward: whether the gradient at x is wanted.
    pub input_gradient: bool,
    /// Backward of add + relu: whether the gradient at the residual is wanted.
    pub residual_gradient: bool,
    /// Backward: whether the gradients at weight and bias are wanted.
    pub parameter_gradients: bool,
    /// Backward: whether these are added to what is there.
    pub accumulate: bool,
}

impl Problem {
    /// The ordinary case: aligned and affine; in training running statistics by momentum; backward all gradients wanted.
    pub const fn new(operation: Operation, shape: Shape, dtype: Dtype) -> Self {
        Self {
            operation,
            stage: Stage::Whole,
            shape,
            dtype,
            epilogue: Epilogue::Identity,
            alignment: Alignment::FULL,
            affine: true,
            tracking: Tracking::Momentum,
            input_gradient: true,
            residual_gradient: true,
            parameter_gradients: true,
            accumulate: false,
        }
        .canonical()
    }

    /// Sets [`Problem::epilogue`]; backward, a residual's gradient is wanted.
    pub const fn epilogue(self, epilogue: Epilogue) -> Self {
        Self {
            epilogue,
            residual_gradient: true,
            ..self
        }
        .canonical()
    }

    /// The same problem with everything off that does not concern it, so that equal problems compare equal.
    pub const fn canonical(self) -> Self {
        let backward = matches!(self.operation, Operation::Backward | Operation::BackwardEval);
        Self {
            stage: match self.operation {
                Operation::Train | Operation::Backward => self.stage,
                Operation::Eval | Operation::BackwardEval => Stage::Whole,
            },
            tracking: match (self.operation, self.stage) {
                (Operation::Train, Stage::Whole | Stage::Merge { .. } | Stage::Update) => self.tracking,
                _ => Tracking::None,
            },
            input_gradient: self.input_gradient && backward,
            residual_gradient: self.residual_gradient && backward && matches!(self.epilogue, Epilogue::AddRelu),
            parameter_gradients: self.parameter_gradients && backward,
            accumulate: self.accumulate && self.parameter_gradients && backward,
            ..self
        }
    }

    /// The fewest tensors that must cross memory, each one read or written once.
    fn minimum_tensors(&self) -> u64 {
        let residual = u64::from(self.epilogue == Epilogue::AddRelu);
        match (self.operation, self.stage) {
            (_, Stage::Merge { .. } | Stage::Update) => 0,
            (Operation::Train, Stage::Rank) => 1,
            (Operation::Backward, Stage::Rank) => 2 + residual,
            (Operation::Train | Operation::Eval, _) => 2 + residual,
            (Operation::Backward | Operation::BackwardEval, _) => {
                let outputs = u64::from(self.input_gradient) + u64::from(self.residual_gradient);
                // In evaluation, dx alone needs no x, unless to compute the relu's mask again.
                let x = self.needs_sums() || (self.input_gradient && self.epilogue == Epilogue::Relu);
                1 + residual + u64::from(x) + outputs
            }
        }
    }

    /// Whether the pass needs sums over the gradient.
    fn needs_sums(&self) -> bool {
        match self.operation {
            Operation::Train | Operation::Eval => false,
            Operation::Backward => self.input_gradient || self.parameter_gradients,
            Operation::BackwardEval => self.parameter_gradients,
        }
    }

    fn validate(&self) -> Result<()> {
        let shape = self.shape;
        if shape.channels == 0 || shape.height == 0 || shape.width == 0 {
            return Err(Error::EmptyDimension { shape });
        }
        let values = shape.values_per_channel()?;
        match self.operation {
            // Other ranks may have more values.
            Operation::Train if values == 1 && self.stage == Stage::Whole => Err(Error::OneValuePerChannel { shape }),
            _ => Ok(()),
        }
    }
}

/// One kernel launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLaunch {
    /// What is launched.
    pub instantiation: Instantiation,
    /// Blocks.
    pub grid: u32,
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Whether the gradients at weight and bias come of it: of the last launch, so that a failure before it leaves them as
    /// they were.
    pub writes_parameter_gradients: bool,
    /// How the tensor is cut up.
    pub tiling: Tiling,
    /// Bytes it moves.
    pub traffic: Traffic,
}

impl KernelLaunch {
    /// Threads per block.
    pub fn block(&self) -> u32 {
        self.instantiation.threads
    }

    /// Whether its blocks wait for each other, so that all of them must run at the same time.
    pub fn is_cooperative(&self) -> bool {
        matches!(&self.instantiation.resident, Some(resident) if resident.team == Team::Grid)
    }
}

/// Bytes that cross the memory interface, as the kernels ask for them (caches may serve some).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Tensors' bytes, read and written.
    pub tensors: u64,
    /// Read, per-channel vectors and partial results included.
    pub read: u64,
    /// Written, per-channel vectors and partial results included.
    pub written: u64,
}

impl Traffic {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.read + self.written
    }
}

impl std::ops::Add for Traffic {
    type Output = Traffic;

    fn add(self, other: Traffic) -> Traffic {
        Traffic {
            tensors: self.tensors + other.tensors,
            read: self.read + other.read,
            written: self.written + other.written,
        }
    }
}

/// Which of the legal ways to run a pass may be taken: the default is any. Of those that fit, the one with the smallest
/// modelled time is; the general path where its modelled time is the shorter one.
///
/// A pass that has no resident candidate which fits takes the general path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Choice {
    /// Only the general path, two launches of which the second reads its operands again.
    pub general: bool,
    /// Only the resident path, if it can be.
    pub resident: bool,
    /// Resident: only this team.
    pub team: Option<Team>,
    /// Resident: only this block size.
    pub threads: Option<u32>,
    /// Resident: only so many buffers per block.
    pub stages: Option<u32>,
    /// Resident: only with, or only without, bulk copies.
    pub bulk: Option<bool>,
    /// Resident: only so many elements per vector.
    pub vector: Option<u32>,
    /// Resident: only strips so many vectors wide.
    pub width: Option<u64>,
    /// Resident: only so many blocks per team.
    pub splits: Option<u64>,
    /// Resident: only so many blocks.
    pub grid: Option<u32>,
}

impl Choice {
    /// The general path.
    pub const GENERAL: Choice = Choice {
        general: true,
        resident: false,
        ..Choice::resident(None)
    };

    /// The resident path, by this team or any.
    pub const fn resident(team: Option<Team>) -> Self {
        Choice {
            general: false,
            resident: true,
            team,
            threads: None,
            stages: None,
            bulk: None,
            vector: None,
            width: None,
            splits: None,
            grid: None,
        }
    }

    fn allows(&self, candidate: &Candidate) -> bool {
        fn fits<T: PartialEq>(wanted: Option<T>, value: T) -> bool {
            wanted.is_none_or(|wanted| wanted == value)
        }
        let Resident { team, stages, bulk, .. } = candidate.resident;
        !self.general
            && fits(self.team, team)
            && fits(self.threads, candidate.threads)
            && fits(self.stages, stages)
            && fits(self.bulk, bulk)
            && fits(self.vector, candidate.vector)
            && fits(self.width, candidate.tiling.width)
            && fits(self.splits, candidate.tiling.splits)
            && fits(self.grid, candidate.grid)
    }
}

impl std::fmt::Display for Choice {
    /// What is asked for, in a few words: `any`, `general`, `cluster4, 512 threads, 2 stages`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.general {
            return f.write_str("general");
        }
        let words = [
            self.team.map(|team| team.to_string()),
            self.splits.map(|splits| format!("{splits} blocks per team")),
            self.grid.map(|grid| format!("{grid} in all")),
            self.threads.map(|threads| format!("{threads} threads")),
            self.stages.map(|stages| format!("{stages} stages")),
            self.bulk
                .map(|bulk| if bulk { "bulk copies" } else { "own copies" }.to_owned()),
            self.vector.map(|vector| format!("vectors of {vector}")),
            self.width.map(|width| format!("strips of {width} vectors")),
        ];
        let words: Vec<String> = words.into_iter().flatten().collect();
        match (words.is_empty(), self.resident) {
            (true, false) => f.write_str("any"),
            (true, true) => f.write_str("resident"),
            _ => f.write_str(&words.join(", ")),
        }
    }
}

/// What will run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What is computed.
    pub problem: Problem,
    /// The device it is for.
    pub limits: DeviceLimits,
    /// The launches, in order; none for an empty batch.
    pub kernels: Vec<KernelLaunch>,
}

impl Plan {
    /// Plans a pass: of all legal ways to run it, the one with the smallest modelled time.
    ///
    /// # Errors
    /// [`Error::EmptyDimension`], [`Error::ShapeOverflow`], [`Error::OneValuePerChannel`].
    pub fn new(problem: &Problem, limits: &DeviceLimits) -> Result<Self> {
        Self::chosen(problem, limits, &Choice::default())
    }

    /// As [`Plan::new`], among those that the choice allows.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn chosen(problem: &Problem, limits: &DeviceLimits, choice: &Choice) -> Result<Self> {
        problem.validate()?;
        let problem = problem.canonical();
        if problem.shape.is_empty() && !problem.stage.per_channel() {
            return Ok(Self::of(problem, limits, Vec::new()));
        }
        let planner = Planner {
            problem: &problem,
            limits,
        };
        let kernels = match planner.choose(choice) {
            Some(candidate) => vec![planner.resident(&candidate)],
            None => planner.general(),
        };
        Ok(Self::of(problem, limits, kernels))
    }

    /// Every legal way to run a pass; the general path comes first.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn candidates(problem: &Problem, limits: &DeviceLimits) -> Result<Vec<Self>> {
        let general = Self::chosen(problem, limits, &Choice::GENERAL)?;
        let problem = general.problem;
        let planner = Planner {
            problem: &problem,
            limits,
        };
        let resident: Vec<_> = planner.resident_candidates();
        let plans = resident
            .iter()
            .map(|candidate| Self::of(problem, limits, vec![planner.resident(candidate)]));
        Ok(std::iter::once(general).chain(plans).collect())
    }

    fn of(problem: Problem, limits: &DeviceLimits, kernels: Vec<KernelLaunch>) -> Self {
        Self {
            problem,
            limits: limits.clone(),
            kernels,
        }
    }

    /// The choice that allows this plan alone.
    pub fn choice(&self) -> Choice {
        match self.kernels.as_slice() {
            [launch] => match launch.instantiation.resident {
                Some(Resident { team, stages, bulk, .. }) => Choice {
                    threads: Some(launch.block()),
                    stages: Some(stages),
                    bulk: Some(bulk),
                    vector: Some(launch.instantiation.vector),
                    width: Some(launch.tiling.width),
                    splits: Some(launch.tiling.splits),
                    grid: Some(launch.grid),
                    ..Choice::resident(Some(team))
                },
                None => Choice::GENERAL,
            },
            _ => Choice::GENERAL,
        }
    }

    /// Nanoseconds that the launches are believed to take with a cold cache: modelled, not measured.
    pub fn modelled_time(&self) -> f64 {
        self.modelled_time_at(&tuning::COSTS)
    }

    /// As [`Plan::modelled_time`], at other costs.
    pub fn modelled_time_at(&self, costs: &Costs) -> f64 {
        model::modelled_time(&self.kernels, &self.limits, costs)
    }

    /// Bytes of all launches.
    pub fn traffic(&self) -> Traffic {
        self.kernels
            .iter()
            .fold(Traffic::default(), |sum, launch| sum + launch.traffic)
    }

    /// Bytes that every implementation must move: each tensor read or written once.
    pub fn minimum_bytes(&self) -> u64 {
        self.problem.minimum_tensors() * tensor_bytes(&self.problem)
    }

    /// Tensors' bytes over the fewest possible: 1 is the best there is. Per-channel vectors are not counted.
    pub fn traffic_ratio(&self) -> f64 {
        if self.kernels.is_empty() || self.minimum_bytes() == 0 {
            return 1.0;
        }
        self.traffic().tensors as f64 / self.minimum_bytes() as f64
    }

    /// Partial results that the launches need room for: one per channel and split, of the launch with the most; and in a
    /// grid team the total.
    pub(super) fn partials(&self) -> u64 {
        self.exchanging()
            .map(|launch| launch.tiling.channels * (launch.tiling.splits + u64::from(launch.is_cooperative())))
            .max()
            .unwrap_or(0)
    }

    /// Counters of each kind that the launches need: one per strip, of the launch with the most.
    pub(super) fn counters(&self) -> u64 {
        self.exchanging().map(|launch| launch.tiling.strips).max().unwrap_or(0)
    }

    /// The launches whose blocks exchange results through global memory.
    fn exchanging(&self) -> impl Iterator<Item = &KernelLaunch> {
        self.kernels.iter().filter(|launch| match launch.instantiation.kernel {
            Kernel::Statistics | Kernel::BackwardReduce => launch.tiling.splits > 1,
            _ => launch.is_cooperative(),
        })
    }
}

/// Bytes of one tensor.
fn tensor_bytes(problem: &Problem) -> u64 {
    let Shape {
        batch,
        channels,
        height,
        width,
        ..
    } = problem.shape;
    (batch * channels * height * width * problem.dtype.size()) as u64
}

/// Bytes of one split's result for one channel in `kernels/reduce.cuh`: the weight, where it is kept, and two numbers.
fn partial_bytes(kernel: Kernel, real: u64) -> u64 {
    const WEIGHT: u64 = 8;
    match kernel {
        Kernel::Statistics | Kernel::ResidentForward => WEIGHT + 2 * real,
        _ => 2 * real,
    }
}

struct Planner<'a> {
    problem: &'a Problem,
    limits: &'a DeviceLimits,
}

impl Planner<'_> {
    /// The resident kernel for the pass, if there is one. Where nothing depends on sums over the batch, the general path
    /// reads every tensor once already.
    fn resident_kernel(&self) -> Option<Kernel> {
        match self.problem.operation {
            _ if self.problem.stage != Stage::Whole => None,
            Operation::Train => Some(Kernel::ResidentForward),
            Operation::Backward if self.problem.needs_sums() => Some(Kernel::ResidentBackward),
            _ => None,
        }
    }

    fn resident_candidates(&self) -> Vec<Candidate> {
        let Problem {
            shape,
            dtype,
            alignment,
            ..
        } = *self.problem;
        self.resident_kernel()
            .map(|kernel| resident::candidates(kernel, shape, dtype, alignment, self.limits))
            .unwrap_or_default()
    }

    /// The fastest resident candidate, unless the general path's modelled time is shorter.
    ///
    /// Decided for the pass with everything wanted: so all passes of one operation and shape take the same path, come by the
    /// same bits, and find their room in one workspace.
    fn choose(&self, choice: &Choice) -> Option<Candidate> {
        if choice.general || self.resident_kernel().is_none() {
            return None;
        }
        let full = Problem {
            affine: true,
            tracking: match self.problem.operation {
                Operation::Train => Tracking::Momentum,
                _ => Tracking::None,
            },
            input_gradient: self.problem.operation != Operation::Train,
            residual_gradient: self.problem.epilogue == Epilogue::AddRelu && self.problem.operation != Operation::Train,
            parameter_gradients: self.problem.operation != Operation::Train,
            accumulate: false,
            ..*self.problem
        };
        let planner = Planner {
            problem: &full,
            limits: self.limits,
        };
        let time = |kernels: &[KernelLaunch]| model::modelled_time(kernels, self.limits, &tuning::COSTS);
        let best = planner
            .resident_candidates()
            .into_iter()
            .filter(|candidate| choice.allows(candidate))
            .map(|candidate| (time(&[planner.resident(&candidate)]), candidate))
            .min_by(|(one, _), (other, _)| one.total_cmp(other));
        best.filter(|(resident, _)| choice.resident || *resident <= time(&planner.general()))
            .map(|(_, candidate)| candidate)
    }

    fn resident(&self, candidate: &Candidate) -> KernelLaunch {
        let problem = self.problem;
        let &Candidate {
            resident,
            walk,
            vector,
            threads,
            tiling,
            shared_bytes,
            grid,
        } = candidate;
        let mut counts = Counts::new(problem);
        let kernel = match problem.operation {
            Operation::Train => {
                counts.resident_forward(problem, &tiling);
                Kernel::ResidentForward
            }
            _ => {
                counts.resident_backward(problem, &tiling, self.gradient_outputs());
                Kernel::ResidentBackward
            }
        };
        if resident.team == Team::Grid {
            counts.grid_exchange(kernel, &tiling);
        }
        KernelLaunch {
            instantiation: Instantiation {
                kernel,
                dtype: problem.dtype,
                walk,
                vector,
                unroll: resident::unroll(kernel.tensors_read(problem.epilogue, true)),
                threads,
                wide_index: tiling::needs_wide_index(&tiling, u64::from(vector)),
                epilogue: problem.epilogue,
                stores_gradient: false,
                batch_statistics: false,
                resident: Some(resident),
            },
            grid,
            shared_bytes,
            writes_parameter_gradients: problem.parameter_gradients,
            tiling,
            traffic: counts.traffic(),
        }
    }

    fn general(&self) -> Vec<KernelLaunch> {
        let problem = self.problem;
        match problem.stage {
            Stage::Whole => self.whole(),
            Stage::Rank if problem.operation == Operation::Train => vec![self.statistics()],
            Stage::Rank => vec![self.backward_reduce(true)],
            Stage::Merge { ranks } => vec![self.merge(ranks as u64)],
            Stage::Apply if problem.operation == Operation::Train => vec![self.apply(true)],
            Stage::Apply => vec![self.backward_apply(problem.input_gradient)],
            Stage::Update => vec![self.update_running()],
        }
    }

    fn whole(&self) -> Vec<KernelLaunch> {
        let problem = self.problem;
        match problem.operation {
            Operation::Train => vec![self.statistics(), self.apply(true)],
            Operation::Eval => vec![self.apply(false)],
            Operation::Backward => {
                let gradients = problem.input_gradient || problem.residual_gradient;
                let reduce = problem.needs_sums().then(|| self.backward_reduce(true));
                let apply = gradients.then(|| self.backward_apply(problem.input_gradient));
                reduce.into_iter().chain(apply).collect()
            }
            // Here dx does not depend on the sums, so one kernel finds both.
            Operation::BackwardEval if problem.parameter_gradients => vec![self.backward_reduce(false)],
            Operation::BackwardEval if problem.input_gradient || problem.residual_gradient => {
                vec![self.backward_apply(false)]
            }
            Operation::BackwardEval => Vec::new(),
        }
    }

    fn statistics(&self) -> KernelLaunch {
        let cumulative = self.problem.tracking == Tracking::CumulativeAverage;
        let kernel = (Kernel::Statistics, Epilogue::Identity, false);
        self.launch(kernel, 1, |counts, tensors, tiling| {
            counts.read_tensors(tensors);
            // The pivot of every channel of every task.
            counts.read += tiling.channels * tiling.splits * self.problem.dtype.size() as u64;
            counts.written += tiling.channels * 4 * counts.real;
            if cumulative {
                counts.read += COUNTER_BYTES;
                counts.written += counts.real;
            }
        })
    }

    fn apply(&self, batch_statistics: bool) -> KernelLaunch {
        let problem = self.problem;
        let tracking = problem.tracking;
        let kernel = (Kernel::Apply, problem.epilogue, false);
        self.launch(kernel, STAGED_NUMBERS, |counts, tensors, tiling| {
            counts.read_tensors(tensors);
            counts.write_tensors(1);
            counts.read_normalisation(tiling, batch_statistics, problem.affine);
            if tracking != Tracking::None {
                // Batch variance, and both running statistics in and out; the count of batches.
                let factor = u64::from(tracking == Tracking::CumulativeAverage);
                counts.read += tiling.channels * (3 + factor) * counts.real + COUNTER_BYTES;
                counts.written += tiling.channels * 2 * counts.real + COUNTER_BYTES;
            }
        })
    }

    fn backward_reduce(&self, batch_statistics: bool) -> KernelLaunch {
        let problem = self.problem;
        let outputs = if batch_statistics { 0 } else { self.gradient_outputs() };
        let is_last = !batch_statistics || self.gradient_outputs() == 0;
        let writes_parameters = problem.parameter_gradients && is_last;
        let kernel = (Kernel::BackwardReduce, problem.epilogue, false);
        let mut launch = self.launch(kernel, STAGED_NUMBERS + 1, |counts, tensors, tiling| {
            counts.read_tensors(tensors);
            counts.write_tensors(outputs);
            counts.read_normalisation(tiling, batch_statistics, problem.affine);
            counts.written += tiling.channels * 2 * counts.real;
            if writes_parameters {
                counts.parameter_gradients(tiling, problem.accumulate);
            }
        });
        launch.instantiation.stores_gradient = outputs > 0;
        launch.writes_parameter_gradients = writes_parameters;
        launch
    }

    fn backward_apply(&self, batch_statistics: bool) -> KernelLaunch {
        let problem = self.problem;
        let kernel = (Kernel::BackwardApply, problem.epilogue, batch_statistics);
        let writes_parameters = problem.parameter_gradients && problem.operation == Operation::Backward;
        let mut launch = self.launch(kernel, STAGED_NUMBERS + 2, |counts, tensors, tiling| {
            counts.read_tensors(tensors);
            counts.write_tensors(self.gradient_outputs());
            counts.read_normalisation(tiling, problem.operation == Operation::Backward, problem.affine);
            if batch_statistics {
                counts.read += tiling.channels * tiling.splits * 2 * counts.real;
            }
            // In a synchronised pass what the statistics need is of all ranks, what the parameters need of this one.
            if writes_parameters && (!batch_statistics || problem.stage == Stage::Apply) {
                counts.read += tiling.channels * 2 * counts.real;
            }
            if writes_parameters {
                counts.parameter_gradients(tiling, problem.accumulate);
            }
        });
        launch.writes_parameter_gradients = writes_parameters;
        launch
    }

    /// Every rank's message read: a tag, a count, and three numbers per channel forward, two backward.
    fn merge(&self, ranks: u64) -> KernelLaunch {
        let channels = self.problem.shape.channels as u64;
        let (kernel, read, written, outcome) = match self.problem.operation {
            Operation::Train => (Kernel::MergeStatistics, 3, 4, 2 * WORD_BYTES),
            _ => (Kernel::MergeSums, 2, 2, 0),
        };
        self.per_channel(kernel, |counts, _| {
            counts.read += ranks * channels * (2 * WORD_BYTES + read * counts.real);
            counts.written += channels * written * counts.real + outcome;
            if self.problem.tracking == Tracking::CumulativeAverage {
                counts.read += COUNTER_BYTES;
                counts.written += counts.real;
            }
        })
    }

    fn update_running(&self) -> KernelLaunch {
        let channels = self.problem.shape.channels as u64;
        let factor = u64::from(self.problem.tracking == Tracking::CumulativeAverage);
        self.per_channel(Kernel::UpdateRunning, |counts, threads| {
            // Pivot, mean_offset, variance; both running statistics in and out; the count of batches.
            counts.read += channels * 5 * counts.real + COUNTER_BYTES;
            counts.written += channels * 2 * counts.real + COUNTER_BYTES;
            // Every thread reads the outcome, and the factor if the momentum is a cumulative average.
            counts.read += threads * (2 * WORD_BYTES + factor * counts.real);
        })
    }

    fn per_channel(&self, kernel: Kernel, count: impl FnOnce(&mut Counts, u64)) -> KernelLaunch {
        let instantiation = Instantiation::per_channel(kernel, self.problem.dtype.param());
        let channels = self.problem.shape.channels as u64;
        let threads = u64::from(instantiation.threads);
        let grid = channels.div_ceil(threads).min(u64::from(self.limits.grid));
        let mut counts = Counts::new(self.problem);
        count(&mut counts, grid * threads);
        KernelLaunch {
            instantiation,
            grid: grid as u32,
            shared_bytes: 0,
            writes_parameter_gradients: false,
            tiling: Tiling {
                channels,
                ..Tiling::default()
            },
            traffic: counts.traffic(),
        }
    }

    fn gradient_outputs(&self) -> u64 {
        u64::from(self.problem.input_gradient) + u64::from(self.problem.residual_gradient)
    }

    fn launch(
        &self,
        (kernel, epilogue, batch_statistics): (Kernel, Epilogue, bool),
        numbers_per_channel: u64,
        count: impl FnOnce(&mut Counts, u64, &Tiling),
    ) -> KernelLaunch {
        let tensors_read = kernel.tensors_read(epilogue, batch_statistics);
        let Problem {
            shape,
            dtype,
            alignment,
            ..
        } = *self.problem;
        let reduces = matches!(kernel, Kernel::Statistics | Kernel::BackwardReduce);
        let chosen = tiling::choose(
            shape,
            dtype,
            alignment,
            self.limits,
            Demand {
                tensors_read,
                numbers_per_channel,
                reduces,
            },
        );
        let mut counts = Counts::new(self.problem);
        count(&mut counts, tensors_read, &chosen.tiling);
        if reduces {
            counts.partials(kernel, &chosen.tiling);
        }
        KernelLaunch {
            instantiation: Instantiation {
                kernel,
                dtype,
                walk: chosen.walk,
                vector: chosen.vector,
                unroll: chosen.unroll,
                threads: chosen.threads,
                wide_index: chosen.wide_index,
                epilogue,
                stores_gradient: false,
                batch_statistics,
                resident: None,
            },
            grid: chosen.tiling.tasks().min(u64::from(self.limits.grid)) as u32,
            shared_bytes: chosen.shared_bytes,
            writes_parameter_gradients: false,
            tiling: chosen.tiling,
            traffic: counts.traffic(),
        }
    }
}

/// Bytes of `num_batches_tracked`.
const COUNTER_BYTES: u64 = 8;

/// Bytes of a word in what ranks tell each other.
const WORD_BYTES: u64 = 8;

/// Bytes of one counter of arrived blocks.
const ARRIVED_BYTES: u64 = 4;

/// Counts what a launch reads and writes.
struct Counts {
    tensor: u64,
    real: u64,
    tensors: u64,
    read: u64,
    written: u64,
}

impl Counts {
    fn new(problem: &Problem) -> Self {
        Self {
            tensor: tensor_bytes(problem),
            real: problem.dtype.param().size() as u64,
            tensors: 0,
            read: 0,
            written: 0,
        }
    }

    fn read_tensors(&mut self, count: u64) {
        self.tensors += count * self.tensor;
        self.read += count * self.tensor;
    }

    fn write_tensors(&mut self, count: u64) {
        self.tensors += count * self.tensor;
        self.written += count * self.tensor;
    }

    /// Every task stages the numbers of its strip: mean and invstd in two vectors, or three by batch statistics.
    fn read_normalisation(&mut self, tiling: &Tiling, batch_statistics: bool, affine: bool) {
        let vectors = 2 + u64::from(batch_statistics) + 2 * u64::from(affine);
        self.read += tiling.channels * tiling.splits * vectors * self.real;
    }

    /// Written, or added to.
    fn parameter_gradients(&mut self, tiling: &Tiling, accumulate: bool) {
        let bytes = tiling.channels * 2 * self.real;
        self.written += bytes;
        if accumulate {
            self.read += bytes;
        }
    }

    /// Where several blocks share a strip, each leaves its result per channel and counts its arrival; the last reads all
    /// results and resets the counter.
    fn partials(&mut self, kernel: Kernel, tiling: &Tiling) {
        if tiling.splits > 1 {
            let bytes = tiling.channels * tiling.splits * partial_bytes(kernel, self.real);
            self.read += bytes + tiling.tasks() * ARRIVED_BYTES;
            self.written += bytes + (tiling.tasks() + tiling.strips) * ARRIVED_BYTES;
        }
    }

    /// Every block reads the pivots, weights and biases of its strips; one block of each team writes what is saved, moves
    /// the running statistics, and for a cumulative average counts itself; the batch is counted once.
    fn resident_forward(&mut self, problem: &Problem, tiling: &Tiling) {
        self.read_tensors(1 + u64::from(problem.epilogue == Epilogue::AddRelu));
        self.write_tensors(1);
        let parameters = 2 * u64::from(problem.affine) * self.real;
        self.read += tiling.channels * tiling.splits * (problem.dtype.size() as u64 + parameters);
        self.written += tiling.channels * 3 * self.real;
        if problem.tracking != Tracking::None {
            self.read += tiling.channels * 2 * self.real + COUNTER_BYTES;
            self.written += tiling.channels * 2 * self.real + COUNTER_BYTES;
        }
        if problem.tracking == Tracking::CumulativeAverage {
            self.read += tiling.channels * COUNTER_BYTES + tiling.strips * ARRIVED_BYTES;
            self.written += (tiling.strips + 1) * ARRIVED_BYTES;
        }
    }

    fn resident_backward(&mut self, problem: &Problem, tiling: &Tiling, outputs: u64) {
        self.read_tensors(2 + u64::from(problem.epilogue == Epilogue::AddRelu));
        self.write_tensors(outputs);
        self.read_normalisation(tiling, true, problem.affine);
        if problem.parameter_gradients {
            self.written += tiling.channels * 2 * self.real;
            if problem.accumulate {
                self.read += tiling.channels * 2 * self.real;
            }
        }
    }

    /// Every block leaves its result per channel and counts its arrival; the last one reads all, leaves the total and says
    /// so; every block waits for that, reads the total, and counts itself out. Both counters are reset.
    fn grid_exchange(&mut self, kernel: Kernel, tiling: &Tiling) {
        let partial = partial_bytes(kernel, self.real);
        self.written += tiling.channels * (tiling.splits + 1) * partial;
        self.read += tiling.channels * 2 * tiling.splits * partial;
        let arrivals = 2 * tiling.tasks() + tiling.strips;
        self.read += (arrivals + tiling.tasks()) * ARRIVED_BYTES;
        self.written += (arrivals + 2 * tiling.strips) * ARRIVED_BYTES;
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            tensors: self.tensors,
            read: self.read,
            written: self.written,
        }
    }
}

impl std::fmt::Display for Plan {
    /// One line per launch, then the bytes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Problem {
            operation,
            shape,
            dtype,
            epilogue,
            ..
        } = self.problem;
        writeln!(
            f,
            "{operation} {shape} {dtype}, epilogue {epilogue}, on {}",
            self.limits.name
        )?;
        for launch in &self.kernels {
            let Tiling {
                strips,
                splits,
                strip_channels,
                ..
            } = launch.tiling;
            writeln!(
                f,
                "  {}\n    grid {} x block {}, {} bytes of shared memory; {strips} strips of {strip_channels} channels x \
                 {splits} splits; {} bytes read, {} written",
                launch.instantiation,
                launch.grid,
                launch.block(),
                launch.shared_bytes,
                launch.traffic.read,
                launch.traffic.written,
            )?;
        }
        write!(
            f,
            "  {} bytes in all; tensors cross memory {:.2} times the minimum of {} bytes; modelled time {:.1} us",
            self.traffic().bytes(),
            self.traffic_ratio(),
            self.minimum_bytes(),
            self.modelled_time() * 1e-3
        )
    }
}
