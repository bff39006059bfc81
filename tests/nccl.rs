//! NCCL between ranks: on a machine with a GPU one rank over the real library, else three threads over a stand-in.

#![cfg(target_os = "linux")]

mod common;

use batchnorm_cuda::cuda::{self, Unavailable};
use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaStream};
use batchnorm_cuda::cudarc::nccl::safe::{Comm, Id};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{
    AsTensor, AsTensorMut, Backend, BatchNorm2d, BatchNorm2dConfig, Collective, Cuda, Epilogue, Error, Momentum, Shape,
    SyncBatchNorm,
};
use common::{Case, Driver, Random, on_own_stream, on_stream, reference};
use std::sync::Arc;

/// How many ranks this machine can have: one for each GPU, and on the stand-in three in any case.
fn ranks() -> usize {
    match common::driver() {
        Driver::Real => {
            cuda::is_nccl_available().expect("the test needs NCCL");
            1
        }
        Driver::StandIn => {
            emulator::install_nccl();
            3
        }
    }
}

/// Runs `work(rank, stream, communicator)` in a thread for every rank.
fn on_ranks<R: Send>(work: impl Fn(usize, Arc<CudaStream>, Comm) -> R + Sync) -> Vec<R> {
    let ranks = ranks();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: in these tests every buffer is used on one stream only.
    unsafe { context.disable_event_tracking() };
    let id = Id::new().unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let (context, work) = (&context, &work);
                scope.spawn(move || {
                    context.bind_to_thread().unwrap();
                    let stream = context.new_stream().unwrap();
                    let comm = Comm::from_rank(stream.clone(), rank, ranks, id).unwrap();
                    work(rank, stream, comm)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn messages_arrive_in_the_order_of_the_ranks() {
    let gathered = on_ranks(|rank, stream, comm| {
        let cuda = on_stream(stream);
        assert_eq!(
            (Collective::<Cuda>::rank(&comm), Collective::<Cuda>::world_size(&comm)),
            (rank, ranks())
        );
        let own = cuda.upload(&[rank as i64, i64::MIN + rank as i64]).unwrap();
        let mut all = cuda.zeros::<i64>(2 * ranks()).unwrap();
        Collective::all_gather(&comm, &cuda, own.view(), all.view_mut()).unwrap();
        cuda.read(&all).unwrap()
    });
    let expected: Vec<i64> = (0..ranks() as i64).flat_map(|rank| [rank, i64::MIN + rank]).collect();
    for gathered in gathered {
        assert_eq!(gathered, expected);
    }
}

/// Against float64, over the whole batch: y, dx and the running statistics.
#[test]
fn ranks_normalise_by_the_whole_batch() {
    let images = 2;
    let shape = Shape::nchw(images * ranks(), 5, 7, 6);
    let case = Case::<f32>::random(&mut Random::new(1), shape, Epilogue::Identity);
    let (want, scales) = reference(&case);
    let image = case.x.len() / shape.batch;
    let outcomes = on_ranks(|rank, stream, comm| {
        let cuda = on_stream(stream);
        let mut module = BatchNorm2d::<Cuda>::new(&cuda, case.config.clone()).unwrap();
        module.load_state_dict(&case.state).unwrap();
        let mut bn = SyncBatchNorm::new(module, comm).unwrap();
        let mut saved = bn.prepare::<f32>(Shape { batch: images, ..shape }).unwrap();
        let part = rank * images * image..(rank + 1) * images * image;
        let x = cuda.upload(&case.x[part.clone()]).unwrap();
        let dy = cuda.upload(&case.dy.as_ref().unwrap()[part]).unwrap();
        let mut y = cuda.zeros::<f32>(images * image).unwrap();
        let mut dx = cuda.zeros::<f32>(images * image).unwrap();
        let mut gradients = bn.module().gradients().unwrap();
        bn.forward_train(&x, &mut y, &mut saved).unwrap();
        bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients).unwrap();
        assert_eq!(
            saved.values_per_channel(),
            Ok(shape.values_per_channel().unwrap() as u64)
        );
        let state = bn.module().state_dict().unwrap();
        (cuda.read(&y).unwrap(), cuda.read(&dx).unwrap(), state)
    });
    let near = |what: &str, got: &[f32], want: &[f64], scale: &dyn Fn(usize) -> f64| {
        for (at, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs() / scale(at);
            assert!(
                error <= common::limit(batchnorm_cuda::Dtype::F32),
                "{what} {at}: {got}, not {want}"
            );
        }
    };
    let channel = |at: usize| at / (shape.height * shape.width) % shape.channels;
    let y: Vec<f32> = outcomes.iter().flat_map(|(y, ..)| y).copied().collect();
    let dx: Vec<f32> = outcomes.iter().flat_map(|(_, dx, _)| dx).copied().collect();
    near("y", &y, want.y.as_ref().unwrap(), &|at| scales.y[channel(at)]);
    near("dx", &dx, want.dx.as_ref().unwrap(), &|at| scales.dx[channel(at)]);
    for (.., state) in &outcomes {
        assert_eq!(state, &outcomes[0].2);
        let running_var = state.running_var.as_ref().unwrap();
        near("running_var", running_var, want.running_var.as_ref().unwrap(), &|at| {
            scales.running_var[at]
        });
    }
}

/// Work on another stream would not be ordered with the kernels.
#[test]
fn a_communicator_on_another_stream_is_refused() {
    on_ranks(|_, stream, comm| {
        let elsewhere = on_own_stream(stream.context());
        let module = BatchNorm2d::<Cuda>::new(&elsewhere, BatchNorm2dConfig::new(2)).unwrap();
        let error = SyncBatchNorm::new(module, &comm).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Argument {
                    argument: "collective",
                    ..
                }
            ),
            "{error}"
        );
    });
}

