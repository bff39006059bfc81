//! Synchronised batch norm on CUDA, as the stand-in driver counts and captures it: launches and bytes are the plan's, a pass
//! allocates nothing and waits for nothing of its own, and a step can be captured in a graph that goes on counting.

#![cfg(target_os = "linux")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::cuda::plan::{Alignment, Operation, Plan, Problem, Stage, Tracking};
use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaView, CudaViewMut};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{
    Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Collective, Cuda, Dtype, Element, Epilogue, Error, Forward,
    Gradients, Momentum, Result, Shape, SyncBatchNorm, SyncSaved, ThreadRank,
};
use common::{Case, Random, alone, assert_same_bits, limit, on_own_stream, reference};

/// As if every rank had this one's batch: copies on the device, as a library between devices does, on the same stream.
struct Echo {
    ranks: usize,
}

impl Collective<Cuda> for Echo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        self.ranks
    }

    fn all_gather(&self, backend: &Cuda, own: CudaView<'_, i64>, mut gathered: CudaViewMut<'_, i64>) -> Result<()> {
        let words = Cuda::view_len(&own);
        (0..self.ranks).try_for_each(|rank| {
            let place = gathered.slice_mut(rank * words..(rank + 1) * words);
            backend.copy(own.slice(..), place)
        })
    }
}

/// A module with everything that a step of it touches.
struct Training<T: Element> {
    device: Cuda,
    bn: SyncBatchNorm<Cuda, Echo, T::Param>,
    saved: SyncSaved<Cuda, T>,
    gradients: Gradients<Cuda, T::Param>,
    x: CudaSlice<T>,
    y: CudaSlice<T>,
    z: CudaSlice<T>,
    dy: CudaSlice<T>,
    dx: CudaSlice<T>,
    dz: CudaSlice<T>,
}

impl<T: Element> Training<T> {
    fn new(device: &Cuda, shape: Shape, momentum: Momentum, ranks: usize) -> Self {
        let case = Case::<T>::random(&mut Random::new(1), shape, Epilogue::AddRelu);
        let config = BatchNorm2dConfig::new(shape.channels).momentum(momentum);
        let mut module = BatchNorm2d::new(device, config).unwrap();
        module.load_state_dict(&case.state).unwrap();
        let gradients = module.gradients().unwrap();
        let bn = SyncBatchNorm::new(module, Echo { ranks }).unwrap();
        let upload = |values: &[T]| device.upload(values).unwrap();
        let blank = vec![T::default(); case.x.len()];
        Self {
            device: device.clone(),
            saved: bn.prepare_fused(shape, Epilogue::AddRelu).unwrap(),
            gradients,
            bn,
            x: upload(&case.x),
            y: upload(&blank),
            z: upload(case.z.as_ref().unwrap()),
            dy: upload(case.dy.as_ref().unwrap()),
            dx: upload(&blank),
            dz: upload(&blank),
        }
    }

    fn forward(&mut self) -> Result<()> {
        let forward = Forward::new(&self.x, &mut self.y).add_relu(&self.z);
        self.bn.forward_train_with(forward, &mut self.saved)
    }

    fn backward(&mut self) -> Result<()> {
        let backward = Backward::new(&self.x, &self.dy)
            .dx(&mut self.dx)
            .accumulate_parameters(&mut self.gradients)
            .add_relu(&self.y)
            .dz(&mut self.dz)?;
        self.bn.backward_with(backward, &mut self.saved)
    }

    fn step(&mut self) -> Result<()> {
        self.forward()?;
        self.backward()
    }

    fn assert_same(&self, other: &Self) {
        let state = |training: &Self| training.bn.module().state_dict().unwrap();
        assert_eq!(state(self), state(other));
        let host = |training: &Self, buffer: &CudaSlice<T>| training.device.read(buffer).unwrap();
        for (name, ours, theirs) in [
            ("y", &self.y, &other.y),
            ("dx", &self.dx, &other.dx),
            ("dz", &self.dz, &other.dz),
        ] {
            assert_same_bits(name, &host(self, ours), &host(other, theirs));
        }
        assert_eq!(
            self.device.read(&self.gradients.weight).unwrap(),
            other.device.read(&other.gradients.weight).unwrap()
        );
    }
}

/// A context whose streams `cudarc` does not order by events, as a capture needs it.
fn context_without_events() -> Arc<CudaContext> {
    common::driver();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: in these tests every buffer is used on one stream only.
    unsafe { context.disable_event_tracking() };
    context
}

