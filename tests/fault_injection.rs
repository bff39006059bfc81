//! Whatever call of the driver or of NVRTC fails, once, in the midst of a program: the error that comes out is the right
//! one, nothing leaks, the module and the gradients are as they were, and the same call works the next time, so that in the
//! end everything is as if nothing had happened, bit for bit.
//!
//! For every path through the kernels a whole program is run, from the first look at the device to saving and loading a
//! module, as often as it makes calls, and each time another of its calls fails. On most paths only the calls of the steps
//! that run kernels are taken; with `BATCHNORM_TEST_FAULTS=all` all of them, which takes minutes.
//!
//! Always on the stand-in, which alone can let a call fail.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use batchnorm_cuda::cuda::plan::{Choice, Team};
use batchnorm_cuda::cuda::{DiskCache, Kernel, Unavailable};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use batchnorm_cuda::{
    Backend, Backward, BatchNorm2d, Cuda, Dtype, Element, Epilogue, Error, Forward, Gradients, Momentum, Result, Saved,
    Shape, StateDict,
};
use common::{Case, Random, with_element};

/// `all` lets every call fail on every path.
const VARIABLE: &str = "BATCHNORM_TEST_FAULTS";

// ---- paths ---------------------------------------------------------------------------------------------------------

/// One way through the library and its kernels.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// The stand-in's device.
    profile: &'static str,
    shape: Shape,
    dtype: Dtype,
    epilogue: Epilogue,
    momentum: Momentum,
    /// The kernels it may take.
    choice: Choice,
    /// On a stream of its own, so that `cudarc` orders streams by events; else on the default stream.
    own_stream: bool,
}

/// Every walk of `kernels/tensor.cuh`, with one split and with several; every element type, epilogue and momentum.
const PATHS: [Path; 11] = [
    Path {
        profile: "small-75",
        shape: Shape::nchw(2, 2, 4, 8),
        dtype: Dtype::F32,
        epilogue: Epilogue::Identity,
        momentum: Momentum::Factor(0.1),
        choice: Choice::GENERAL,
        own_stream: true,
    },
    Path {
        profile: "small-90",
        shape: Shape::nchw(2, 2, 7, 9),
        dtype: Dtype::F16,
        epilogue: Epilogue::AddRelu,
        momentum: Momentum::CumulativeAverage,
        choice: Choice::GENERAL,
        own_stream: false,
    },
    Path {
        profile: "small-75",
        shape: Shape::nchw(3, 4, 3, 3),
        dtype: Dtype::F64,
        epilogue: Epilogue::Relu,
        momentum: Momentum::Factor(0.3),
        choice: Choice::GENERAL,
        own_stream: false,
    },
    Path {
        profile: "small-90",
        shape: Shape::nchw(33, 1, 16, 16),
        dtype: Dtype::Bf16,
        epilogue: Epilogue::Relu,
        momentum: Momentum::CumulativeAverage,
        choice: Choice::GENERAL,
        own_stream: false,
    },
    Path {
        profile: "small-75",
        shape: Shape::nchw(33, 16, 4, 4).channels_last(),
        dtype: Dtype::F32,
        epilogue: Epilogue::AddRelu,
        momentum: Momentum::Factor(0.1),
        choice: Choice::GENERAL,
        own_stream: false,
    },
    Path {
        profile: "small-grid",
        shape: Shape::nchw(2, 12, 2, 3).channels_last(),
        dtype: Dtype::F16,
        epilogue: Epilogue::Identity,
        momentum: Momentum::Factor(0.1),
        choice: Choice::GENERAL,
        own_stream: false,
    },
    // The same on chip.
    Path {
        profile: "small-75",
        shape: Shape::nchw(3, 5, 8, 8),
        dtype: Dtype::F32,
        epilogue: Epilogue::AddRelu,
        momentum: Momentum::Factor(0.1),
        choice: Choice {
            threads: Some(256),
            ..Choice::resident(Some(Team::Block))
        },
        own_stream: false,
    },
    Path {
        profile: "small-90",
        shape: Shape::nchw(2, 44, 5, 3).channels_last(),
        dtype: Dtype::F16,
        epilogue: Epilogue::Relu,
        momentum: Momentum::CumulativeAverage,
        choice: Choice {
            threads: Some(256),
            bulk: Some(true),
            ..Choice::resident(Some(Team::Cluster(2)))
        },
        own_stream: false,
    },
    Path {
        profile: "small-90",
        shape: Shape::nchw(5, 3, 7, 9),
        dtype: Dtype::F32,
        epilogue: Epilogue::Identity,
        momentum: Momentum::Factor(0.1),
        choice: Choice {
            threads: Some(256),
            ..Choice::resident(Some(Team::Cluster(16)))
        },
        own_stream: false,
    },
    Path {
        profile: "small-75",
        shape: Shape::nchw(4, 7, 5, 5),
        dtype: Dtype::F32,
        epilogue: Epilogue::Identity,
        momentum: Momentum::CumulativeAverage,
        choice: Choice {
            threads: Some(256),
            ..Choice::resident(Some(Team::Grid))
        },
        own_stream: false,
    },
    // No images, and so no launches; the buffers are empty.
    Path {
        profile: "small-75",
        shape: Shape::nchw(0, 2, 2, 2),
        dtype: Dtype::F32,
        epilogue: Epilogue::Identity,
        momentum: Momentum::Factor(0.1),
        choice: Choice::GENERAL,
        own_stream: true,
    },
];

