//! Resident kernels: every team, block size and way of copying computes what PyTorch does, moves each tensor once, and
//! comes by the same result whoever holds the strip.
//!
//! Always on the stand-in, which alone has devices of every kind and can count.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;

use batchnorm_cuda::cuda::plan::{Choice, Operation, Problem, Team};
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Element, Epilogue, Momentum, Shape};
use common::{Case, Form, Random, assert_near_reference, assert_same, run, run_as};

fn device(profile: &str) -> Cuda {
    emulator::install();
    common::cuda_device(emulator::ordinal(profile))
}

/// Planes, planes with edges, groups of planes, strips of pixels, each so large that a tiny device needs a team for it.
fn shapes() -> [Shape; 6] {
    [
        Shape::nchw(3, 5, 8, 8),
        Shape::nchw(5, 3, 7, 9),
        Shape::nchw(6, 20, 3, 3),
        Shape::nchw(4, 7, 5, 5),
        Shape::nchw(2, 44, 5, 3).channels_last(),
        Shape::nchw(7, 3, 4, 5).channels_last(),
    ]
}

fn teams() -> [Team; 6] {
    [
        Team::Block,
        Team::Cluster(2),
        Team::Cluster(4),
        Team::Cluster(8),
        Team::Cluster(16),
        Team::Grid,
    ]
}

fn copies() -> [(u32, bool); 4] {
    [(1, false), (2, false), (1, true), (2, true)]
}

/// The resident kernels' names of the launches since the last call.
fn resident_launches(cuda: &Cuda) -> Vec<String> {
    let launches = emulator::launches(cuda.stream().cu_stream());
    launches
        .into_iter()
        .map(|launch| launch.kernel)
        .filter(|kernel| kernel.starts_with("resident"))
        .collect()
}

fn every_way<T: Element>(profile: &str) {
    let mut random = Random::new(5);
    let mut ran = BTreeSet::new();
    for (number, shape) in shapes().into_iter().enumerate() {
        for (turn, team) in teams().into_iter().enumerate() {
            for (way, (stages, bulk)) in copies().into_iter().enumerate() {
                // The first shape in every way; the others in two of four, with both numbers of stages and both ways of copying
                // among them.
                if number > 0 && (number + turn + (way ^ (way >> 1))) % 2 == 0 {
                    continue;
                }
                let cuda = device(profile).with_choice(Choice {
                    stages: Some(stages),
                    bulk: Some(bulk),
                    ..Choice::resident(Some(team))
                });
                let epilogue = Epilogue::ALL[(number + turn) % 3];
                let mut case = Case::<T>::random(&mut random, shape, epilogue);
                if turn % 2 == 0 {
                    case.config = case.config.momentum(Momentum::CumulativeAverage);
                }
                let outcome = run(&cuda, &case);
                let what = format!("{profile}, {}", cuda.choice());
                assert_near_reference(&what, &case, &outcome);
                if resident_launches(&cuda).len() == 2 {
                    ran.insert((team, stages, bulk));
                }
            }
        }
    }
    // The small device has no room for 16 blocks at a time.
    let most = if profile == "h200" { 16 } else { 8 };
    for team in teams().into_iter().filter(|team| team.cluster() <= most) {
        for (stages, bulk) in copies() {
            assert!(
                ran.contains(&(team, stages, bulk)),
                "{team}, {stages}, {bulk} did not run on {profile}"
            );
        }
    }
}

#[test]
fn every_team_and_way_of_copying_in_f32() {
    every_way::<f32>("small-100");
}

#[test]
fn every_team_and_way_of_copying_in_f16() {
    every_way::<f16>("h200");
}

/// Teams differ in the order of their sums, and in nothing else: each gives the same bits on every run.
#[test]
fn results_repeat_bit_for_bit() {
    for shape in shapes() {
        let case = Case::<bf16>::random(&mut Random::new(9), shape, Epilogue::AddRelu);
        for team in teams() {
            let cuda = device("small-100").with_choice(Choice::resident(Some(team)));
            let runs = [(); 2].map(|()| run(&cuda, &case));
            assert_same(&runs[0], &runs[1]);
        }
    }
}

