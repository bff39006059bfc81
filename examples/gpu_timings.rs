//! Times passes on a GPU for another program, which says on standard input, one JSON line at a time, what to do next, and so
//! can alternate with a library of its own: `scripts/gpu-timings` does, with PyTorch.
//!
//! ```text
//! {"do": "device"}
//! {"do": "prepare", "shape": "32x64x56x56", "layout": "nchw", "element": "f16", "epilogue": "relu", "folder": "/tmp/step",
//!  "most_sets": 1000}
//! {"do": "results"}
//! {"do": "time", "op": "train", "cache": "cold", "calls": 100, "repeats": 2}
//! {"do": "once", "op": "train"}
//! ```
//!
//! `prepare` reads x, dy and z from raw files of that folder, `results` writes y, y_eval, dx, dz, dweight, dbias, running_mean
//! and running_var there, of a first step. `time` answers with the milliseconds of one call, for each replay of a CUDA graph of
//! so many calls. With a `cold` cache the calls rotate among sets of tensors, `most_sets` at most, of which every pass touches
//! more than four times the L2 cache; with a `warm` one all calls use one set. `once` runs a single call, for a profiler. An
//! answer with `error` says why something could not be done.
//!
//! `--stand-in h200` takes the stand-in driver instead of a GPU: its times mean nothing, all else is the same.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::cuda::plan::{Operation, Plan, Problem};
use batchnorm_cuda::cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaGraph, CudaSlice};
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{
    AsTensor, Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Dtype, Element, Epilogue, Forward, Gradients,
    Layout, Plain, Real, Saved, Shape,
};
use clap::Parser;
use serde_json::{Value, json};

/// Whatever goes wrong is told to the program that asks.
type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// Times passes on a GPU for another program, which asks on standard input.
#[derive(Parser)]
struct Arguments {
    /// Use the stand-in driver, with this device profile.
    #[arg(long)]
    stand_in: Option<String>,
}

fn main() -> Answer<()> {
    let arguments = Arguments::parse();
    let (context, cache) = match &arguments.stand_in {
        Some(profile) => {
            emulator::install();
            // Kernels of the stand-in have no business among those of the user.
            (CudaContext::new(emulator::ordinal(profile))?, DiskCache::Off)
        }
        None => {
            batchnorm_cuda::cuda::is_available()?;
            (CudaContext::new(0)?, DiskCache::default())
        }
    };
    // SAFETY: one stream uses all buffers. A graph cannot be captured with the events.
    unsafe { context.disable_event_tracking() };
    let cuda = Cuda::with_cache(context.new_stream()?, cache)?;
    let mut prepared: Option<Box<dyn Passes>> = None;
    for line in std::io::stdin().lock().lines() {
        let answer = answer(&line?, &cuda, &mut prepared);
        println!(
            "{}",
            answer.unwrap_or_else(|error| json!({ "error": error.to_string() }))
        );
    }
    Ok(())
}

fn answer(line: &str, cuda: &Cuda, prepared: &mut Option<Box<dyn Passes>>) -> Answer<Value> {
    let request: Value = serde_json::from_str(line)?;
    let text = |key: &str| request[key].as_str().ok_or(format!("no text under {key:?}"));
    let number = |key: &str| request[key].as_u64().ok_or(format!("no number under {key:?}"));
    let what = text("do")?;
    if what == "device" {
        let limits = cuda.limits();
        return Ok(json!({ "name": limits.name, "architecture": limits.architecture, "l2_cache": limits.l2_cache }));
    }
    if what == "prepare" {
        let (layout, element): (Layout, Dtype) = (text("layout")?.parse()?, text("element")?.parse()?);
        let case = Case {
            shape: Shape {
                layout,
                ..dimensions(text("shape")?)?
            },
            epilogue: text("epilogue")?.parse()?,
            folder: PathBuf::from(text("folder")?),
            most_sets: number("most_sets")?,
        };
        // Freed before the next tensors are allocated.
        *prepared = None;
        *prepared = Some(match element {
            Dtype::F16 => Box::new(Step::<f16>::new(cuda, case)?),
            Dtype::Bf16 => Box::new(Step::<bf16>::new(cuda, case)?),
            Dtype::F32 => Box::new(Step::<f32>::new(cuda, case)?),
            Dtype::F64 => Box::new(Step::<f64>::new(cuda, case)?),
        });
        return Ok(json!({}));
    }
    let passes = prepared.as_mut().ok_or("nothing has been prepared")?;
    match what {
        "results" => passes.write_results(),
        "once" => passes.once(text("op")?.parse()?),
        "time" => {
            let cold = match text("cache")? {
                "cold" => true,
                "warm" => false,
                other => return Err(format!("unknown state of the cache {other:?}").into()),
            };
            passes.time(text("op")?.parse()?, cold, number("calls")?, number("repeats")?)
        }
        other => Err(format!("nobody knows how to {other:?}").into()),
    }
}