// ---- the program ---------------------------------------------------------------------------------------------------

/// The tensors of a step.
struct Tensors<T: Element> {
    x: CudaSlice<T>,
    z: CudaSlice<T>,
    dy: CudaSlice<T>,
    y: CudaSlice<T>,
    dx: CudaSlice<T>,
    dz: CudaSlice<T>,
    evaluated: CudaSlice<T>,
}

/// A program that uses a module in every way, as far as it has come.
struct Program<T: Element> {
    stream: Arc<CudaStream>,
    choice: Choice,
    case: Case<T>,
    cuda: Option<Cuda>,
    module: Option<BatchNorm2d<Cuda, T::Param>>,
    saved: Option<Saved<Cuda, T>>,
    gradients: Option<Gradients<Cuda, T::Param>>,
    tensors: Option<Tensors<T>>,
    file: Vec<u8>,
    results: Vec<String>,
}

/// A step of the program, with its name.
type Step<T> = (&'static str, fn(&mut Program<T>) -> Result<()>);

impl<T: Element> Program<T> {
    /// What the program does, in order. Each step either does all it is there for or fails, and can be tried again.
    const STEPS: [Step<T>; 16] = [
        ("open", |program| {
            let cuda = Cuda::with_cache(program.stream.clone(), DiskCache::Off)?;
            program.cuda = Some(cuda.with_choice(program.choice));
            Ok(())
        }),
        ("construct", |program| {
            program.module = Some(BatchNorm2d::new(program.cuda(), program.case.config.clone())?);
            Ok(())
        }),
        ("load a dict", |program| {
            let state = program.case.state.clone();
            program.module().load_state_dict(&state)
        }),
        ("prepare", |program| {
            let (shape, epilogue) = (program.case.shape, program.case.epilogue);
            program.saved = Some(program.module().prepare_fused(shape, epilogue)?);
            Ok(())
        }),
        ("prepare evaluation", |program| {
            let (shape, epilogue) = (program.case.shape, program.case.epilogue);
            program.module().prepare_eval::<T>(shape, epilogue)
        }),
        ("make gradients", |program| {
            program.gradients = Some(program.module().gradients()?);
            Ok(())
        }),
        ("upload", |program| {
            let (cuda, case) = (program.cuda(), &program.case);
            let blank = || cuda.zeros(case.x.len());
            program.tensors = Some(Tensors {
                x: cuda.upload(&case.x)?,
                z: cuda.upload(case.z.as_ref().unwrap_or(&case.x))?,
                dy: cuda.upload(case.dy.as_ref().unwrap_or(&case.x))?,
                y: blank()?,
                dx: blank()?,
                dz: blank()?,
                evaluated: blank()?,
            });
            Ok(())
        }),
        ("train", |program| {
            let (module, saved, tensors) = (&mut program.module, &mut program.saved, &mut program.tensors);
            let (module, saved, tensors) = (some(module), some(saved), some(tensors));
            let forward = with_epilogue(Forward::new(&tensors.x, &mut tensors.y), &tensors.z, saved.epilogue());
            module.forward_train_with(forward, saved)
        }),
        ("backward", |program| {
            let (module, saved, tensors) = (
                some(&mut program.module),
                some(&mut program.saved),
                &mut program.tensors,
            );
            let Tensors { x, dy, y, dx, dz, .. } = some(tensors);
            let backward = Backward::new(x, dy).dx(dx);
            let backward = match saved.epilogue() {
                Epilogue::Identity => backward,
                Epilogue::Relu => backward.relu(),
                Epilogue::AddRelu => backward.add_relu(y).dz(dz)?,
            };
            // Added up, so that nothing may be added twice.
            module.backward_with(backward.accumulate_parameters(some(&mut program.gradients)), saved)
        }),
        ("backward in place", |program| {
            let (module, saved, tensors) = (
                some(&mut program.module),
                some(&mut program.saved),
                &mut program.tensors,
            );
            let Tensors { x, dy, y, .. } = some(tensors);
            let backward = Backward::in_place(x, dy);
            let backward = match saved.epilogue() {
                Epilogue::Identity => backward,
                Epilogue::Relu => backward.relu(),
                Epilogue::AddRelu => backward.add_relu(y),
            };
            module.backward_with(backward.accumulate_parameters(some(&mut program.gradients)), saved)
        }),
        ("evaluate", |program| {
            let (module, tensors) = (some(&mut program.module), some(&mut program.tensors));
            let Case { shape, epilogue, .. } = program.case;
            let forward = with_epilogue(Forward::new(&tensors.x, &mut tensors.evaluated), &tensors.z, epilogue);
            module.forward_eval_with(shape, forward)
        }),
        ("backward in evaluation", |program| {
            let (module, saved, tensors) = (
                some(&mut program.module),
                some(&mut program.saved),
                &mut program.tensors,
            );
            let Tensors {
                x, z, evaluated, dz, ..
            } = some(tensors);
            let backward = Backward::new(x, z).dx(dz);
            let backward = match saved.epilogue() {
                Epilogue::Identity => backward,
                Epilogue::Relu => backward.relu(),
                Epilogue::AddRelu => backward.add_relu(evaluated),
            };
            module.backward_eval_with(backward.accumulate_parameters(some(&mut program.gradients)), saved)
        }),
        ("read", |program| {
            let tensors = some(&mut program.tensors);
            let cuda = some(&mut program.cuda);
            let Tensors {
                y,
                dx,
                dy,
                dz,
                evaluated,
                ..
            } = tensors;
            let mut results = Vec::new();
            for tensor in [y, dx, dy, dz, evaluated] {
                results.push(format!("{:?}", cuda.read(tensor)?));
            }
            let saved = some(&mut program.saved);
            results.push(format!("{:?} {:?}", saved.mean()?, saved.invstd()?));
            program.results = results;
            Ok(())
        }),
        ("save", |program| {
            program.file = program.module().to_safetensors("bn.")?;
            Ok(())
        }),
        ("reset", |program| program.module().reset_parameters()),
        ("load a file", |program| {
            let file = program.file.clone();
            program.module().load_safetensors(&file, "bn.")
        }),
    ];

    fn new(stream: Arc<CudaStream>, path: &Path) -> Self {
        Self {
            stream,
            choice: path.choice,
            case: case(path),
            cuda: None,
            module: None,
            saved: None,
            gradients: None,
            tensors: None,
            file: Vec::new(),
            results: Vec::new(),
        }
    }

    fn cuda(&self) -> &Cuda {
        self.cuda.as_ref().expect("made by an earlier step")
    }

    fn module(&mut self) -> &mut BatchNorm2d<Cuda, T::Param> {
        some(&mut self.module)
    }

    /// What a failure must leave as it was.
    fn observed(&self) -> Observed<T> {
        let cuda = self.cuda.as_ref();
        Observed {
            state: self
                .module
                .as_ref()
                .map(|module| module.state_dict().expect("the state")),
            gradients: self.gradients.as_ref().map(|gradients| {
                [&gradients.weight, &gradients.bias].map(|buffer| {
                    let values: Vec<T::Param> = cuda.expect("gradients have a device").read(buffer).expect("gradients");
                    format!("{values:?}")
                })
            }),
            file: self.file.clone(),
            results: self.results.clone(),
        }
    }
}

/// All of a program that outlives a step, on the host.
#[derive(Debug, PartialEq)]
struct Observed<T: Element> {
    state: Option<StateDict<T::Param>>,
    gradients: Option<[String; 2]>,
    file: Vec<u8>,
    results: Vec<String>,
}

fn some<V>(made: &mut Option<V>) -> &mut V {
    made.as_mut().expect("made by an earlier step")
}

fn with_epilogue<'a, T: Element>(
    forward: Forward<'a, Cuda, T>,
    z: &'a CudaSlice<T>,
    epilogue: Epilogue,
) -> Forward<'a, Cuda, T> {
    match epilogue {
        Epilogue::Identity => forward,
        Epilogue::Relu => forward.relu(),
        Epilogue::AddRelu => forward.add_relu(z),
    }
}

