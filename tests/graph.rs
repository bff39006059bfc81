//! CUDA graphs, and what makes them possible: a step allocates nothing, waits for nothing, copies nothing to the host, and
//! keeps on the device whatever changes from step to step.

#![cfg(target_os = "linux")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use batchnorm_cuda::cuda::plan::{Choice, Team};
use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaGraph, CudaSlice};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{
    Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Epilogue, Error, Forward, Gradients, Momentum, Result,
    Saved, Shape, StateDict, SyncBatchNorm, ThreadRank,
};
use common::{Case, Device, Random, alone, assert_same_bits, on_own_stream};

/// A module with everything that a step of it touches.
struct Training {
    device: Cuda,
    module: BatchNorm2d<Cuda>,
    saved: Saved<Cuda, f16>,
    gradients: Gradients<Cuda, f32>,
    x: CudaSlice<f16>,
    y: CudaSlice<f16>,
    z: CudaSlice<f16>,
    dy: CudaSlice<f16>,
    dx: CudaSlice<f16>,
    dz: CudaSlice<f16>,
}

impl Training {
    fn new(device: &Cuda, shape: Shape) -> Self {
        let case = Case::<f16>::random(&mut Random::new(1), shape, Epilogue::AddRelu);
        // The factor of the average changes with every batch, so that a graph could not hold it.
        let config = BatchNorm2dConfig::new(shape.channels).momentum(Momentum::CumulativeAverage);
        let mut module = BatchNorm2d::new(device, config).unwrap();
        module.load_state_dict(&case.state).unwrap();
        let upload = |values: &[f16]| device.upload(values).unwrap();
        let blank = vec![f16::ZERO; case.x.len()];
        Self {
            device: device.clone(),
            saved: module.prepare_fused(shape, Epilogue::AddRelu).unwrap(),
            gradients: module.gradients().unwrap(),
            module,
            x: upload(&case.x),
            y: upload(&blank),
            z: upload(case.z.as_ref().unwrap()),
            dy: upload(case.dy.as_ref().unwrap()),
            dx: upload(&blank),
            dz: upload(&blank),
        }
    }

    /// Forward and backward; the gradients at weight and bias pile up.
    fn step(&mut self) -> Result<()> {
        let forward = Forward::new(&self.x, &mut self.y).add_relu(&self.z);
        self.module.forward_train_with(forward, &mut self.saved)?;
        let backward = Backward::new(&self.x, &self.dy)
            .dx(&mut self.dx)
            .accumulate_parameters(&mut self.gradients)
            .add_relu(&self.y)
            .dz(&mut self.dz)?;
        self.module.backward_with(backward, &mut self.saved)
    }

    fn evaluate(&mut self, shape: Shape) -> Result<()> {
        self.module
            .forward_eval_with(shape, Forward::new(&self.x, &mut self.y).add_relu(&self.z))
    }

    fn capture(&mut self) -> CudaGraph {
        let stream = self.device.stream().clone();
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .unwrap();
        let step = self.step();
        let graph = stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .unwrap();
        step.unwrap();
        graph.expect("a graph")
    }

