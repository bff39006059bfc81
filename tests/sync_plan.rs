//! Plans of the parts of a synchronised pass: the kernels of the general path, one by one, and between them what joins the
//! ranks' results.

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Stage, Tracking};
use batchnorm_cuda::cuda::{DeviceLimits, Instantiation, Kernel};
use batchnorm_cuda::{Dtype, Epilogue, Shape};

const FORWARD: [Stage; 4] = [Stage::Rank, Stage::Merge { ranks: 8 }, Stage::Apply, Stage::Update];
const BACKWARD: [Stage; 3] = [Stage::Rank, Stage::Merge { ranks: 8 }, Stage::Apply];

fn plan(operation: Operation, stage: Stage, shape: Shape, device: &str) -> Plan {
    let problem = Problem {
        stage,
        ..Problem::new(operation, shape, Dtype::F16).epilogue(Epilogue::AddRelu)
    };
    Plan::new(&problem, &DeviceLimits::named(device).unwrap()).unwrap()
}

fn kernels(operation: Operation, stage: Stage, shape: Shape) -> Vec<Kernel> {
    let kernels = plan(operation, stage, shape, "h200").kernels;
    kernels.iter().map(|launch| launch.instantiation.kernel).collect()
}

#[test]
fn each_part_is_one_kernel() {
    let shape = Shape::nchw(32, 64, 56, 56);
    assert_eq!(
        FORWARD.map(|stage| kernels(Operation::Train, stage, shape)),
        [
            Kernel::Statistics,
            Kernel::MergeStatistics,
            Kernel::Apply,
            Kernel::UpdateRunning
        ]
        .map(|kernel| vec![kernel])
    );
    assert_eq!(
        BACKWARD.map(|stage| kernels(Operation::Backward, stage, shape)),
        [Kernel::BackwardReduce, Kernel::MergeSums, Kernel::BackwardApply].map(|kernel| vec![kernel])
    );
}

/// A rank without images meets the others all the same.
#[test]
fn an_empty_batch_has_the_parts_that_pass_over_channels() {
    let empty = Shape::nchw(0, 64, 56, 56);
    assert_eq!(
        FORWARD.map(|stage| kernels(Operation::Train, stage, empty)),
        [
            vec![],
            vec![Kernel::MergeStatistics],
            vec![],
            vec![Kernel::UpdateRunning]
        ]
    );
    assert_eq!(
        BACKWARD.map(|stage| kernels(Operation::Backward, stage, empty)),
        [vec![], vec![Kernel::MergeSums], vec![]]
    );
}

/// Others may have more.
#[test]
fn one_value_per_channel_can_be_a_ranks_part() {
    let one = Shape::nchw(1, 64, 1, 1);
    assert_eq!(kernels(Operation::Train, Stage::Rank, one), [Kernel::Statistics]);
    assert!(
        Plan::new(
            &Problem::new(Operation::Train, one, Dtype::F32),
            &DeviceLimits::named("h200").unwrap()
        )
        .is_err()
    );
}

/// Tensors cross memory as on the general path, in the parts together.
#[test]
fn parts_move_the_tensors_of_the_general_path() {
    for shape in [
        Shape::nchw(32, 64, 56, 56),
        Shape::nchw(32, 2048, 7, 7),
        Shape::nchw(32, 256, 14, 14).channels_last(),
    ] {
        for device in DeviceLimits::NAMES {
            for (operation, stages) in [(Operation::Train, &FORWARD[..]), (Operation::Backward, &BACKWARD[..])] {
                let parts: u64 = stages
                    .iter()
                    .map(|&stage| plan(operation, stage, shape, device).traffic().tensors)
                    .sum();
                let whole = Problem::new(operation, shape, Dtype::F16).epilogue(Epilogue::AddRelu);
                let limits = DeviceLimits::named(device).unwrap();
                let whole = Plan::chosen(&whole, &limits, &Choice::GENERAL).unwrap();
                assert_eq!(parts, whole.traffic().tensors, "{operation} {shape} on {device}");
            }
        }
    }
}

/// The bytes of a merge grow with channels and ranks alone.
#[test]
fn merges_read_every_ranks_message() {
    let bytes = |ranks, batch, channels| {
        let stage = Stage::Merge { ranks };
        let traffic = plan(Operation::Train, stage, Shape::nchw(batch, channels, 8, 8), "h200").traffic();
        assert_eq!(traffic.tensors, 0);
        traffic.read
    };
    // A tag, a count and three numbers.
    assert_eq!(bytes(2, 4, 64), 2 * 64 * (16 + 3 * 4));
    assert_eq!(bytes(8, 4, 64), 4 * bytes(2, 4, 64));
    assert_eq!(bytes(2, 400, 64), bytes(2, 4, 64));
}

#[test]
fn launches_are_legal_and_compiled_ahead() {
    let known = Instantiation::all();
    for device in DeviceLimits::NAMES {
        let limits = DeviceLimits::named(device).unwrap();
        for channels in [1, 255, 256, 257, 5_000_000] {
            for dtype in Dtype::ALL {
                for stage in [Stage::Merge { ranks: 1000 }, Stage::Update] {
                    for operation in [Operation::Train, Operation::Backward] {
                        let problem = Problem {
                            stage,
                            tracking: Tracking::CumulativeAverage,
                            ..Problem::new(operation, Shape::nchw(0, channels, 1, 1), dtype)
                        };
                        for launch in Plan::new(&problem, &limits).unwrap().kernels {
                            assert!((1..=limits.grid).contains(&launch.grid), "{launch:?}");
                            assert!(u64::from(launch.grid) * u64::from(launch.block()) >= channels as u64);
                            assert!(known.contains(&launch.instantiation), "{launch:?}: not compiled ahead");
                            assert_eq!(launch.instantiation.dtype, dtype.param());
                        }
                    }
                }
            }
        }
    }
}

/// What runs on one device alone has no parts.
#[test]
fn evaluation_is_whole() {
    let shape = Shape::nchw(2, 64, 4, 4);
    for operation in [Operation::Eval, Operation::BackwardEval] {
        let problem = Problem {
            stage: Stage::Update,
            ..Problem::new(operation, shape, Dtype::F32)
        };
        assert_eq!(problem.canonical().stage, Stage::Whole);
    }
}