// ---- what must come out --------------------------------------------------------------------------------------------

const OUT_OF_MEMORY: u32 = 2;
const OPERATING_SYSTEM: u32 = 304;
const LAUNCH_OUT_OF_RESOURCES: u32 = 701;
const LAUNCH_FAILED: u32 = 719;
const NVRTC_INTERNAL_ERROR: u32 = 11;

/// An error that the function gives on a machine in trouble.
fn code_of(call: &str) -> u32 {
    match call {
        _ if call.starts_with("cuMemAlloc") => OUT_OF_MEMORY,
        _ if call.starts_with("cuLaunch") => LAUNCH_OUT_OF_RESOURCES,
        _ if call.starts_with("nvrtc") => NVRTC_INTERNAL_ERROR,
        _ => OPERATING_SYSTEM,
    }
}

/// Whether the step that made this call must fail by it. The others are calls that `cudarc` makes where no error can be
/// returned: it keeps the error for its next call, if there is one. And one device of several may be out of order.
fn must_surface(call: &str) -> bool {
    const KEPT: [&str; 11] = [
        "cuCtxGetCurrent",
        "cuEventDestroy_v2",
        "cuEventRecord",
        "cuMemFreeAsync",
        "cuModuleUnload",
        "cuStreamWaitEvent",
        "nvrtcDestroyProgram",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDeviceGetName",
        "cuDevicePrimaryCtxRelease_v2",
    ];
    !KEPT.contains(&call)
}