    fn assert_same(&self, other: &Self) {
        let state = |training: &Self| training.module.state_dict().unwrap();
        assert_eq!(state(self), state(other));
        assert_eq!(self.saved.mean().unwrap(), other.saved.mean().unwrap());
        assert_eq!(self.saved.invstd().unwrap(), other.saved.invstd().unwrap());
        let host = |training: &Self, buffer: &CudaSlice<f16>| Cuda::download(&training.device, buffer).unwrap();
        for (name, ours, theirs) in [
            ("y", &self.y, &other.y),
            ("dx", &self.dx, &other.dx),
            ("dz", &self.dz, &other.dz),
        ] {
            assert_same_bits(name, &host(self, ours), &host(other, theirs));
        }
        let host = |training: &Self, buffer: &CudaSlice<f32>| Cuda::download(&training.device, buffer).unwrap();
        for (name, ours, theirs) in [
            ("dweight", &self.gradients.weight, &other.gradients.weight),
            ("dbias", &self.gradients.bias, &other.gradients.bias),
        ] {
            assert_same_bits(name, &host(self, ours), &host(other, theirs));
        }
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

fn shapes() -> [Shape; 2] {
    [Shape::nchw(3, 10, 9, 11), Shape::nchw(2, 24, 7, 5).channels_last()]
}

#[test]
fn replayed_graph_goes_on_training() {
    let context = context_without_events();
    let cluster = Choice::resident(Some(Team::Cluster(2)));
    let grid = Choice::resident(Some(Team::Grid));
    let choices = [Choice::default(), Choice::GENERAL, cluster, grid];
    for (shape, choice) in shapes()
        .into_iter()
        .flat_map(|shape| choices.map(|choice| (shape, choice)))
    {
        let mut replayed = Training::new(&on_own_stream(&context).with_choice(choice), shape);
        let mut direct = Training::new(&on_own_stream(&context).with_choice(choice), shape);
        replayed.step().unwrap();
        direct.step().unwrap();

        let graph = replayed.capture();
        assert_eq!(
            replayed.module.num_batches_tracked().unwrap(),
            Some(8),
            "a capture computes nothing"
        );
        for counted in [9, 10, 11] {
            graph.launch().unwrap();
            direct.step().unwrap();
            assert_eq!(replayed.module.num_batches_tracked().unwrap(), Some(counted));
            replayed.assert_same(&direct);
        }
    }
}

/// Loading and resetting write where the graph reads.
#[test]
fn graph_takes_over_what_is_loaded() {
    let context = context_without_events();
    let [shape, _] = shapes();
    let mut replayed = Training::new(&on_own_stream(&context), shape);
    let mut direct = Training::new(&on_own_stream(&context), shape);
    replayed.step().unwrap();
    direct.step().unwrap();
    let graph = replayed.capture();
    let state: StateDict<f32> = Case::<f16>::random(&mut Random::new(2), shape, Epilogue::Identity).state;
    for training in [&mut replayed, &mut direct] {
        training.module.load_state_dict(&state).unwrap();
    }
    graph.launch().unwrap();
    direct.step().unwrap();
    replayed.assert_same(&direct);

    for training in [&mut replayed, &mut direct] {
        training.module.reset_running_stats().unwrap();
    }
    graph.launch().unwrap();
    direct.step().unwrap();
    replayed.assert_same(&direct);
    assert_eq!(replayed.module.num_batches_tracked().unwrap(), Some(1));
}

/// While `cudarc` orders streams by events a capture would take them along; the call says so, and changes nothing.
#[test]
fn capture_with_event_tracking_is_refused() {
    common::driver();
    let context = CudaContext::new(0).unwrap();
    let [shape, _] = shapes();
    let mut training = Training::new(&on_own_stream(&context), shape);
    let stream = training.device.stream().clone();
    let before = training.module.state_dict().unwrap();

    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .unwrap();
    let train = training.step();
    let evaluate = training.evaluate(shape);
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    assert_eq!(train, Err(Error::CaptureWithEventTracking));
    assert_eq!(evaluate, Err(Error::CaptureWithEventTracking));
    assert!(graph.is_ok(), "the capture is whole");

    assert_eq!(training.module.state_dict().unwrap(), before);
    assert_eq!(training.saved.mean(), Err(Error::SavedEmpty));
    training.step().unwrap();
    assert_eq!(training.module.num_batches_tracked().unwrap(), Some(8));
}

/// A rank without images launches nothing before it meets the others, and is refused all the same.
#[test]
fn capture_of_an_empty_rank_with_event_tracking_is_refused() {
    common::driver();
    let context = CudaContext::new(0).unwrap();
    let device = on_own_stream(&context);
    let module = BatchNorm2d::<Cuda>::new(&device, BatchNorm2dConfig::new(3)).unwrap();
    let alone = ThreadRank::group(1, Duration::from_secs(60)).pop().unwrap();
    let mut bn = SyncBatchNorm::new(module, alone).unwrap();
    let mut saved = bn.prepare::<f32>(Shape::nchw(0, 3, 4, 4)).unwrap();
    let x = device.zeros::<f32>(0).unwrap();
    let mut y = device.zeros::<f32>(0).unwrap();

    let stream = device.stream().clone();
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .unwrap();
    let train = bn.forward_train(&x, &mut y, &mut saved);
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    assert_eq!(train, Err(Error::CaptureWithEventTracking));
    assert!(graph.is_ok(), "the capture is whole");
    bn.forward_train(&x, &mut y, &mut saved).unwrap();
}

/// By the stand-in's count of the driver's calls.
#[test]
fn a_step_is_launches_and_nothing_else() {
    alone("a_step_is_launches_and_nothing_else", || {
        let context = context_without_events();
        for shape in shapes() {
            let mut training = Training::new(&on_own_stream(&context), shape);
            training.module.prepare_eval::<f16>(shape, Epilogue::AddRelu).unwrap();
            // The very first step and the very first evaluation: all that they need was prepared.
            let before = emulator::thread_calls();
            training.step().unwrap();
            training.evaluate(shape).unwrap();
            let after = emulator::thread_calls();
            assert!(after.launches > before.launches);
            let expected = emulator::Calls {
                launches: after.launches,
                ..before
            };
            assert_eq!(after, expected);
        }
    });
}

/// And so is a capture of it: the driver refuses what a graph cannot hold, and the stand-in counts that it was not asked.
#[test]
fn a_capture_is_launches_and_nothing_else() {
    alone("a_capture_is_launches_and_nothing_else", || {
        let context = context_without_events();
        for shape in shapes() {
            let mut training = Training::new(&on_own_stream(&context), shape);
            training.step().unwrap();
            let before = emulator::thread_calls();
            let graph = training.capture();
            let after = emulator::thread_calls();
            let expected = emulator::Calls {
                launches: after.launches,
                ..before
            };
            assert_eq!(after, expected);
            graph.launch().unwrap();
        }
    });
}
