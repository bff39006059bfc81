//! Resident kernels: every team, block size and way of copying computes what PyTorch does, moves each tensor once, and
//! comes by the same result whoever holds the strip.
//!
//! Always on the stand-in, which alone has devices of every kind and can count.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Resident, Team};
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{Cuda, Element, Epilogue, Momentum, Shape};
use common::{Case, Form, Outcome, Random, assert_near_reference, run, run_as};

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
            for (stages, bulk) in copies() {
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
    for team in teams() {
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
    every_way::<f32>("small-90");
}

#[test]
fn every_team_and_way_of_copying_in_f16() {
    every_way::<f16>("h200");
}