/// What an error says was tried, where it can be told from the function.
fn words(call: &str) -> Option<&'static str> {
    Some(match call {
        "cuMemcpyHtoDAsync_v2" => "copying to the device",
        "cuMemcpyDtoHAsync_v2" => "copying to the host",
        "cuMemcpyDtoDAsync_v2" => "copying on the device",
        "cuMemsetD8Async" => "filling with zeros",
        "cuStreamSynchronize" => "waiting for the stream",
        "cuStreamIsCapturing" => "asking for the stream's capture status",
        "cuModuleLoadData" => "loading a kernel",
        "cuModuleGetFunction" => "looking up a kernel",
        "cuDeviceGetName" => "reading the device's name",
        "cuFuncSetAttribute" => "setting a kernel's attributes",
        _ => return None,
    })
}

/// Fails unless the error says what happened.
fn assert_typed(failed: &str, code: u32, error: &Error) {
    let right = match error {
        Error::OutOfMemory { bytes } => failed.starts_with("cuMemAlloc") && *bytes > 0,
        Error::Nvrtc { call, message } => *call == failed && message == "NVRTC_ERROR_INTERNAL_ERROR",
        Error::Unavailable(Unavailable::DriverFailed { call, code: got }) => *call == failed && *got == code,
        // cudarc panics where it makes events for a buffer of no elements; the code is in the panic's words only.
        Error::Driver {
            call: "making an event",
            code: 999,
            message,
        } => ["cuEventCreate", "cuCtxGetCurrent"].contains(&failed) && message.contains("CUDA_ERROR_OPERATING_SYSTEM"),
        Error::Driver {
            call,
            code: got,
            message,
        } => {
            let tried = if failed.starts_with("cuLaunch") {
                Kernel::ALL.iter().any(|kernel| kernel.name() == *call)
            } else {
                words(failed).is_none_or(|words| words == *call)
            };
            tried && *got == code && message.starts_with("CUDA_ERROR_") && code != OUT_OF_MEMORY
        }
        _ => false,
    };
    assert!(
        right,
        "{failed} failed with {code}, and the error is {error:?}: {error}"
    );
}

