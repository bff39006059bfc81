//! What passes ask of the device, counted by the stand-in driver: the launches and the bytes are the plan's, to the byte,
//! and nothing is allocated, copied or waited for on the way.
//!
//! Always on the stand-in, which alone can count.

#![cfg(target_os = "linux")]

use std::sync::Arc;

use batchnorm_cuda::cuda::plan::{Alignment, Choice, Operation, Plan, Problem, Team, Tracking};
use batchnorm_cuda::cuda::{DiskCache, Walk};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{
    Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Element, Epilogue, Forward, Momentum, Result, Shape,
};

/// A device of the stand-in with this profile, a stream of its own, and the general path.
fn device(profile: &str) -> Cuda {
    on_stream(context(profile).new_stream().unwrap()).with_choice(Choice::GENERAL)
}

fn context(profile: &str) -> Arc<CudaContext> {
    emulator::install();
    CudaContext::new(emulator::ordinal(profile)).unwrap()
}

fn on_stream(stream: Arc<CudaStream>) -> Cuda {
    let name = format!("stand-in-kernels-{}", emulator::FINGERPRINT);
    let cache = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    Cuda::with_cache(stream, DiskCache::Folder(cache)).unwrap()
}

/// The tensors of one step, each behind `offset` unused elements.
struct Tensors<T: Element> {
    offset: usize,
    len: usize,
    x: CudaSlice<T>,
    y: CudaSlice<T>,
    z: CudaSlice<T>,
    dx: CudaSlice<T>,
    dz: CudaSlice<T>,
}

impl<T: Element> Tensors<T> {
    fn new(cuda: &Cuda, shape: Shape, offset: usize) -> Result<Self> {
        let len = shape.len()?;
        let values: Vec<T> = (0..len + offset)
            .map(|i| T::from_param(batchnorm_cuda::Real::from_f64((i * 37 % 101) as f64 / 16.0 - 3.0)))
            .collect();
        Ok(Self {
            offset,
            len,
            x: cuda.upload(&values)?,
            y: cuda.zeros(len + offset)?,
            z: cuda.upload(&values)?,
            dx: cuda.zeros(len + offset)?,
            dz: cuda.zeros(len + offset)?,
        })
    }
}

/// Holds what the stand-in counted against the plan.
fn assert_as_planned(cuda: &Cuda, problem: &Problem) {
    let plan = Plan::chosen(problem, cuda.limits(), cuda.choice()).unwrap();
    let counted = emulator::launches(cuda.stream().cu_stream());
    assert_eq!(counted.len(), plan.kernels.len(), "{plan}");
    for (launch, planned) in counted.iter().zip(&plan.kernels) {
        assert_eq!(launch.kernel, planned.instantiation.kernel.name(), "{plan}");
        // A resident kernel has its teams in y, and the blocks of a team in x.
        let teams = match planned.instantiation.resident {
            Some(_) => planned.grid / planned.tiling.splits as u32,
            None => 1,
        };
        assert_eq!(launch.grid, [planned.grid / teams, teams, 1], "{plan}");
        assert_eq!(launch.block, [planned.block(), 1, 1], "{plan}");
        assert_eq!(launch.shared_bytes, planned.shared_bytes, "{plan}");
        assert_eq!(launch.cooperative, planned.is_cooperative(), "{plan}");
        assert_eq!(
            (launch.bytes_loaded, launch.bytes_stored),
            (planned.traffic.read, planned.traffic.written),
            "{} of {problem:?}: loaded and stored, against the plan's\n{plan}",
            launch.kernel
        );
    }
}

fn fused<'a, T: Element>(
    forward: Forward<'a, Cuda, T>,
    z: &'a CudaView<'_, T>,
    epilogue: Epilogue,
) -> Forward<'a, Cuda, T> {
    match epilogue {
        Epilogue::Identity => forward,
        Epilogue::Relu => forward.relu(),
        Epilogue::AddRelu => forward.add_relu(z),
    }
}

