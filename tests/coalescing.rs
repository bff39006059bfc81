//! The kernels' accesses coalesce: on aligned shapes, the warps move hardly more 32-byte sectors than their bytes fill.
//!
//! Always on the stand-in, which alone can count. Shapes are those of ResNet-like networks, and the device is one, with
//! fewer of everything: a task of it has about as much of a tensor to go through as on a real device, so that the numbers
//! per channel, which one thread or another moves alone, weigh as little.

#![cfg(target_os = "linux")]

mod common;

use batchnorm_cuda::cuda::Walk;
use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Team};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Cuda, Element, Epilogue, Layout, Shape};
use common::{Case, Random, run};

/// Sectors moved over sectors that the bytes would fill, at most.
const LARGEST_RATIO: f64 = 1.05;
/// The same where strips of a row begin in the middle of a sector: a warp's 512 bytes then touch 17 sectors.
const LARGEST_RATIO_UNALIGNED: f64 = 1.1;
const SECTOR_BYTES: f64 = 32.0;
/// Sectors that a grid team's exchange may take more than its bytes would fill, in units of these: channel by channel and
/// block by block it touches 4 or 8 bytes of a sector here and there.
const EXCHANGE_RATIO: f64 = 3.0;

fn device() -> Cuda {
    emulator::install();
    common::cuda_device(emulator::ordinal("small-90"))
}

/// Runs a step and holds every launch against what its bytes need.
fn assert_coalesced<T: Element>(shape: Shape, walk: Walk, epilogue: Epilogue) {
    let kernels = launches_coalesce::<T>(&device().with_choice(Choice::GENERAL), shape, walk, epilogue);
    for kernel in ["statistics", "apply", "backward_reduce", "backward_apply"] {
        assert!(
            kernels.iter().any(|launched| launched == kernel),
            "{kernel} did not run"
        );
    }
}

/// The same of the resident kernels, whoever holds a strip and however it is copied.
fn assert_resident_coalesced<T: Element>(shape: Shape, walk: Walk, epilogue: Epilogue, teams: &[Team]) {
    for &team in teams {
        for bulk in [false, true] {
            let choice = Choice {
                bulk: Some(bulk),
                // Wide enough for whole sectors, and of the widest vectors.
                vector: Some(16 / size_of::<T>() as u32),
                ..Choice::resident(Some(team))
            };
            emulator::install();
            let cuda = common::cuda_device(emulator::ordinal("h200")).with_choice(choice);
            let kernels = launches_coalesce::<T>(&cuda, shape, walk, epilogue);
            for kernel in ["resident_forward", "resident_backward"] {
                assert!(
                    kernels.iter().any(|launched| launched == kernel),
                    "{kernel}, {choice} did not run"
                );
            }
        }
    }
}

/// Gives the kernels that ran.
fn launches_coalesce<T: Element>(cuda: &Cuda, shape: Shape, walk: Walk, epilogue: Epilogue) -> Vec<String> {
    let case = Case::<T>::random(&mut Random::new(1), shape, epilogue);
    let mut kernels = Vec::new();
    for (case, operations) in [
        (case.clone(), [Operation::Train, Operation::Backward]),
        (case.evaluation(), [Operation::Eval, Operation::BackwardEval]),
    ] {
        run(cuda, &case);
        let planned = operations.into_iter().flat_map(|operation| {
            let problem = Problem {
                residual_gradient: epilogue == Epilogue::AddRelu,
                ..Problem::new(operation, shape, T::DTYPE).epilogue(epilogue)
            };
            Plan::chosen(&problem, cuda.limits(), cuda.choice()).unwrap().kernels
        });
        let launches = emulator::launches(cuda.stream().cu_stream());
        assert_eq!(launches.len(), planned.clone().count());
        for (launch, planned) in launches.into_iter().zip(planned) {
            assert_eq!(launch.kernel, planned.instantiation.kernel.name());
            assert_eq!(planned.instantiation.walk, walk, "{shape}, {}", T::DTYPE);
            let sectors = launch.sectors_loaded + launch.sectors_stored;
            let bytes = launch.bytes_loaded + launch.bytes_stored;
            let ratio = sectors as f64 * SECTOR_BYTES / bytes as f64;
            // What a grid team exchanges is little beside a strip as large as those it is for, but not beside these.
            let exchange = if planned.is_cooperative() {
                bytes - planned.traffic.tensors
            } else {
                0
            };
            let ratio = ratio - EXCHANGE_RATIO * exchange as f64 / bytes as f64;
            let limit = if shape.layout == Layout::Nchw && walk == Walk::Columns {
                LARGEST_RATIO_UNALIGNED
            } else {
                LARGEST_RATIO
            };
            assert!(
                ratio <= limit,
                "{} on {shape}, {}, {epilogue:?}, {} moves {sectors} sectors for {bytes} bytes, {ratio:.3} times what \
                 they need",
                launch.kernel,
                T::DTYPE,
                cuda.choice()
            );
            kernels.push(launch.kernel);
        }
    }
    kernels
}

/// Planes that vectorise by themselves: 56x56, 28x28 (and 112x112).
#[test]
fn planes() {
    assert_coalesced::<f32>(Shape::nchw(4, 2, 56, 56), Walk::Planes, Epilogue::Identity);
    assert_coalesced::<f32>(Shape::nchw(16, 3, 28, 28), Walk::Planes, Epilogue::AddRelu);
    assert_coalesced::<f16>(Shape::nchw(4, 2, 56, 56), Walk::Planes, Epilogue::Relu);
    assert_coalesced::<f16>(Shape::nchw(2, 2, 112, 112), Walk::Planes, Epilogue::Identity);
}

/// Channels next to each other, and planes too short for vectors of their own: 7x7.
#[test]
fn columns() {
    assert_coalesced::<f32>(
        Shape::nchw(8, 64, 28, 28).channels_last(),
        Walk::Columns,
        Epilogue::Identity,
    );
    assert_coalesced::<f32>(Shape::nchw(128, 32, 7, 7), Walk::Columns, Epilogue::Relu);
    assert_coalesced::<f16>(
        Shape::nchw(32, 64, 14, 14).channels_last(),
        Walk::Columns,
        Epilogue::AddRelu,
    );
    assert_coalesced::<f16>(Shape::nchw(256, 32, 7, 7), Walk::Columns, Epilogue::Identity);
}

/// Strips as large as the teams are for: with less to do, what a block moves per channel would weigh more.
const FEW: [Team; 2] = [Team::Block, Team::Cluster(4)];
const MANY: [Team; 2] = [Team::Cluster(16), Team::Grid];

#[test]
fn resident_planes() {
    assert_resident_coalesced::<f32>(Shape::nchw(16, 3, 28, 28), Walk::Planes, Epilogue::AddRelu, &FEW);
    assert_resident_coalesced::<f16>(Shape::nchw(4, 2, 56, 56), Walk::Planes, Epilogue::Relu, &FEW);
    assert_resident_coalesced::<f32>(Shape::nchw(64, 2, 56, 56), Walk::Planes, Epilogue::Identity, &MANY);
}

#[test]
fn resident_columns() {
    assert_resident_coalesced::<f32>(Shape::nchw(128, 32, 7, 7), Walk::Columns, Epilogue::Relu, &FEW);
    assert_resident_coalesced::<f16>(Shape::nchw(128, 32, 7, 7), Walk::Columns, Epilogue::Identity, &FEW);
    let pixels = Shape::nchw(32, 64, 28, 28).channels_last();
    assert_resident_coalesced::<f16>(pixels, Walk::Columns, Epilogue::AddRelu, &MANY);
}