// ---- runs ----------------------------------------------------------------------------------------------------------

/// A context that shares nothing, not even kernels, and a stream.
fn context(path: &Path) -> (Arc<CudaContext>, Arc<CudaStream>) {
    emulator::install();
    let ordinal = emulator::ordinal(path.profile);
    let raw = emulator::create_context(ordinal);
    // SAFETY: the context is live, of this device, and owned by nobody else.
    let context = unsafe { CudaContext::from_raw_context(ordinal, ordinal as i32, raw.cast()) }.expect("a context");
    let stream = if path.own_stream {
        context.new_stream().expect("a stream")
    } else {
        context.default_stream()
    };
    (context, stream)
}

fn case<T: Element>(path: &Path) -> Case<T> {
    let mut case = Case::random(&mut Random::new(5), path.shape, path.epilogue);
    case.config = case.config.momentum(path.momentum);
    case
}

/// The program undisturbed: the calls that its steps make, and its end, what there is to observe before each step and at
/// the end, and the kernels that ran.
struct Undisturbed<T: Element> {
    calls: Vec<String>,
    /// Of which number each step's first call is, and the end.
    steps: Vec<usize>,
    dropping: Vec<String>,
    observed: Vec<Observed<T>>,
    kernels: BTreeSet<String>,
}

impl<T: Element> Undisturbed<T> {
    fn run(path: &Path) -> Self {
        let (context_, stream) = context(path);
        let mut program = Program::<T>::new(stream, path);
        let (mut calls, mut steps) = (Vec::new(), Vec::new());
        for (name, step) in Program::STEPS {
            steps.push(calls.len());
            let watched = emulator::watch_calls();
            step(&mut program).unwrap_or_else(|error| panic!("{path:?}, {name}: {error}"));
            calls.extend(watched.finish());
        }
        steps.push(calls.len());
        let watched = emulator::watch_calls();
        drop(program);
        let dropping = watched.finish();
        drop(context_);

        let (_context, stream) = context(path);
        let mut program = Program::<T>::new(stream.clone(), path);
        let mut observed = Vec::new();
        for (_, step) in Program::STEPS {
            observed.push(program.observed());
            step(&mut program).expect("as before");
        }
        observed.push(program.observed());
        let launches = emulator::launches(stream.cu_stream());
        Self {
            calls,
            steps,
            dropping,
            observed,
            kernels: launches.into_iter().map(|launch| launch.kernel).collect(),
        }
    }

    /// The calls of the steps from this one to that one.
    fn calls_of(&self, first: &str, last: &str) -> Range<usize> {
        let at = |wanted: &str| {
            let step = Program::<T>::STEPS.iter().position(|(name, _)| *name == wanted);
            step.expect("a step of this name")
        };
        self.steps[at(first)]..self.steps[at(last) + 1]
    }
}

