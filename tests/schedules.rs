//! Results do not depend on the order in which threads run: random schedules of all kernels give the default schedule's
//! bits, and no schedule finds two accesses that may meet, a deadlock, or a load of what nobody wrote.
//!
//! `BATCHNORM_TEST_SCHEDULES` says how many schedules to run, `scripts/schedules` sets it. A failure names its seed.
//!
//! Always on the stand-in, which alone can choose.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use batchnorm_cuda::cuda::Walk;
use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Team};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Cuda, Element, Epilogue, Momentum, Shape};
use common::{Case, Form, Outcome, Random, assert_same_bits, run_as};

/// Schedules that the suite runs, unless the environment says otherwise.
const SCHEDULES: u64 = 1000;
const VARIABLE: &str = "BATCHNORM_TEST_SCHEDULES";

/// Planes, planes with edges, columns of planes and of pixels; the last three are just long enough for several splits.
fn shapes() -> [Shape; 7] {
    [
        Shape::nchw(2, 2, 4, 8),
        Shape::nchw(2, 2, 7, 9),
        Shape::nchw(3, 4, 3, 3),
        Shape::nchw(2, 12, 2, 3).channels_last(),
        Shape::nchw(33, 1, 16, 16),
        Shape::nchw(60, 1, 11, 13),
        Shape::nchw(33, 16, 4, 4).channels_last(),
    ]
}

fn device() -> Cuda {
    emulator::install();
    common::cuda_device(emulator::ordinal("small-75")).with_choice(Choice::GENERAL)
}

/// More strips than teams, so that stages and peers' results are used again: planes, groups of planes, pixels.
fn resident_shapes() -> [Shape; 3] {
    [
        Shape::nchw(4, 14, 4, 8),
        Shape::nchw(8, 32, 3, 3),
        Shape::nchw(3, 40, 2, 5).channels_last(),
    ]
}

/// A device with clusters, on which passes take the resident path: every team, with one stage and two, and both ways of
/// copying.
fn resident_devices() -> [Cuda; 6] {
    emulator::install();
    let device = common::cuda_device(emulator::ordinal("small-100"));
    [
        (Team::Block, 1, true),
        (Team::Block, 2, false),
        (Team::Cluster(2), 2, true),
        (Team::Cluster(4), 1, false),
        (Team::Grid, 2, true),
        (Team::Grid, 1, false),
    ]
    .map(|(team, stages, bulk)| {
        device.with_choice(Choice {
            stages: Some(stages),
            bulk: Some(bulk),
            ..Choice::resident(Some(team))
        })
    })
}

/// A step whose results under the default schedule are known.
struct Known<T: Element> {
    device: Cuda,
    case: Case<T>,
    outcome: Outcome<T>,
}

impl<T: Element> Known<T> {
    /// Training and evaluation, every epilogue in turn, on every shape.
    fn all() -> Vec<Self> {
        let mut known = Self::of(&device(), &shapes());
        for device in resident_devices() {
            // Evaluation has no resident path.
            let steps = Self::of(&device, &resident_shapes());
            known.extend(steps.into_iter().filter(|step| step.case.training));
        }
        known
    }

    fn of(device: &Cuda, shapes: &[Shape]) -> Vec<Self> {
        let mut random = Random::new(11);
        let mut known = Vec::new();
        for (number, &shape) in shapes.iter().enumerate() {
            let mut case = Case::<T>::random(&mut random, shape, Epilogue::ALL[number % 3]);
            if number % 2 == 1 {
                case.config = case.config.momentum(Momentum::CumulativeAverage);
            }
            for case in [case.clone(), case.evaluation()] {
                let outcome = run_as(device, &case, &Form::default()).unwrap();
                known.push(Self {
                    device: device.clone(),
                    case,
                    outcome,
                });
            }
        }
        known
    }