/// Launches, grid by grid and byte by byte.
fn assert_as_planned(cuda: &Cuda, problems: &[Problem]) {
    let counted = emulator::launches(cuda.stream().cu_stream());
    let planned: Vec<_> = problems
        .iter()
        .flat_map(|problem| Plan::new(problem, cuda.limits()).unwrap().kernels)
        .collect();
    assert_eq!(counted.len(), planned.len(), "{counted:?}");
    for (launch, planned) in counted.iter().zip(&planned) {
        assert_eq!(launch.kernel, planned.instantiation.kernel.name());
        assert_eq!(
            (launch.grid, launch.block),
            ([planned.grid, 1, 1], [planned.block(), 1, 1])
        );
        assert_eq!(
            (launch.bytes_loaded, launch.bytes_stored),
            (planned.traffic.read, planned.traffic.written),
            "{}: loaded and stored, against the plan's",
            launch.kernel
        );
    }
}

fn count_a_step<T: Element>(shape: Shape, ranks: usize) {
    for (momentum, tracking) in [
        (Momentum::Factor(0.1), Tracking::Momentum),
        (Momentum::CumulativeAverage, Tracking::CumulativeAverage),
    ] {
        let cuda = on_own_stream(&context_without_events());
        let mut training = Training::<T>::new(&cuda, shape, momentum, ranks);
        let _ = emulator::launches(cuda.stream().cu_stream());
        let problem = |operation, stage| Problem {
            stage,
            tracking,
            accumulate: true,
            alignment: Alignment::FULL,
            ..Problem::new(operation, shape, T::DTYPE).epilogue(Epilogue::AddRelu)
        };
        training.forward().unwrap();
        let forward = [Stage::Rank, Stage::Merge { ranks }, Stage::Apply, Stage::Update];
        assert_as_planned(&cuda, &forward.map(|stage| problem(Operation::Train, stage)));
        training.backward().unwrap();
        let backward = [Stage::Rank, Stage::Merge { ranks }, Stage::Apply];
        assert_as_planned(&cuda, &backward.map(|stage| problem(Operation::Backward, stage)));
        assert_eq!(
            training.saved.values_per_channel(),
            Ok((ranks * shape.values_per_channel().unwrap()) as u64)
        );
    }
}

#[test]
fn launches_and_bytes_are_the_plans() {
    alone("launches_and_bytes_are_the_plans", || {
        count_a_step::<f32>(Shape::nchw(4, 3, 8, 16), 3);
        count_a_step::<f16>(Shape::nchw(2, 300, 3, 3), 2);
        count_a_step::<f64>(Shape::nchw(3, 8, 5, 5).channels_last(), 8);
        count_a_step::<f32>(Shape::nchw(1, 5, 1, 1), 2);
    });
}

/// A rank without images meets the others, and learns what they have.
#[test]
fn an_empty_batch_launches_the_merges_alone() {
    alone("an_empty_batch_launches_the_merges_alone", || {
        let cuda = on_own_stream(&context_without_events());
        let shape = Shape::nchw(0, 6, 4, 4);
        let mut training = Training::<f32>::new(&cuda, shape, Momentum::Factor(0.1), 2);
        let _ = emulator::launches(cuda.stream().cu_stream());
        training.step().unwrap();
        let names: Vec<_> = emulator::launches(cuda.stream().cu_stream())
            .into_iter()
            .map(|launch| launch.kernel)
            .collect();
        assert_eq!(names, ["merge_statistics", "update_running", "merge_sums"]);
    });
}

/// By the stand-in's count of the driver's calls. The copies are the collective's.
#[test]
fn a_step_allocates_nothing_and_waits_for_nothing() {
    alone("a_step_allocates_nothing_and_waits_for_nothing", || {
        let cuda = on_own_stream(&context_without_events());
        let ranks = 3;
        let mut training = Training::<f16>::new(&cuda, Shape::nchw(3, 10, 9, 11), Momentum::Factor(0.1), ranks);
        let before = emulator::thread_calls();
        training.step().unwrap();
        let after = emulator::thread_calls();
        assert_eq!(after.launches, before.launches + 7);
        let expected = emulator::Calls {
            launches: after.launches,
            device_copies: before.device_copies + 2 * ranks as u64,
            ..before
        };
        assert_eq!(after, expected);
    });
}

/// The stand-in, like a driver, refuses what a graph cannot hold, so that the capture itself proves that there is none.
#[test]
fn replayed_graph_goes_on_meeting_and_counting() {
    let context = context_without_events();
    for (shape, momentum) in [
        (Shape::nchw(3, 10, 9, 11), Momentum::CumulativeAverage),
        (Shape::nchw(2, 24, 7, 5).channels_last(), Momentum::Factor(0.1)),
    ] {
        let training = || Training::<f16>::new(&on_own_stream(&context), shape, momentum, 2);
        let (mut replayed, mut direct) = (training(), training());
        replayed.step().unwrap();
        direct.step().unwrap();

        let stream = replayed.device.stream().clone();
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .unwrap();
        let step = replayed.step();
        let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        step.unwrap();
        let graph = graph.unwrap().expect("a graph");
        assert_eq!(replayed.bn.module().num_batches_tracked().unwrap(), Some(8));
        for counted in [9, 10, 11] {
            graph.launch().unwrap();
            direct.step().unwrap();
            assert_eq!(replayed.bn.module().num_batches_tracked().unwrap(), Some(counted));
            replayed.assert_same(&direct);
        }
    }
}

