//! Tries the legal ways to run a pass on this machine's GPU, but those that the model holds to be hopeless: each is checked
//! against the general path and timed, all in one process. `examples/tune.rs` makes of the result what plans go by.
//!
//! ```text
//! cargo run --release --example sweep -- --json sweep.json
//! cargo run --release --example sweep -- --json sweep.json --stand-in      # a dry run: its times mean nothing
//! ```
//!
//! Times are those of one call in a CUDA graph, with a cold cache: the calls rotate among tensors that together are more
//! than four times the L2 cache. Beside them is a copy of the same tensor. Ends with an error if a result is wrong, and with
//! the exit status 75 if the time was used up before all had been tried; what was found by then is written all the same.

#[path = "ahead/compile.rs"]
mod ahead;
#[path = "../benches/shapes/resnet_50.rs"]
mod resnet_50;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem};
use batchnorm_cuda::cuda::{DeviceLimits, DiskCache};
use batchnorm_cuda::cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaGraph, CudaSlice};
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{
    Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Dtype, Element, Forward, Gradients, Layout, Real, Saved,
    Shape,
};
use clap::Parser;
use serde_json::{Value, json};

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// Tries the legal ways to run a pass: checks and times them.
#[derive(Parser)]
struct Arguments {
    /// Where the result goes.
    #[arg(long)]
    json: PathBuf,
    /// Use the stand-in driver, with small tensors and a few of the candidates.
    #[arg(long)]
    stand_in: bool,
    /// Try nothing more after so many seconds.
    #[arg(long, default_value_t = 440.0)]
    seconds: f64,
}

/// Time that the calls of a graph take together, about: enough to forget what its launch costs.
const GRAPH_NANOSECONDS: f64 = 1e6;
/// Replays of a graph; their median counts.
const REPLAYS: usize = 3;
/// Elements that are looked at in each of these many places of a tensor.
const SAMPLE: usize = 1024;
const SAMPLES: usize = 16;
/// Ways whose modelled time is so many times that of the best are not tried: there are too many for a few minutes.
const HOPELESS: f64 = 1.7;
/// After so many elements a tensor's values begin again; a prime, so that neighbouring planes differ.
const PERIOD: usize = 4093;
/// Of how many candidates a dry run takes one.
const DRY_RUN_EVERY: usize = 24;

/// The exit status of a sweep that the time was too short for.
const CUT: u8 = 75;