/// Tensors that begin anywhere, y over x and dx over dy, gradients that are added to.
#[test]
fn forms_of_a_step() {
    let mut random = Random::new(2);
    for shape in shapes() {
        for team in [Team::Block, Team::Cluster(2), Team::Grid] {
            let cuda = device("small-100").with_choice(Choice::resident(Some(team)));
            let case = Case::<f32>::random(&mut random, shape, Epilogue::Relu);
            let plain = run(&cuda, &case);
            // Where all tensors are aligned alike, sums have the same order.
            let in_place = Form {
                backward_in_place: true,
                ..Form::default()
            };
            assert_same(&run_as(&cuda, &case, &in_place).unwrap(), &plain);
            for offsets in [[1; 6], [1, 2, 3, 0, 5, 6]] {
                let form = Form {
                    offsets,
                    ..Form::default()
                };
                let what = format!("{}, {offsets:?}", cuda.choice());
                assert_near_reference(&what, &case, &run_as(&cuda, &case, &form).unwrap());
            }
        }
    }
}

/// One team after another with the scratch of one workspace: whoever is last leaves it as it was found.
#[test]
fn passes_of_one_workspace_follow_each_other() {
    for (stages, bulk) in copies() {
        let cuda = device("small-100").with_choice(Choice {
            stages: Some(stages),
            bulk: Some(bulk),
            ..Choice::resident(Some(Team::Grid))
        });
        let shape = Shape::nchw(4, 14, 4, 8);
        let case = Case::<f32>::random(&mut Random::new(3), shape, Epilogue::Identity);
        let mut bn: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(14).momentum(None)).unwrap();
        let mut saved = bn.prepare::<f32>(shape).unwrap();
        let x = cuda.upload(&case.x).unwrap();
        let first = {
            let y = bn.forward_train_alloc(&x, &mut saved).unwrap();
            cuda.to_vec(y.as_view()).unwrap()
        };
        for batches in 2..5 {
            let y = bn.forward_train_alloc(&x, &mut saved).unwrap();
            assert_eq!(cuda.to_vec(y.as_view()).unwrap(), first);
            assert_eq!(bn.num_batches_tracked().unwrap(), Some(batches));
        }
    }
}

/// Plans go by a device's limits, but the driver may have room for fewer blocks: then there are fewer teams, and where it
/// has no room for one, the general path is taken.
#[test]
fn a_device_with_less_room_than_its_limits_runs_what_fits() {
    let shape = Shape::nchw(4, 14, 4, 8);
    let case = Case::<f32>::random(&mut Random::new(4), shape, Epilogue::AddRelu);
    // 12 blocks of 256 threads fit the one device, 3 the other.
    for (team, profile, expected) in [
        (Team::Cluster(8), "small-100", &[8, 8][..]),
        (Team::Cluster(8), "small-crowded", &[]),
        (Team::Cluster(2), "small-100", &[10, 10]),
        (Team::Cluster(2), "small-crowded", &[2, 2]),
        (Team::Block, "small-100", &[7, 7]),
        (Team::Block, "small-crowded", &[3, 3]),
    ] {
        let cuda = device(profile).with_choice(Choice {
            threads: Some(256),
            stages: Some(1),
            bulk: Some(false),
            vector: Some(4),
            ..Choice::resident(Some(team))
        });
        let outcome = run(&cuda, &case);
        assert_near_reference(profile, &case, &outcome);
        let grids: Vec<u32> = emulator::launches(cuda.stream().cu_stream())
            .into_iter()
            .filter(|launch| launch.kernel.starts_with("resident"))
            .map(|launch| launch.grid.iter().product())
            .collect();
        assert_eq!(grids, expected, "{team} on {profile}");
        let problem = Problem::new(Operation::Train, shape, f32::DTYPE).epilogue(Epilogue::AddRelu);
        let planned = cuda.plan(&problem).unwrap().kernels[0].grid;
        assert!(grids.first().is_none_or(|&grid| grid == planned), "{team} on {profile}");
    }
    let grid = |profile| {
        let cuda = device(profile).with_choice(Choice::resident(Some(Team::Grid)));
        assert_near_reference(profile, &case, &run(&cuda, &case));
        resident_launches(&cuda).len()
    };
    assert_eq!((grid("small-100"), grid("small-crowded")), (2, 2));
}