/// Runs the program with one call failing, and holds all that happens against the undisturbed run.
fn disturb<T: Element>(path: &Path, undisturbed: &Undisturbed<T>, number: usize) {
    let failed = undisturbed.calls[number].as_str();
    let code = code_of(failed);
    let what = |name: &str| format!("call {number}, {failed}, of {path:?}, at {name}");
    let (context, stream) = context(path);
    assert_eq!(emulator::live_memory(context.cu_ctx()).allocations, 0);

    let watched = emulator::inject_fault(number as u64, code);
    let mut program = Program::<T>::new(stream, path);
    let mut failures = 0;
    for ((name, step), before) in Program::STEPS.into_iter().zip(&undisturbed.observed) {
        if let Err(error) = step(&mut program) {
            failures += 1;
            assert_typed(failed, code, &error);
            assert_eq!(&program.observed(), before, "{}: {error}", what(name));
            if name == "train" {
                let mean = some(&mut program.saved).mean();
                assert_eq!(mean, Err(Error::SavedEmpty), "{}: {error}", what(name));
            }
            step(&mut program).unwrap_or_else(|again| panic!("{}: {error}, and then {again}", what(name)));
        }
    }
    let calls = watched.finish();
    assert_eq!(
        calls.get(number),
        Some(&undisturbed.calls[number]),
        "{}",
        what("the end")
    );
    let expected = if must_surface(failed) { 1..=1 } else { 0..=1 };
    assert!(expected.contains(&failures), "{}: {failures} failures", what("the end"));
    // An error that was kept for a next call, which does not come.
    let _ = context.check_err();
    assert_eq!(
        Some(&program.observed()),
        undisturbed.observed.last(),
        "{}",
        what("the end")
    );
    drop(program);
    assert_lost(failed, &context, &what("the end"));
}

/// Runs the program to its end, and lets a call fail when all is dropped.
fn disturb_end<T: Element>(path: &Path, undisturbed: &Undisturbed<T>, number: usize) {
    let (context, stream) = context(path);
    let mut program = Program::<T>::new(stream, path);
    for (_, step) in Program::STEPS {
        step(&mut program).expect("undisturbed");
    }
    let failed = undisturbed.dropping[number].as_str();
    let _watched = emulator::inject_fault(number as u64, code_of(failed));
    drop(program);
    assert_lost(
        failed,
        &context,
        &format!("call {number}, {failed}, of the end of {path:?}"),
    );
}

/// Fails if more memory is left than a failure of this call explains.
fn assert_lost(failed: &str, context: &CudaContext, what: &str) {
    let live = emulator::live_memory(context.cu_ctx()).allocations;
    let lost = match failed {
        // What the driver refuses to take back is lost.
        "cuMemFreeAsync" => 1..=1,
        // cudarc 0.19.10 forgets memory that it has just allocated where it cannot make the events for it.
        "cuEventCreate" | "cuCtxGetCurrent" => 0..=1,
        _ => 0..=0,
    };
    assert!(lost.contains(&live), "{what}: {live} allocations are left");
}

/// Every call of the program fails once; or every call of the steps that have to do with kernels, if `all` is not set.
fn disturb_path(path: &Path, all: bool) {
    with_element!(path.dtype, E => {
        let undisturbed = Undisturbed::<E>::run(path);
        let calls = if all {
            0..undisturbed.calls.len()
        } else {
            undisturbed.calls_of("prepare", "backward in evaluation")
        };
        let dropping = if all { undisturbed.dropping.len() } else { 0 };
        common::say(&format!("{} faults, {}, {}, {}", calls.len() + dropping, path.choice, path.shape, path.dtype));
        for number in calls {
            disturb(path, &undisturbed, number);
        }
        for number in 0..dropping {
            disturb_end(path, &undisturbed, number);
        }
    });
}

#[test]
fn every_call_may_fail() {
    let all = std::env::var_os(VARIABLE).is_some_and(|value| value == "all");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |count| count.get()) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = PATHS.get(number) else { break };
                    // What is not about kernels is the same on every path.
                    disturb_path(path, number == 0 || all);
                }
            });
        }
    });
}