/// Runs every kind of pass and counts each. `offset` moves all tensors that many elements.
fn count_all_passes<T: Element>(cuda: Cuda, shape: Shape, epilogue: Epilogue, offset: usize) -> Result<()> {
    let mut tensors = Tensors::<T>::new(&cuda, shape, offset)?;
    let alignment = Alignment::of([(offset * size_of::<T>()) as u64]);
    let problem = |operation| Problem {
        alignment,
        ..Problem::new(operation, shape, T::DTYPE).epilogue(epilogue)
    };
    for (momentum, tracking) in [
        (Momentum::Factor(0.1), Tracking::Momentum),
        (Momentum::CumulativeAverage, Tracking::CumulativeAverage),
    ] {
        let config = BatchNorm2dConfig::new(shape.channels).momentum(momentum);
        let mut bn: BatchNorm2d<Cuda, T::Param> = BatchNorm2d::new(&cuda, config)?;
        let mut saved = bn.prepare_fused::<T>(shape, epilogue)?;
        let mut gradients = bn.gradients()?;
        let part = tensors.offset..tensors.offset + tensors.len;
        let (x, z) = (tensors.x.slice(part.clone()), tensors.z.slice(part.clone()));
        let _ = emulator::launches(cuda.stream().cu_stream());

        let mut y = tensors.y.slice_mut(part.clone());
        let forward = fused(Forward::new(&x, &mut y), &z, epilogue);
        bn.forward_train_with(forward, &mut saved)?;
        assert_as_planned(
            &cuda,
            &Problem {
                tracking,
                ..problem(Operation::Train)
            },
        );

        let forward = fused(Forward::new(&x, &mut y), &z, epilogue);
        bn.forward_eval_with(shape, forward)?;
        assert_as_planned(&cuda, &problem(Operation::Eval));

        // What is asked for, in every combination: dx, parameters, accumulated.
        for wanted in 0..8 {
            let (input, parameters, accumulate) = (wanted & 1 != 0, wanted & 2 != 0, wanted & 4 != 0);
            for operation in [Operation::Backward, Operation::BackwardEval] {
                let (mut dx, mut dz) = (tensors.dx.slice_mut(part.clone()), tensors.dz.slice_mut(part.clone()));
                let y = tensors.y.slice(part.clone());
                let mut backward = Backward::new(&x, &z);
                if input {
                    backward = backward.dx(&mut dx);
                }
                backward = match epilogue {
                    Epilogue::Identity => backward,
                    Epilogue::Relu => backward.relu(),
                    Epilogue::AddRelu => backward.add_relu(&y),
                };
                let residual_gradient = epilogue == Epilogue::AddRelu && input;
                if residual_gradient {
                    backward = backward.dz(&mut dz)?;
                }
                backward = match (parameters, accumulate) {
                    (true, false) => backward.parameters(&mut gradients),
                    (true, true) => backward.accumulate_parameters(&mut gradients),
                    (false, _) => backward,
                };
                match operation {
                    Operation::Backward => bn.backward_with(backward, &mut saved)?,
                    _ => bn.backward_eval_with(backward, &mut saved)?,
                }
                assert_as_planned(
                    &cuda,
                    &Problem {
                        input_gradient: input,
                        residual_gradient,
                        parameter_gradients: parameters,
                        accumulate: accumulate && parameters,
                        ..problem(operation)
                    },
                );
            }
        }
    }
    Ok(())
}

/// Shapes, each with the elements before the tensors in their buffers.
fn shapes() -> [(Shape, usize); 8] {
    [
        (Shape::nchw(4, 3, 8, 16), 0),                 // planes
        (Shape::nchw(3, 2, 9, 13), 0),                 // planes with edges
        (Shape::nchw(3, 2, 16, 16), 3),                // the same, for the address
        (Shape::nchw(6, 16, 7, 7), 0),                 // columns of planes
        (Shape::nchw(4, 40, 6, 5).channels_last(), 0), // columns of pixels
        (Shape::nchw(5, 3, 4, 3).channels_last(), 1),  // one element at a time
        (Shape::nchw(40, 2, 16, 16), 0),               // several splits on a small device
        (Shape::nchw(16, 24, 12, 12).channels_last(), 0),
    ]
}

fn count_shapes<T: Element>(profile: &str, epilogue: Epilogue) {
    for (shape, offset) in shapes() {
        count_all_passes::<T>(device(profile), shape, epilogue, offset).unwrap();
    }
}