fn main() -> ExitCode {
    match sweep(&Arguments::parse()) {
        Ok(summary) => {
            println!("{}", summary.text());
            summary.status()
        }
        Err(error) => {
            eprintln!("sweep: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Summary {
    tried: usize,
    wrong: usize,
    problems: usize,
    not_reached: usize,
}

impl Summary {
    fn status(&self) -> ExitCode {
        if self.wrong > 0 {
            ExitCode::FAILURE
        } else if self.not_reached > 0 {
            ExitCode::from(CUT)
        } else if self.tried == 0 {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }

    fn text(&self) -> String {
        let Self {
            tried,
            wrong,
            problems,
            not_reached,
        } = self;
        format!("{tried} ways for {problems} passes tried, {wrong} wrong; {not_reached} passes not reached")
    }
}

fn sweep(arguments: &Arguments) -> Answer<Summary> {
    let start = Instant::now();
    let (context, cache) = if arguments.stand_in {
        emulator::install();
        (CudaContext::new(emulator::ordinal("small-100"))?, DiskCache::Off)
    } else {
        batchnorm_cuda::cuda::is_available()?;
        (CudaContext::new(0)?, DiskCache::Default)
    };
    // SAFETY: one stream uses all buffers. A graph cannot be captured with the events.
    unsafe { context.disable_event_tracking() };
    let cuda = Cuda::with_cache(context.new_stream()?, cache.clone())?;
    let problems = problems(arguments.stand_in);
    let effort = Effort {
        dry_run: arguments.stand_in,
        end: start + Duration::from_secs_f64(arguments.seconds),
    };
    let mut sweep = Sweep {
        arguments,
        start,
        effort,
        cuda: &cuda,
        summary: Summary {
            not_reached: problems.len(),
            ..Summary::default()
        },
        passes: Vec::new(),
    };
    std::thread::scope(|scope| {
        let (compiled, next) = mpsc::channel();
        let (limits, problems) = (cuda.limits(), &problems);
        scope.spawn(move || {
            for problem in problems {
                if !effort.dry_run {
                    compile(problem, limits, &cache, effort);
                }
                // Nobody listens any more where the sweep ended with an error.
                if compiled.send(*problem).is_err() {
                    break;
                }
            }
        });
        // The processor compiles what comes next while the GPU is timed.
        next.into_iter().try_for_each(|problem| sweep.pass(&problem))
    })?;
    Ok(sweep.summary)
}

/// All that has been found so far.
struct Sweep<'a> {
    arguments: &'a Arguments,
    start: Instant,
    effort: Effort,
    cuda: &'a Cuda,
    summary: Summary,
    passes: Vec<Value>,
}

impl Sweep<'_> {
    /// Tries all ways of one pass, if there is time for them, and writes what has been found.
    fn pass(&mut self, problem: &Problem) -> Answer<()> {
        let (cuda, effort, summary) = (self.cuda, self.effort, &mut self.summary);
        let found = match problem.dtype {
            Dtype::F16 => try_all::<f16>(cuda, problem, effort, summary),
            Dtype::Bf16 => try_all::<bf16>(cuda, problem, effort, summary),
            Dtype::F32 => try_all::<f32>(cuda, problem, effort, summary),
            Dtype::F64 => try_all::<f64>(cuda, problem, effort, summary),
        }?;
        // A pass that was not tried in all ways is of no use to `tune`.
        let Some(found) = found else { return Ok(()) };
        self.passes.push(found);
        self.summary.problems += 1;
        self.summary.not_reached -= 1;
        // After each, so that a program that is stopped has written something.
        let report = json!({
            "stand_in": effort.dry_run,
            "limits": limits_to_json(cuda),
            "seconds": self.start.elapsed().as_secs_f64(),
            "tried": self.summary.tried,
            "wrong": self.summary.wrong,
            "not_reached": self.summary.not_reached,
            "passes": self.passes,
        });
        std::fs::write(&self.arguments.json, format!("{report:#}\n"))?;
        Ok(())
    }
}

/// How much is tried.
#[derive(Clone, Copy)]
struct Effort {
    dry_run: bool,
    end: Instant,
}

impl Effort {
    fn is_over(self) -> bool {
        Instant::now() > self.end
    }
}

/// ResNet-50 at both of its usual batches, and one tensor of images in full size, in such an order that a sweep that is cut
/// has seen some of everything.
fn problems(small: bool) -> Vec<Problem> {
    let shapes: Vec<Shape> = if small {
        let planes = [Shape::nchw(3, 6, 14, 14), Shape::nchw(4, 16, 7, 7)];
        planes
            .into_iter()
            .chain([Shape::nchw(3, 64, 6, 5).channels_last()])
            .collect()
    } else {
        let large = Shape::nchw(4, 128, 1024, 1024);
        let resnet_50 = [256, 32]
            .into_iter()
            .flat_map(|batch| resnet_50::resnet_50().map(move |shape| Shape { batch, ..shape }));
        resnet_50.chain([large]).collect()
    };
    let mut problems = Vec::new();
    let dtypes: &[Dtype] = if small {
        &[Dtype::F16]
    } else {
        &[Dtype::F16, Dtype::F32, Dtype::Bf16]
    };
    for &dtype in dtypes {
        for shape in &shapes {
            // A bf16 takes as long as an f16; it is enough to see that it does.
            if dtype == Dtype::Bf16 && shape.layout == Layout::Nhwc {
                continue;
            }
            for operation in [Operation::Train, Operation::Backward] {
                problems.push(Problem::new(operation, *shape, dtype));
            }
        }
    }
    // The multiples of the golden ratio fall into every part of the unit interval by turns.
    let golden_ratio = (1.0 + 5.0_f64.sqrt()) / 2.0;
    let mut order: Vec<(f64, Problem)> = problems
        .into_iter()
        .enumerate()
        .map(|(number, problem)| ((number as f64 * golden_ratio).fract(), problem))
        .collect();
    order.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    order.into_iter().map(|(_, problem)| problem).collect()
}

/// Fills the cache on disk with what is to be tried, by all cores at once.
fn compile(problem: &Problem, limits: &DeviceLimits, cache: &DiskCache, effort: Effort) {
    let plans = candidates(problem, limits).unwrap_or_default();
    ahead::compile(&plans, limits.architecture, cache, || !effort.is_over());
}

/// The ways that are worth trying.
fn candidates(problem: &Problem, limits: &DeviceLimits) -> batchnorm_cuda::Result<Vec<Plan>> {
    let mut plans = Plan::candidates(problem, limits)?;
    let best = plans.iter().map(Plan::modelled_time).fold(f64::INFINITY, f64::min);
    plans.retain(|plan| is_worth_trying(plan, best));
    Ok(plans)
}

/// The tensors of one call.
struct Tensors<T: Element> {
    x: CudaSlice<T>,
    y: CudaSlice<T>,
    dy: CudaSlice<T>,
    dx: CudaSlice<T>,
}

/// Nothing, if the time was used up before the last way.
fn try_all<T: Element>(cuda: &Cuda, problem: &Problem, effort: Effort, summary: &mut Summary) -> Answer<Option<Value>> {
    if effort.is_over() {
        return Ok(None);
    }
    let shape = problem.shape;
    let every = if effort.dry_run { DRY_RUN_EVERY } else { 1 };
    let mut sets = tensors::<T>(cuda, shape, effort.dry_run)?;
    let mut general = Step::new(&cuda.with_choice(Choice::GENERAL), shape)?;
    // A backward pass needs statistics.
    general.run(Operation::Train, &mut sets[0])?;
    general.run(problem.operation, &mut sets[0])?;
    let expected = general.results(problem.operation, &sets[0])?;
    let copy = time(cuda, &mut sets, 50e3, |tensors| {
        cuda.copy(tensors.x.as_view(), tensors.y.as_view_mut())
    })?;

    let mut ways = Vec::new();
    for plan in candidates(problem, cuda.limits())?.iter().step_by(every) {
        if effort.is_over() {
            return Ok(None);
        }
        let choice = plan.choice();
        let found = try_one(
            &cuda.with_choice(choice),
            problem,
            plan.modelled_time(),
            &mut sets,
            &expected,
        );
        summary.tried += 1;
        let (time, wrong) = match found {
            Ok(time) => (Some(time), None),
            // The driver has no room for such a team: another way would have run in its place.
            Err(error) if error.to_string() == NO_ROOM => continue,
            Err(error) => (None, Some(error.to_string())),
        };
        summary.wrong += usize::from(wrong.is_some());
        if let Some(wrong) = &wrong {
            println!(
                "wrong: {} {shape} {}, {choice}: {wrong}",
                problem.operation, problem.dtype
            );
        }
        ways.push(json!({
            "way": choice.to_string(),
            "modelled_us": plan.modelled_time() * 1e-3,
            "us": time,
            "wrong": wrong,
        }));
    }
    Ok(Some(json!({
        "op": problem.operation.name(),
        "shape": [shape.batch, shape.channels, shape.height, shape.width],
        "layout": shape.layout.name(),
        "element": problem.dtype.name(),
        "least_bytes": Plan::new(problem, cuda.limits())?.minimum_bytes(),
        "copy_us": copy,
        "ways": ways,
    })))
}

const NO_ROOM: &str = "the driver has no room for a team";

/// Leaves out a second buffer for strips that are alone, and what the model holds to be hopeless.
fn is_worth_trying(plan: &Plan, best: f64) -> bool {
    let idle_stage = plan.kernels.iter().any(|launch| {
        let teams = u64::from(launch.grid) / launch.tiling.splits;
        let two_stages = launch
            .instantiation
            .resident
            .is_some_and(|resident| resident.stages > 1);
        two_stages && teams >= launch.tiling.strips
    });
    !idle_stage && plan.modelled_time() <= HOPELESS * best
}

/// More tensors than four times the L2 cache; a pass touches at least two of each set. The stand-in has no cache.
fn tensors<T: Element>(cuda: &Cuda, shape: Shape, dry_run: bool) -> Answer<Vec<Tensors<T>>> {
    let len = shape.len()?;
    let sets = if dry_run {
        1
    } else {
        1 + 4 * cuda.limits().l2_cache as usize / (2 * len * size_of::<T>())
    };
    let values = |factor: usize| -> Vec<T> {
        let value = |i: usize| (i * factor % PERIOD) as f64 / 1024.0 - 1.5;
        let period: Vec<T> = (0..PERIOD)
            .map(|i| T::from_param(T::Param::from_f64(value(i))))
            .collect();
        let mut values = period.repeat(len.div_ceil(PERIOD));
        values.truncate(len);
        values
    };
    let (x, dy) = (values(7919), values(104_729));
    (0..sets)
        .map(|_| {
            Ok(Tensors {
                x: cuda.upload(&x)?,
                y: cuda.zeros(len)?,
                dy: cuda.upload(&dy)?,
                dx: cuda.zeros(len)?,
            })
        })
        .collect()
}

/// Checks one way, then times it: microseconds of a call.
fn try_one<T: Element>(
    cuda: &Cuda,
    problem: &Problem,
    modelled: f64,
    sets: &mut [Tensors<T>],
    expected: &[Vec<f64>],
) -> Answer<f64> {
    let planned = cuda.plan(problem)?;
    if planned.choice().general != cuda.choice().general {
        return Err(NO_ROOM.into());
    }
    let mut step = Step::<T>::new(cuda, problem.shape)?;
    let len = problem.shape.len()?;
    // What a way before this one has left must not stand for its result.
    (sets[0].y, sets[0].dx) = (cuda.zeros(len)?, cuda.zeros(len)?);
    step.run(Operation::Train, &mut sets[0])?;
    step.run(problem.operation, &mut sets[0])?;
    compare::<T>(&step.results(problem.operation, &sets[0])?, expected)?;
    time(cuda, sets, modelled, |tensors| step.run(problem.operation, tensors))
}

/// A module, and what its passes need.
struct Step<T: Element> {
    cuda: Cuda,
    module: BatchNorm2d<Cuda, T::Param>,
    saved: Saved<Cuda, T>,
    gradients: Gradients<Cuda, T::Param>,
}

impl<T: Element> Step<T> {
    fn new(cuda: &Cuda, shape: Shape) -> batchnorm_cuda::Result<Self> {
        let module = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(shape.channels))?;
        Ok(Self {
            cuda: cuda.clone(),
            saved: module.prepare(shape)?,
            gradients: module.gradients()?,
            module,
        })
    }

    fn run(&mut self, operation: Operation, tensors: &mut Tensors<T>) -> batchnorm_cuda::Result<()> {
        let Tensors { x, y, dy, dx } = tensors;
        match operation {
            Operation::Backward => {
                let backward = Backward::new(&*x, &*dy).dx(dx).parameters(&mut self.gradients);
                self.module.backward_with(backward, &mut self.saved)
            }
            _ => self.module.forward_train_with(Forward::new(&*x, y), &mut self.saved),
        }
    }

    /// Samples of the tensor that the pass writes, and all numbers per channel.
    fn results(&self, operation: Operation, tensors: &Tensors<T>) -> Answer<Vec<Vec<f64>>> {
        let (tensor, vectors) = match operation {
            Operation::Backward => (&tensors.dx, [&self.gradients.weight, &self.gradients.bias]),
            _ => {
                let running = self.module.running_mean().zip(self.module.running_var());
                let (mean, variance) = running.ok_or("the module tracks statistics")?;
                (&tensors.y, [mean, variance])
            }
        };
        let len = tensor.len();
        let mut samples = Vec::new();
        for place in 0..SAMPLES {
            let begin = (len.saturating_sub(SAMPLE) * place) / (SAMPLES - 1);
            let part = self.cuda.to_vec(tensor.slice(begin..(begin + SAMPLE).min(len)))?;
            samples.extend(part.into_iter().map(|value| value.to_param().to_f64()));
        }
        let mut results = vec![samples];
        for vector in vectors {
            let values = self.cuda.to_vec(vector.as_view())?;
            results.push(values.into_iter().map(Real::to_f64).collect());
        }
        Ok(results)
    }
}

/// Two ways to compute the same differ by rounding: a few units in the last place of the largest number.
fn compare<T: Element>(got: &[Vec<f64>], expected: &[Vec<f64>]) -> Answer<()> {
    let of_tensor = match T::DTYPE {
        Dtype::F16 => 2e-3,
        Dtype::Bf16 => 1.6e-2,
        Dtype::F32 | Dtype::F64 => 2e-6,
    };
    let names = ["tensor", "first vector", "second vector"];
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let limit = if index == 0 { of_tensor } else { 1e-4 };
        let largest = expected
            .iter()
            .fold(1e-30, |largest: f64, value| largest.max(value.abs()));
        let error = got
            .iter()
            .zip(expected)
            .map(|(got, expected)| {
                if got.is_nan() {
                    f64::INFINITY
                } else {
                    (got - expected).abs()
                }
            })
            .fold(0.0, f64::max);
        if error > limit * largest {
            return Err(format!("{}: off by {:.1e} of the largest number", names[index], error / largest).into());
        }
    }
    Ok(())
}