/// A pass of a step, with its name.
type Pass = (&'static str, fn(&mut Training<f32>) -> Result<()>);

/// Whichever call of the driver fails, once: the pass says so, running statistics and gradients are as they were, and the same
/// pass works the next time.
#[test]
fn a_failed_call_changes_nothing_and_can_be_made_again() {
    const CUDA_ERROR_OUT_OF_MEMORY: u32 = 2;
    alone("a_failed_call_changes_nothing_and_can_be_made_again", || {
        let context = context_without_events();
        let shape = Shape::nchw(2, 5, 4, 4);
        let training = || Training::<f32>::new(&on_own_stream(&context), shape, Momentum::CumulativeAverage, 2);
        let (mut failing, mut direct) = (training(), training());
        let passes: [Pass; 2] = [("forward", Training::forward), ("backward", Training::backward)];
        for (what, pass) in passes {
            let watch = emulator::watch_calls();
            pass(&mut failing).unwrap();
            let calls = watch.finish();
            pass(&mut direct).unwrap();
            for name in ["cuLaunchKernel", "cuMemcpyDtoDAsync_v2"] {
                assert!(calls.iter().any(|call| call == name), "{what}: {calls:?}");
            }
            let touched = |training: &Training<f32>| {
                let gradients = [&training.gradients.weight, &training.gradients.bias];
                let gradients = gradients.map(|gradient| training.device.read(gradient).unwrap());
                (training.bn.module().state_dict().unwrap(), gradients)
            };
            for (number, call) in calls.iter().enumerate() {
                let before = touched(&failing);
                let watch = emulator::inject_fault(number as u64, CUDA_ERROR_OUT_OF_MEMORY);
                let failed = pass(&mut failing);
                watch.finish();
                assert!(failed.is_err(), "{what}: {call}, number {number}, failed unnoticed");
                assert_eq!(touched(&failing), before, "{what}: {call}, number {number}");
            }
            pass(&mut failing).unwrap();
            pass(&mut direct).unwrap();
            failing.assert_same(&direct);
        }
    });
}

/// A collective that goes through the host cannot be captured; the error says so, and the module is as it was.
#[test]
fn ranks_that_are_threads_cannot_be_captured() {
    let cuda = on_own_stream(&context_without_events());
    let shape = Shape::nchw(2, 4, 3, 3);
    let module = BatchNorm2d::<Cuda>::new(&cuda, BatchNorm2dConfig::new(4)).unwrap();
    let rank = ThreadRank::group(1, Duration::from_secs(60)).pop().unwrap();
    let mut bn = SyncBatchNorm::new(module, rank).unwrap();
    let mut saved = bn.prepare::<f32>(shape).unwrap();
    let x = cuda.zeros::<f32>(72).unwrap();
    let mut y = cuda.zeros::<f32>(72).unwrap();
    bn.forward_train(&x, &mut y, &mut saved).unwrap();

    let stream = cuda.stream();
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .unwrap();
    let refused = bn.forward_train(&x, &mut y, &mut saved);
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    assert!(matches!(refused, Err(Error::Driver { .. })), "{refused:?}");
    assert!(graph.is_err(), "the driver gives the capture up");
    assert_eq!(saved.mean(), Err(Error::SavedEmpty));
    assert_eq!(bn.module().num_batches_tracked().unwrap(), Some(1));
    bn.forward_train(&x, &mut y, &mut saved).unwrap();
    assert_eq!(bn.module().num_batches_tracked().unwrap(), Some(2));
}

/// A training step of two ranks with different batches on a device of their own, with the kernels' sources changed; the largest
/// difference of y and of the running variance from float64, in units of what rounding explains, or the first error.
fn step_with_a_bug(find: &str, replace: &str) -> (Result<f64>, usize) {
    let raw = emulator::create_context(0);
    // SAFETY: the context is live, of this device, and owned by nobody else.
    let context = unsafe { CudaContext::from_raw_context(0, 0, raw.cast()) }.unwrap();
    let shape = Shape::nchw(3, 300, 2, 3);
    let case = Case::<f32>::random(&mut Random::new(3), shape, Epilogue::Identity);
    let (want, scales) = reference(&case);
    let image = case.x.len() / shape.batch;
    let ranks = [(0..2 * image, 2), (2 * image..3 * image, 1)];
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let group = ThreadRank::group(2, Duration::from_secs(60)).into_iter().zip(ranks);
        let threads: Vec<_> = group
            .map(|(rank, (part, images))| {
                let (context, case, want, scales) = (&context, &case, &want, &scales);
                scope.spawn(move || {
                    // Patches belong to the thread; whichever rank compiles a kernel, compiles it with the bug.
                    let patches = emulator::patch_sources(&[(find, replace)]);
                    let worst = || -> Result<f64> {
                        context.bind_to_thread().unwrap();
                        let cuda = Cuda::with_cache(context.new_stream().unwrap(), DiskCache::Off)?;
                        let mut module = BatchNorm2d::<Cuda>::new(&cuda, case.config.clone())?;
                        module.load_state_dict(&case.state)?;
                        let mut bn = SyncBatchNorm::new(module, rank)?;
                        let mut saved = bn.prepare::<f32>(Shape { batch: images, ..shape })?;
                        let x = cuda.upload(&case.x[part.clone()])?;
                        let dy = cuda.upload(&case.dy.as_ref().unwrap()[part.clone()])?;
                        let mut dx = cuda.zeros::<f32>(x.len())?;
                        let mut y = cuda.zeros::<f32>(x.len())?;
                        bn.forward_train(&x, &mut y, &mut saved)?;
                        bn.backward_with(Backward::new(&x, &dy).dx(&mut dx), &mut saved)?;
                        let state = bn.module().state_dict()?;
                        let channel = |at: usize| at / (shape.height * shape.width) % shape.channels;
                        let of_tensor = |got: Vec<f32>, want: &Option<Vec<f64>>, scale: &[f64]| {
                            let want = &want.as_ref().unwrap()[part.clone()];
                            let errors = got.iter().zip(want).enumerate();
                            errors.fold(0.0, |worst, (at, (got, want))| {
                                f64::max(worst, (f64::from(*got) - want).abs() / scale[channel(part.start + at)])
                            })
                        };
                        let y = of_tensor(cuda.read(&y)?, &want.y, &scales.y);
                        let dx = of_tensor(cuda.read(&dx)?, &want.dx, &scales.dx);
                        let variances = state
                            .running_var
                            .as_ref()
                            .unwrap()
                            .iter()
                            .zip(want.running_var.as_ref().unwrap());
                        let variance = variances
                            .zip(&scales.running_var)
                            .fold(0.0, |worst, ((got, want), scale)| {
                                f64::max(worst, (f64::from(*got) - want).abs() / scale)
                            });
                        Ok(y.max(dx).max(variance) / limit(Dtype::F32))
                    };
                    let worst = worst();
                    (worst, patches.finish())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let applied = outcomes.iter().map(|(_, applied)| applied).sum();
    let worst = outcomes.into_iter().map(|(worst, _)| worst);
    (worst.reduce(|one, other| Ok(one?.max(other?))).unwrap(), applied)
}

/// The tests would see these.
#[test]
fn seeded_bugs_are_found() {
    alone("seeded_bugs_are_found", || {
        common::driver();
        let (sound, _) = step_with_a_bug("no kernel says this", "");
        assert!(sound.unwrap() <= 1.0);
        for (what, find, replace) in [
            (
                "ranks' pivots taken for one",
                "(own_pivot - pivot) + message.at(1, c)",
                "message.at(1, c)",
            ),
            (
                "the last rank's pivot",
                "if (all.count == 0) pivot = own_pivot;",
                "pivot = own_pivot;",
            ),
            ("the biased variance", "variance * unbias", "variance"),
            (
                "the last rank's count",
                "values += message.count();",
                "values = message.count();",
            ),
            (
                "the first rank's sums",
                "sum = sum + message.at(0, c);",
                "if (rank == 0) sum = message.at(0, c);",
            ),
            (
                "means of means",
                "{message.count(), {(own",
                "{message.count() != 0, {(own",
            ),
        ] {
            let (worst, applied) = step_with_a_bug(find, replace);
            assert!(applied > 0, "{what}: the patch applies to no kernel any more");
            assert!(
                worst.as_ref().is_ok_and(|worst| *worst > 1.0),
                "{what}: not found: {worst:?}"
            );
        }
        let all_threads = step_with_a_bug("if (blockIdx.x == 0 && threadIdx.x == 0) store_one", "store_one");
        let fault = all_threads.0.unwrap_err().to_string();
        assert!(all_threads.1 > 0 && fault.contains("update_running"), "{fault}");
    });
}