/// Reads `32x64x56x56`.
fn dimensions(text: &str) -> Answer<Shape> {
    let sizes = text.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let &[batch, channels, height, width] = sizes.as_slice() else {
        return Err("expected four numbers, such as 32x64x56x56".into());
    };
    Ok(Shape::nchw(batch, channels, height, width))
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Op {
    Copy,
    Train,
    Eval,
    Backward,
}

impl std::str::FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "copy" => Ok(Op::Copy),
            "train" => Ok(Op::Train),
            "eval" => Ok(Op::Eval),
            "backward" => Ok(Op::Backward),
            other => Err(format!("unknown op {other:?}")),
        }
    }
}

impl Op {
    /// Tensors that any implementation must read or write.
    fn least_tensors(self, epilogue: Epilogue) -> u64 {
        match (self, epilogue) {
            (Op::Copy, _) | (Op::Train | Op::Eval, Epilogue::Identity | Epilogue::Relu) => 2,
            (Op::Train | Op::Eval, Epilogue::AddRelu) => 3,
            (Op::Backward, Epilogue::Identity | Epilogue::Relu) => 3,
            (Op::Backward, Epilogue::AddRelu) => 5,
        }
    }

    fn operation(self) -> Option<Operation> {
        match self {
            Op::Copy => None,
            Op::Train => Some(Operation::Train),
            Op::Eval => Some(Operation::Eval),
            Op::Backward => Some(Operation::Backward),
        }
    }
}

struct Case {
    shape: Shape,
    epilogue: Epilogue,
    folder: PathBuf,
    most_sets: u64,
}

/// Passes over one shape, element and epilogue.
trait Passes {
    /// Runs a step and an evaluation, and writes their results.
    fn write_results(&mut self) -> Answer<Value>;

    /// Runs one call.
    fn once(&mut self, op: Op) -> Answer<Value>;

    /// Times `repeats` replays of a graph of `calls` calls.
    fn time(&mut self, op: Op, cold: bool, calls: u64, repeats: u64) -> Answer<Value>;
}

/// The tensors of one call.
struct Tensors<T: Element> {
    x: CudaSlice<T>,
    z: CudaSlice<T>,
    y: CudaSlice<T>,
    dy: CudaSlice<T>,
    dx: CudaSlice<T>,
    dz: CudaSlice<T>,
}

/// The graph of the last request, for when it comes again.
struct Captured {
    request: (Op, bool, u64),
    graph: CudaGraph,
}

struct Step<T: Element> {
    cuda: Cuda,
    case: Case,
    module: BatchNorm2d<Cuda, T::Param>,
    saved: Saved<Cuda, T>,
    gradients: Gradients<Cuda, T::Param>,
    sets: Vec<Tensors<T>>,
    captured: Option<Captured>,
}

impl<T: Element> Step<T> {
    fn new(cuda: &Cuda, case: Case) -> Answer<Self> {
        let module = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(case.shape.channels))?;
        let len = case.shape.len()?;
        let read = |name: &str| read::<T>(&case.folder.join(name), len);
        let (x, dy, z) = (read("x")?, read("dy")?, read("z")?);
        // The pass that touches the fewest tensors touches two of each set.
        let bytes = 2 * (len * size_of::<T>()) as u64;
        let sets = (1 + 4 * cuda.limits().l2_cache / bytes).min(case.most_sets);
        let sets = (0..sets)
            .map(|_| {
                Ok(Tensors {
                    x: cuda.upload(&x)?,
                    z: cuda.upload(&z)?,
                    y: cuda.zeros(len)?,
                    dy: cuda.upload(&dy)?,
                    dx: cuda.zeros(len)?,
                    dz: cuda.zeros(len)?,
                })
            })
            .collect::<Answer<Vec<_>>>()?;
        let mut step = Self {
            cuda: cuda.clone(),
            saved: module.prepare_fused(case.shape, case.epilogue)?,
            gradients: module.gradients()?,
            module,
            case,
            sets,
            captured: None,
        };
        step.module.prepare_eval::<T>(step.case.shape, step.case.epilogue)?;
        // A backward pass needs the statistics, and with a residual every set's y.
        for set in 0..step.sets.len() {
            step.run(Op::Train, set)?;
        }
        step.cuda.synchronize()?;
        Ok(step)
    }

    /// Enqueues a call on one set of tensors.
    fn run(&mut self, op: Op, set: usize) -> Answer<()> {
        let Self {
            cuda,
            case,
            module,
            saved,
            gradients,
            sets,
            ..
        } = self;
        let Tensors { x, z, y, dy, dx, dz } = &mut sets[set];
        match op {
            Op::Copy => cuda.copy(x.as_view(), y.as_view_mut())?,
            Op::Train => module.forward_train_with(forward(case.epilogue, x, z, y), saved)?,
            Op::Eval => module.forward_eval_with(case.shape, forward(case.epilogue, x, z, y))?,
            Op::Backward => {
                let backward = Backward::new(x, dy).dx(dx).parameters(gradients);
                let backward = match case.epilogue {
                    Epilogue::Identity => backward,
                    Epilogue::Relu => backward.relu(),
                    Epilogue::AddRelu => backward.add_relu(y).dz(dz)?,
                };
                module.backward_with(backward, saved)?;
            }
        }
        Ok(())
    }

    fn capture(&mut self, op: Op, sets: usize, calls: u64) -> Answer<CudaGraph> {
        let stream = Arc::clone(self.cuda.stream());
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let run = (0..calls as usize).try_for_each(|call| self.run(op, call % sets));
        let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        run?;
        Ok(graph?.ok_or("the capture gave no graph")?)
    }
}