/// The same on the resident path, by one team.
fn count_resident<T: Element>(profile: &str, epilogue: Epilogue, bulk: bool, team: Team) {
    for (shape, offset) in shapes() {
        let choice = Choice {
            bulk: Some(bulk),
            ..Choice::resident(Some(team))
        };
        count_all_passes::<T>(device(profile).with_choice(choice), shape, epilogue, offset).unwrap();
    }
}

#[test]
fn bytes_of_the_resident_path_are_the_plans_f32_block() {
    count_resident::<f32>("h200", Epilogue::Relu, true, Team::Block);
}

#[test]
fn bytes_of_the_resident_path_are_the_plans_f32_cluster() {
    count_resident::<f32>("h200", Epilogue::Relu, true, Team::Cluster(4));
}

/// On a small device, whose teams are a few blocks instead of hundreds, each of which takes a CPU its time.
#[test]
fn bytes_of_the_resident_path_are_the_plans_f32_grid() {
    count_resident::<f32>("small-100", Epilogue::Relu, true, Team::Grid);
}

#[test]
fn bytes_of_the_resident_path_are_the_plans_f16() {
    for team in [Team::Block, Team::Cluster(4), Team::Grid] {
        count_resident::<f16>("small-90", Epilogue::AddRelu, false, team);
    }
}

#[test]
fn bytes_are_the_plans_f32() {
    count_shapes::<f32>("small-75", Epilogue::Identity);
}

#[test]
fn bytes_are_the_plans_f16_add_relu() {
    count_shapes::<f16>("small-90", Epilogue::AddRelu);
}

/// A block takes one task after another where the grid has no room for all.
#[test]
fn bytes_are_the_plans_on_a_small_grid() {
    count_shapes::<f32>("small-grid", Epilogue::Relu);
    let limits = device("small-grid").limits().clone();
    let problem = Problem::new(Operation::Train, Shape::nchw(6, 16, 7, 7), batchnorm_cuda::Dtype::F32);
    let launch = Plan::chosen(&problem, &limits, &Choice::GENERAL).unwrap().kernels[0];
    assert!(launch.tiling.tasks() > u64::from(launch.grid), "{launch:?}");
}

#[test]
fn bytes_are_the_plans_f64_relu() {
    count_shapes::<f64>("h200", Epilogue::Relu);
}

/// What a step moves, in units of a tensor: training, evaluation, backward. Vectors per channel are a small part of it.
fn moved<T: Element>(cuda: &Cuda, shape: Shape, epilogue: Epilogue) -> [f64; 3] {
    let mut tensors = Tensors::<T>::new(cuda, shape, 0).unwrap();
    let mut bn: BatchNorm2d<Cuda, T::Param> = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(shape.channels)).unwrap();
    let mut saved = bn.prepare_fused::<T>(shape, epilogue).unwrap();
    let mut gradients = bn.gradients().unwrap();
    let tensor = (tensors.len * size_of::<T>()) as f64;
    let moved = || -> f64 {
        let launches = emulator::launches(cuda.stream().cu_stream());
        launches
            .iter()
            .map(|launch| launch.bytes_loaded + launch.bytes_stored)
            .sum::<u64>() as f64
            / tensor
    };
    moved();
    let Tensors { x, y, z, dx, dz, .. } = &mut tensors;
    let z_view = z.as_view();
    bn.forward_train_with(fused(Forward::new(&*x, y), &z_view, epilogue), &mut saved)
        .unwrap();
    let train = moved();
    bn.forward_eval_with(shape, fused(Forward::new(&*x, y), &z_view, epilogue))
        .unwrap();
    let evaluation = moved();
    let y_view = y.as_view();
    let mut backward = Backward::new(&*x, &*z).dx(dx).parameters(&mut gradients);
    backward = match epilogue {
        Epilogue::Identity => backward,
        Epilogue::Relu => backward.relu(),
        Epilogue::AddRelu => backward.add_relu(&y_view).dz(dz).unwrap(),
    };
    bn.backward_with(backward, &mut saved).unwrap();
    [train, evaluation, moved()]
}