/// Microseconds of one call, of a graph of calls that take turns among the tensors.
fn time<T: Element>(
    cuda: &Cuda,
    sets: &mut [Tensors<T>],
    modelled: f64,
    mut call: impl FnMut(&mut Tensors<T>) -> batchnorm_cuda::Result<()>,
) -> Answer<f64> {
    let calls = (GRAPH_NANOSECONDS / modelled).clamp(2.0, 100.0) as usize;
    let stream = Arc::clone(cuda.stream());
    let graph = capture(&stream, || {
        (0..calls).try_for_each(|number| call(&mut sets[number % sets.len()]))
    })?;
    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut times = Vec::new();
    graph.launch()?;
    for _ in 0..REPLAYS {
        let start = event()?;
        graph.launch()?;
        let end = event()?;
        stream.synchronize()?;
        times.push(f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPLAYS / 2])
}

fn capture(
    stream: &Arc<batchnorm_cuda::cudarc::driver::CudaStream>,
    calls: impl FnOnce() -> batchnorm_cuda::Result<()>,
) -> Answer<CudaGraph> {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let called = calls();
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    called?;
    Ok(graph?.ok_or("the capture gave no graph")?)
}

fn limits_to_json(cuda: &Cuda) -> Value {
    let limits = cuda.limits();
    json!({
        "name": limits.name,
        "architecture": limits.architecture,
        "multiprocessors": limits.multiprocessors,
        "threads_per_multiprocessor": limits.threads_per_multiprocessor,
        "shared_memory_per_block": limits.shared_memory_per_block,
        "shared_memory_per_multiprocessor": limits.shared_memory_per_multiprocessor,
        "shared_memory_reserved_per_block": limits.shared_memory_reserved_per_block,
        "blocks_per_multiprocessor": limits.blocks_per_multiprocessor,
        "largest_cluster": limits.largest_cluster,
        "cooperative_launch": limits.cooperative_launch,
        "memory_bandwidth": limits.memory_bandwidth,
        "l2_cache": limits.l2_cache,
        "grid": limits.grid,
    })
}