    fn check(&self, seed: u64) {
        emulator::set_schedule(Some(seed));
        let outcome = run_as(&self.device, &self.case, &Form::default());
        emulator::set_schedule(None);
        let what = |part: &str| {
            let Case { shape, training, .. } = &self.case;
            let path = self.device.choice();
            format!(
                "schedule {seed}, {shape}, {}, {path}, training: {training}: {part}",
                T::DTYPE
            )
        };
        let outcome = outcome.unwrap_or_else(|error| {
            panic!(
                "{}: {}",
                what(&error.to_string()),
                emulator::last_fault().unwrap_or_default()
            )
        });
        let expected = &self.outcome;
        assert_same_bits(&what("y"), &outcome.y, &expected.y);
        let elements = [("dx", &outcome.dx, &expected.dx), ("dz", &outcome.dz, &expected.dz)];
        for (name, got, expected) in elements {
            assert_same_bits(
                &what(name),
                got.as_deref().unwrap_or(&[]),
                expected.as_deref().unwrap_or(&[]),
            );
        }
        for (name, got, expected) in [
            ("dweight", &outcome.dweight, &expected.dweight),
            ("dbias", &outcome.dbias, &expected.dbias),
            ("save_mean", &outcome.save_mean, &expected.save_mean),
            ("save_invstd", &outcome.save_invstd, &expected.save_invstd),
            (
                "running_mean",
                &outcome.state.running_mean,
                &expected.state.running_mean,
            ),
            ("running_var", &outcome.state.running_var, &expected.state.running_var),
        ] {
            assert_same_bits(
                &what(name),
                got.as_deref().unwrap_or(&[]),
                expected.as_deref().unwrap_or(&[]),
            );
        }
        assert_eq!(
            outcome.state.num_batches_tracked,
            expected.state.num_batches_tracked,
            "{}",
            what("batches")
        );
    }
}

#[test]
fn results_do_not_depend_on_the_schedule() {
    let schedules = match std::env::var(VARIABLE) {
        Ok(number) => number
            .parse()
            .unwrap_or_else(|_| panic!("{VARIABLE} is {number:?}, no number")),
        Err(_) => SCHEDULES,
    };
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..std::thread::available_parallelism().map_or(1, |count| count.get()) {
            let next = &next;
            scope.spawn(move || {
                // In different orders: a kernel is compiled by one of them while all others that need it wait.
                let (single, half) = if thread % 2 == 0 {
                    let single = Known::<f32>::all();
                    (single, Known::<f16>::all())
                } else {
                    let half = Known::<f16>::all();
                    (Known::<f32>::all(), half)
                };
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= schedules {
                        break;
                    }
                    // Both types by turns, each over all of its steps.
                    let turn = (seed / 2) as usize;
                    if seed.is_multiple_of(2) {
                        single[turn % single.len()].check(seed);
                    } else {
                        half[turn % half.len()].check(seed);
                    }
                }
            });
        }
    });
    common::say(&format!("{schedules} random schedules gave the same bits"));
}

/// The shapes of this file reach every walk, with and without splits.
#[test]
fn every_walk_is_shuffled() {
    let device = device();
    let reached: BTreeSet<String> = shapes()
        .into_iter()
        .map(|shape| {
            let problem = Problem::new(Operation::Train, shape, f32::DTYPE);
            let first = Plan::chosen(&problem, device.limits(), device.choice())
                .unwrap()
                .kernels[0];
            format!("{:?}, {}", first.instantiation.walk, first.tiling.splits > 1)
        })
        .collect();
    for walk in [Walk::Planes, Walk::PlanesWithEdges, Walk::Columns] {
        for split in [false, true] {
            let wanted = format!("{walk:?}, {split}");
            assert!(reached.contains(&wanted), "{wanted} is not among {reached:?}");
        }
    }
}

/// So do those of the resident path, each with more strips than teams.
#[test]
fn every_team_is_shuffled() {
    for device in resident_devices() {
        for shape in resident_shapes() {
            for operation in [Operation::Train, Operation::Backward] {
                for dtype in [f32::DTYPE, f16::DTYPE] {
                    let problem = Problem::new(operation, shape, dtype);
                    let plan = Plan::chosen(&problem, device.limits(), device.choice()).unwrap();
                    assert!(plan.kernels[0].instantiation.resident.is_some(), "{plan}");
                }
            }
        }
        let laps = |shape| {
            let problem = Problem::new(Operation::Train, shape, f32::DTYPE);
            let launch = Plan::chosen(&problem, device.limits(), device.choice())
                .unwrap()
                .kernels[0];
            launch.tiling.tasks().div_ceil(u64::from(launch.grid))
        };
        assert!(
            resident_shapes().into_iter().any(|shape| laps(shape) > 1),
            "{}",
            device.choice()
        );
    }
}
