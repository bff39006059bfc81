//! Many threads on one device: what they compute is what one thread alone would have computed, bit for bit.

mod common;

use std::sync::Barrier;
use std::thread;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Element, Epilogue, Gradients, Saved, Shape};
use common::{Case, Device, Outcome, Random, assert_same, assert_same_bits, on_every_device, run};

on_every_device!(
    modules_on_threads_and_streams,
    one_module_evaluates_on_many_threads,
    one_module_is_trained_by_one_thread_after_another,
);

/// Threads, each with a stream of its own: fewer where a stand-in runs all of their kernels on the host.
fn threads<B: Device>() -> usize {
    B::size(8, 4)
}

/// What a module, its gradients and its saved statistics must be for all this to compile.
fn is_shared_between_threads<T: Send + Sync>() {}

fn cases<T: Element>(count: usize) -> Vec<Case<T>> {
    let shapes = [
        Shape::nchw(3, 17, 5, 11),
        Shape::nchw(2, 24, 9, 7).channels_last(),
        Shape::nchw(1, 2, 33, 65),
        Shape::nchw(6, 5, 3, 3).channels_last(),
    ];
    let mut random = Random::new(1);
    (0..count)
        .map(|i| {
            let case = Case::random(&mut random, shapes[i % 4], Epilogue::ALL[i % 3]);
            if i % 5 == 4 { case.evaluation() } else { case }
        })
        .collect()
}

/// Each thread with its own modules and its own stream; all start at once, and the kernels they need are the same.
fn modules_on_threads_and_streams<B: Device>(device: &B) {
    is_shared_between_threads::<(B, BatchNorm2d<B>, Saved<B, f16>, Gradients<B, f32>)>();
    fn of<B: Device, T: Element>(device: &B) {
        let threads = threads::<B>();
        let cases = cases::<T>(2 * threads);
        let alone: Vec<Outcome<T>> = cases.iter().map(|case| run(device, case)).collect();
        let start = Barrier::new(threads);
        thread::scope(|scope| {
            for number in 0..threads {
                let (cases, alone, start) = (&cases, &alone, &start);
                scope.spawn(move || {
                    let device = device.with_own_stream();
                    start.wait();
                    for round in 0..3 {
                        for i in 0..cases.len() {
                            // Every thread in its own order.
                            let i = (i * 3 + number + round) % cases.len();
                            assert_same(&run(&device, &cases[i]), &alone[i]);
                        }
                    }
                });
            }
        });
    }
    of::<B, f32>(device);
    of::<B, bf16>(device);
}

/// Clusters and grid teams of several threads side by side.
#[cfg(target_os = "linux")]
mod on_cuda_resident {
    use batchnorm_cuda::Cuda;
    use batchnorm_cuda::cuda::plan::{Choice, Team};

    /// On the stand-in a device with few blocks, each of whose threads costs the host something.
    fn device() -> Cuda {
        match super::common::driver() {
            super::common::Driver::Real => super::common::cuda(),
            super::common::Driver::StandIn => super::common::cuda_device(emulator::ordinal("small-100")),
        }
    }

    #[test]
    fn clusters_on_threads_and_streams() {
        let choice = Choice::resident(Some(Team::Cluster(4)));
        super::modules_on_threads_and_streams(&device().with_choice(choice));
    }

    #[test]
    fn grids_on_threads_and_streams() {
        let choice = Choice::resident(Some(Team::Grid));
        super::modules_on_threads_and_streams(&device().with_choice(choice));
    }
}

/// Through a shared reference; each thread has its own tensors.
fn one_module_evaluates_on_many_threads<B: Device>(device: &B) {
    let shape = Shape::nchw(2, 12, 7, 9);
    let mut module = BatchNorm2d::<B>::new(device, BatchNorm2dConfig::new(12)).unwrap();
    let cases: Vec<Case<f16>> = (0..threads::<B>() as u64)
        .map(|seed| {
            Case::random(&mut Random::new(seed), shape, Epilogue::Identity)
                .evaluation()
                .forward_only()
        })
        .collect();
    let state = cases[0].state.clone();
    module.load_state_dict(&state).unwrap();
    let alone = cases.iter().map(|case| {
        let mut case = case.clone();
        case.state = state.clone();
        run(device, &case).y
    });
    let alone: Vec<Vec<f16>> = alone.collect();

    let (module, start) = (&module, &Barrier::new(threads::<B>()));
    thread::scope(|threads| {
        for (case, alone) in cases.iter().zip(&alone) {
            threads.spawn(move || {
                let x = device.upload(&case.x).unwrap();
                start.wait();
                for _ in 0..5 {
                    let y = module.forward_eval_alloc(shape, &x).unwrap();
                    assert_same_bits("y", &B::download(device, &y).unwrap(), alone);
                }
            });
        }
    });
    assert_eq!(module.state_dict().unwrap(), state);
}

/// A module is sent from thread to thread, and trains on as if it had stayed.
fn one_module_is_trained_by_one_thread_after_another<B: Device>(device: &B) {
    let shape = Shape::nchw(2, 12, 7, 9).channels_last();
    let case = Case::<f32>::random(&mut Random::new(9), shape, Epilogue::Relu);
    let train = |mut module: BatchNorm2d<B>, mut saved: Saved<B, f32>| {
        let x = device.upload(&case.x).unwrap();
        let mut y = device.zeros::<f32>(case.x.len()).unwrap();
        let forward = batchnorm_cuda::Forward::new(&x, &mut y).relu();
        module.forward_train_with(forward, &mut saved).unwrap();
        (module, saved)
    };
    let new = || {
        let mut module = BatchNorm2d::<B>::new(device, case.config.clone()).unwrap();
        module.load_state_dict(&case.state).unwrap();
        let saved = module.prepare_fused::<f32>(shape, Epilogue::Relu).unwrap();
        (module, saved)
    };
    let (mut here, mut there) = (new(), new());
    for _ in 0..threads::<B>() {
        here = train(here.0, here.1);
        there = thread::scope(|threads| threads.spawn(|| train(there.0, there.1)).join().unwrap());
    }
    assert_eq!(here.0.state_dict().unwrap(), there.0.state_dict().unwrap());
    assert_eq!(here.1.invstd().unwrap(), there.1.invstd().unwrap());
    assert_eq!(here.0.num_batches_tracked().unwrap(), Some(7 + threads::<B>() as i64));
}