/// The gathering is part of the graph: forward and backward are captured and replayed, and go on counting.
#[test]
fn a_step_over_nccl_is_captured_and_replayed() {
    // A graph of the stand-in cannot wait for other threads, so each rank is alone here.
    ranks();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: in this test every buffer is used on one stream only.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let cuda = on_stream(stream.clone());
    let comm = Comm::from_rank(stream.clone(), 0, 1, Id::new().unwrap()).unwrap();
    let shape = Shape::nchw(3, 6, 5, 4);
    let case = Case::<f16>::random(&mut Random::new(2), shape, Epilogue::Identity);
    let config = BatchNorm2dConfig::new(6).momentum(Momentum::CumulativeAverage);
    let mut bn = SyncBatchNorm::new(BatchNorm2d::<Cuda>::new(&cuda, config).unwrap(), comm).unwrap();
    let mut saved = bn.prepare::<f16>(shape).unwrap();
    let mut gradients = bn.module().gradients().unwrap();
    let (x, dy) = (
        cuda.upload(&case.x).unwrap(),
        cuda.upload(case.dy.as_ref().unwrap()).unwrap(),
    );
    let mut y = cuda.zeros::<f16>(case.x.len()).unwrap();
    let mut dx = cuda.zeros::<f16>(case.x.len()).unwrap();
    let mut step = |bn: &mut SyncBatchNorm<Cuda, Comm>| {
        bn.forward_train(&x, &mut y, &mut saved)?;
        bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)
    };
    step(&mut bn).unwrap();
    let mean = cuda.read(bn.module().running_mean().unwrap()).unwrap();

    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .unwrap();
    let captured = step(&mut bn);
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    captured.unwrap();
    let graph = graph.unwrap().expect("a graph");
    for counted in [2, 3, 4] {
        graph.launch().unwrap();
        assert_eq!(bn.module().num_batches_tracked().unwrap(), Some(counted));
    }
    // The average of one batch, over and over.
    let after = cuda.read(bn.module().running_mean().unwrap()).unwrap();
    for (after, mean) in after.iter().zip(&mean) {
        assert!((after - mean).abs() <= 1e-6 * mean.abs(), "{after}, not {mean}");
    }
}

/// What is missing comes with how to get it.
#[test]
fn missing_nccl_is_told_with_a_remedy() {
    let tried = "libnccl.so".to_owned();
    let text = Unavailable::NoNccl { tried }.to_string();
    assert!(
        text.contains("libnccl.so could not be loaded") && text.contains("pip install"),
        "{text}"
    );
}