/// The paths run every kernel that there is, but those that join what ranks tell each other: tests/sync_cuda.rs has the like
/// for these.
#[test]
fn every_kernel_is_on_a_path() {
    let ran: BTreeSet<String> = PATHS
        .iter()
        .flat_map(|path| with_element!(path.dtype, E => Undisturbed::<E>::run(path).kernels))
        .collect();
    let alone = Kernel::ALL.iter().filter(|kernel| !kernel.per_channel());
    let all: BTreeSet<String> = alone.map(|kernel| kernel.name().to_owned()).collect();
    assert_eq!(ran, all);
}

/// Errors after which a context is lost are told apart, wherever they come.
#[test]
fn a_lost_device_is_reported_as_such() {
    let path = &PATHS[1];
    let undisturbed = Undisturbed::<batchnorm_cuda::half::f16>::run(path);
    for (number, failed) in undisturbed.calls.iter().enumerate() {
        if !must_surface(failed) || failed.starts_with("nvrtc") {
            continue;
        }
        let (_context, stream) = context(path);
        let _watched = emulator::inject_fault(number as u64, LAUNCH_FAILED);
        let mut program = Program::<batchnorm_cuda::half::f16>::new(stream, path);
        let result = Program::STEPS.into_iter().try_for_each(|(_, step)| step(&mut program));
        let error = result.expect_err("a call has failed");
        let lost = match &error {
            Error::DeviceLost { code, .. } => *code == LAUNCH_FAILED,
            Error::Unavailable(Unavailable::DriverFailed { call, code }) => *code == LAUNCH_FAILED && call == failed,
            _ => false,
        };
        assert!(lost, "{failed}: {error:?}");
    }
}

/// [`Cuda::new`] makes the context itself.
#[test]
fn a_device_that_cannot_be_opened_can_be_tried_again() {
    emulator::install();
    let watched = emulator::watch_calls();
    drop(Cuda::new(0).expect("a device"));
    let calls = watched.finish();
    assert!(calls.iter().any(|call| call == "cuDevicePrimaryCtxRetain"), "{calls:?}");
    for number in 0..calls.len() {
        let watched = emulator::inject_fault(number as u64, OPERATING_SYSTEM);
        let opened = Cuda::new(0);
        let calls = watched.finish();
        // Once a context is current it need not be made so.
        let Some(failed) = calls.get(number) else { break };
        match opened {
            Ok(_) => assert!(!must_surface(failed), "{failed}"),
            Err(error) => assert_typed(failed, OPERATING_SYSTEM, &error),
        }
        Cuda::new(0).unwrap_or_else(|error| panic!("after {failed}: {error}"));
    }
}

/// A kernel from the disk that does not load is compiled again; a device that is lost stays lost.
#[test]
fn a_cached_kernel_that_does_not_load_is_compiled_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = DiskCache::Folder(folder.path().join("kernels"));
    let path = &PATHS[0];
    let prepare = |code: u32| -> Result<(usize, usize)> {
        let (_context, stream) = context(path);
        let cuda = Cuda::with_cache(stream, cache.clone())?;
        let module: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, case::<f32>(path).config)?;
        let watched = emulator::watch_calls();
        module.prepare_eval::<f32>(path.shape, Epilogue::Identity)?;
        let calls = watched.finish();
        let load = calls
            .iter()
            .position(|call| call == "cuModuleLoadData")
            .expect("a kernel is loaded");

        let (_context, stream) = context(path);
        let cuda = Cuda::with_cache(stream, cache.clone())?;
        let module: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, case::<f32>(path).config)?;
        let _watched = emulator::inject_fault(load as u64, code);
        module.prepare_eval::<f32>(path.shape, Epilogue::Identity)?;
        let report = cuda.compile_report();
        Ok((report.compiled, report.from_disk))
    };
    prepare(0).expect("a kernel");
    assert_eq!(prepare(200), Ok((1, 1)));
    assert_eq!(prepare(OUT_OF_MEMORY), Ok((1, 1)));
}