fn forward<'a, T: Element>(
    epilogue: Epilogue,
    x: &'a CudaSlice<T>,
    z: &'a CudaSlice<T>,
    y: &'a mut CudaSlice<T>,
) -> Forward<'a, Cuda, T> {
    let forward = Forward::new(x, y);
    match epilogue {
        Epilogue::Identity => forward,
        Epilogue::Relu => forward.relu(),
        Epilogue::AddRelu => forward.add_relu(z),
    }
}

impl<T: Element> Passes for Step<T> {
    fn write_results(&mut self) -> Answer<Value> {
        // The running statistics are those of this one step.
        self.module.reset_running_stats()?;
        self.run(Op::Train, 0)?;
        self.run(Op::Backward, 0)?;
        let Self {
            cuda,
            case,
            gradients,
            sets,
            ..
        } = self;
        let Tensors { y, dx, dz, .. } = &sets[0];
        for (name, tensor) in [("y", y), ("dx", dx), ("dz", dz)] {
            write(&case.folder.join(name), &cuda.to_vec(tensor.as_view())?)?;
        }
        write(&case.folder.join("dweight"), &cuda.to_vec(gradients.weight.view())?)?;
        write(&case.folder.join("dbias"), &cuda.to_vec(gradients.bias.view())?)?;
        let running = |values: Option<&CudaSlice<T::Param>>| {
            Ok::<_, Box<dyn std::error::Error>>(cuda.to_vec(values.ok_or("no running statistics")?.view())?)
        };
        write(&case.folder.join("running_mean"), &running(self.module.running_mean())?)?;
        write(&case.folder.join("running_var"), &running(self.module.running_var())?)?;
        self.run(Op::Eval, 0)?;
        let y = self.cuda.to_vec(self.sets[0].y.as_view())?;
        write(&self.case.folder.join("y_eval"), &y)?;
        // What the backward passes to come expect in its place.
        self.run(Op::Train, 0)?;
        Ok(json!({}))
    }

    fn once(&mut self, op: Op) -> Answer<Value> {
        self.run(op, 0)?;
        self.cuda.synchronize()?;
        Ok(json!({}))
    }

    fn time(&mut self, op: Op, cold: bool, calls: u64, repeats: u64) -> Answer<Value> {
        let sets = if cold { self.sets.len() } else { 1 };
        let request = (op, cold, calls);
        let captured = match self.captured.take() {
            Some(captured) if captured.request == request => captured,
            _ => Captured {
                request,
                graph: self.capture(op, sets, calls)?,
            },
        };
        let stream = self.cuda.stream();
        let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let mut milliseconds = Vec::new();
        for _ in 0..repeats {
            let start = event()?;
            captured.graph.launch()?;
            let end = event()?;
            stream.synchronize()?;
            milliseconds.push(f64::from(start.elapsed_ms(&end)?) / calls as f64);
        }
        self.captured = Some(captured);
        let tensor = (self.case.shape.len()? * size_of::<T>()) as u64;
        let plan = match op.operation() {
            Some(operation) => {
                let problem = Problem::new(operation, self.case.shape, T::DTYPE).epilogue(self.case.epilogue);
                let plan = Plan::new(&problem, self.cuda.limits())?;
                let kernels: Vec<_> = plan
                    .kernels
                    .iter()
                    .map(|launch| launch.instantiation.kernel.name())
                    .collect();
                json!({ "kernels": kernels, "planned_bytes": plan.traffic().bytes() })
            }
            None => json!({ "kernels": ["memcpy"], "planned_bytes": 2 * tensor }),
        };
        Ok(json!({
            "ms": milliseconds,
            "sets": sets,
            "least_bytes": tensor * op.least_tensors(self.case.epilogue),
            "kernels": plan["kernels"],
            "planned_bytes": plan["planned_bytes"],
        }))
    }
}

/// Reads numbers as they lie in memory.
fn read<T: Element>(path: &Path, len: usize) -> Answer<Vec<T>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if bytes.len() != len * size_of::<T>() {
        return Err(format!(
            "{}: {} bytes for {len} elements of {}",
            path.display(),
            bytes.len(),
            T::DTYPE
        )
        .into());
    }
    let mut values = vec![T::from_param(T::Param::ZERO); len];
    // SAFETY: as many bytes as there are; every bit pattern is a number of any element type.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.as_mut_ptr().cast::<u8>(), bytes.len()) };
    Ok(values)
}

/// Writes numbers as they lie in memory.
fn write<T: Plain>(path: &Path, values: &[T]) -> Answer<()> {
    // SAFETY: numbers have no padding, and may be read as bytes.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}