fn assert_moves(cuda: &Cuda, shape: Shape, epilogue: Epilogue, expected: [f64; 3]) {
    let moved = moved::<f32>(cuda, shape, epilogue);
    for (times, expected) in moved.into_iter().zip(expected) {
        assert!(
            (expected..expected * 1.02).contains(&times),
            "{moved:?} times the tensor, not {expected}, {epilogue}, {}",
            cuda.choice()
        );
    }
}

#[test]
fn the_general_path_moves_3t_2t_5t() {
    let shape = Shape::nchw(32, 8, 32, 32);
    assert_moves(&device("h200"), shape, Epilogue::Identity, [3.0, 2.0, 5.0]);
    assert_moves(&device("h200"), shape, Epilogue::AddRelu, [4.0, 3.0, 8.0]);
}

/// The fewest that are possible, and no team needs more. Each holds as much as it is for.
#[test]
fn the_resident_path_moves_2t_2t_3t() {
    let (small, large) = (Shape::nchw(16, 8, 32, 32), Shape::nchw(64, 2, 56, 56));
    for (team, shape) in [
        (None, small),
        (None, large),
        (Some(Team::Block), small),
        (Some(Team::Cluster(16)), large),
        (Some(Team::Grid), large),
    ] {
        let cuda = device("h200").with_choice(Choice::resident(team));
        assert_moves(&cuda, shape, Epilogue::Identity, [2.0, 2.0, 3.0]);
        assert_moves(&cuda, shape, Epilogue::Relu, [2.0, 2.0, 3.0]);
        assert_moves(&cuda, shape, Epilogue::AddRelu, [3.0, 3.0, 5.0]);
    }
}

/// The shapes of this file reach every walk, on every profile used.
#[test]
fn every_walk_is_counted() {
    let walk = |shape, offset: u64| {
        let problem = Problem {
            alignment: Alignment::of([offset]),
            ..Problem::new(Operation::Train, shape, batchnorm_cuda::Dtype::F32)
        };
        Plan::chosen(&problem, device("small-75").limits(), &Choice::GENERAL)
            .unwrap()
            .kernels[0]
    };
    assert_eq!(walk(Shape::nchw(4, 3, 8, 16), 0).instantiation.walk, Walk::Planes);
    assert_eq!(
        walk(Shape::nchw(3, 2, 9, 13), 0).instantiation.walk,
        Walk::PlanesWithEdges
    );
    assert_eq!(
        walk(Shape::nchw(3, 2, 16, 16), 12).instantiation.walk,
        Walk::PlanesWithEdges
    );
    assert_eq!(walk(Shape::nchw(6, 16, 7, 7), 0).instantiation.walk, Walk::Columns);
    assert!(walk(Shape::nchw(40, 2, 16, 16), 0).tiling.splits > 1);
}

#[test]
fn passes_allocate_nothing_copy_nothing_and_do_not_wait() {
    let shape = Shape::nchw(4, 6, 8, 8);
    // With one stream in the context, cudarc has no events to record.
    let cuda = on_stream(context("h200").default_stream());
    assert_eq!(cuda.choice(), &Choice::default());
    let mut tensors = Tensors::<f32>::new(&cuda, shape, 0).unwrap();
    let mut bn = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(6).momentum(None)).unwrap();
    let mut saved = bn.prepare::<f32>(shape).unwrap();
    bn.prepare_eval::<f32>(shape, Epilogue::Identity).unwrap();
    bn.prepare_backward_eval::<f32>(shape, Epilogue::Identity).unwrap();
    let mut gradients = bn.gradients().unwrap();

    let before = emulator::thread_calls();
    bn.forward_train(&tensors.x, &mut tensors.y, &mut saved).unwrap();
    bn.backward(&tensors.x, &tensors.z, &mut saved, &mut tensors.dx, &mut gradients)
        .unwrap();
    bn.forward_eval(shape, &tensors.x, &mut tensors.y).unwrap();
    bn.forward_eval_in_place(shape, &mut tensors.x).unwrap();
    let backward = Backward::new(&tensors.x, &tensors.z)
        .dx(&mut tensors.dx)
        .parameters(&mut gradients);
    bn.backward_eval_with(backward, &mut saved).unwrap();
    let after = emulator::thread_calls();

    let expected = emulator::Calls {
        launches: before.launches + 5,
        ..before
    };
    assert_eq!(after, expected);
}
