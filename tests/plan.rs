//! Plans, for any device on any machine: every launch is legal, every element is covered exactly once, nothing overflows,
//! and the bytes are what the design says.

#[path = "../benches/shapes/resnet_50.rs"]
mod resnet_50;

use std::collections::HashSet;
use std::sync::OnceLock;

use batchnorm_cuda::cuda::plan::{Alignment, Choice, KernelLaunch, Operation, Plan, Problem, Resident, Team, Tracking};
use batchnorm_cuda::cuda::{DeviceLimits, Instantiation, Kernel, Walk};
use batchnorm_cuda::{Dtype, Epilogue, Error, Layout, Shape};
use proptest::prelude::*;

/// The well-known devices, and one with room for next to nothing.
fn devices() -> Vec<DeviceLimits> {
    let small = DeviceLimits {
        name: "small".into(),
        architecture: 75,
        multiprocessors: 2,
        threads_per_multiprocessor: 256,
        shared_memory_per_block: 8 << 10,
        shared_memory_per_multiprocessor: 20 << 10,
        shared_memory_reserved_per_block: 1 << 10,
        blocks_per_multiprocessor: 3,
        largest_cluster: 1,
        l2_cache: 64 << 10,
        ..DeviceLimits::named("t4").unwrap()
    };
    let small_with_clusters = DeviceLimits {
        name: "small with clusters".into(),
        architecture: 90,
        multiprocessors: 5,
        threads_per_multiprocessor: 2048,
        largest_cluster: 8,
        ..small.clone()
    };
    DeviceLimits::NAMES
        .iter()
        .map(|name| DeviceLimits::named(name).unwrap())
        .chain([small, small_with_clusters])
        .collect()
}

fn any_problem(largest_log2: u32) -> impl Strategy<Value = Problem> {
    let dimension = move || (0..=largest_log2 / 2).prop_flat_map(|log2| 1usize << log2..=(2usize << log2) - 1);
    (
        (dimension(), dimension(), dimension(), dimension(), any::<bool>()),
        prop::sample::select(&Operation::ALL[..]),
        prop::sample::select(&Dtype::ALL[..]),
        prop::sample::select(&Epilogue::ALL[..]),
        // The addresses of the tensors, in elements.
        prop_oneof![Just((0u64, 0u64)), (0..16u64, 0..16u64)],
        (any::<bool>(), any::<bool>(), any::<bool>()),
        (any::<bool>(), any::<bool>(), any::<bool>()),
    )
        .prop_map(
            move |((n, c, h, w, nhwc), operation, dtype, epilogue, (first, second), wanted, more)| {
                let shape = Shape::nchw(n, c, h, w);
                let size = dtype.size() as u64;
                Problem {
                    epilogue,
                    alignment: Alignment::of([first * size, second * size]),
                    affine: more.0,
                    tracking: if more.1 {
                        Tracking::CumulativeAverage
                    } else {
                        Tracking::Momentum
                    },
                    input_gradient: wanted.0,
                    residual_gradient: wanted.1,
                    parameter_gradients: wanted.2,
                    accumulate: more.2,
                    ..Problem::new(operation, if nhwc { shape.channels_last() } else { shape }, dtype)
                }
            },
        )
        .prop_filter(
            "at most 2^largest elements, and something to normalise",
            move |problem| {
                let Shape {
                    batch,
                    channels,
                    height,
                    width,
                    ..
                } = problem.shape;
                let values = batch * height * width;
                values > 1 && (values as u128 * channels as u128) <= 1u128 << largest_log2
            },
        )
}

/// What `Instantiation::all` says a plan can ask for, and so what the compilers are tried on.
fn known_instantiations() -> &'static HashSet<Instantiation> {
    static ALL: OnceLock<HashSet<Instantiation>> = OnceLock::new();
    ALL.get_or_init(|| Instantiation::all().into_iter().collect())
}

/// What the kernel's grid, block and shared memory must satisfy on a device, and the tiling's own arithmetic.
fn assert_legal(problem: &Problem, limits: &DeviceLimits, launch: &KernelLaunch) {
    let tiling = &launch.tiling;
    let instantiation = &launch.instantiation;
    let what = format!("{problem:?} on {}: {launch:?}", limits.name);

    assert!((1..=limits.grid).contains(&launch.grid), "{what}");
    assert!(launch.block() <= limits.threads_per_multiprocessor, "{what}");
    assert!(launch.shared_bytes <= limits.shared_memory_per_block, "{what}");
    match &instantiation.resident {
        Some(resident) => assert_legal_team(limits, launch, resident),
        None => {
            assert!([32, 64, 128, 256].contains(&launch.block()), "{what}");
            assert!(launch.shared_bytes <= 48 << 10, "{what}");
        }
    }
    assert!(
        u64::from(instantiation.vector) * instantiation.dtype.size() as u64 <= 16
            && instantiation.vector.is_power_of_two(),
        "{what}"
    );
    assert!(tiling.team.is_power_of_two() && tiling.team <= 32, "{what}");

    assert!(
        known_instantiations().contains(instantiation),
        "{what}: not compiled ahead"
    );

    // Strips cover the channels, splits cover the rows; none is empty, but of a cluster's, whose number is fixed.
    let work = match instantiation.walk {
        Walk::Columns => tiling.outer,
        Walk::Planes | Walk::PlanesWithEdges => tiling.outer * tiling.slots,
    };
    assert!(tiling.share * tiling.splits >= work, "{what}");
    let fixed = matches!(&instantiation.resident, Some(resident) if resident.team.cluster() > 1);
    assert!(fixed || tiling.share * (tiling.splits - 1) < work, "{what}");
    assert!(
        tiling.strip_channels * tiling.strips >= tiling.channels
            && tiling.strip_channels * (tiling.strips - 1) < tiling.channels,
        "{what}"
    );
    assert_eq!(tiling.channels, problem.shape.channels as u64, "{what}");
    if instantiation.walk == Walk::Columns {
        // A strip is whole vectors and whole channels, and a block has a thread for each of its columns.
        assert_eq!(
            tiling.width * u64::from(instantiation.vector),
            tiling.strip_channels * tiling.inner,
            "{what}"
        );
        assert!(tiling.width <= u64::from(launch.block()), "{what}");
        assert_eq!(tiling.slots * u64::from(instantiation.vector), tiling.stride, "{what}");
    }
    // Counts that the kernels keep in 32 bits.
    assert!(
        tiling.splits <= u64::from(u32::MAX) && tiling.width <= u64::from(u32::MAX),
        "{what}"
    );
    let largest = problem.shape.len().unwrap() as u64;
    if !instantiation.wide_index {
        assert!(
            largest <= i32::MAX as u64 && work <= i32::MAX as u64 && tiling.tasks() <= i32::MAX as u64,
            "{what}"
        );
    }
}

/// Blocks fit the multiprocessors that must run at the same time, teams are whole, and there is work for each of them.
fn assert_legal_team(limits: &DeviceLimits, launch: &KernelLaunch, resident: &Resident) {
    let what = format!("on {}: {launch:?}", limits.name);
    let tiling = &launch.tiling;
    assert_eq!(u64::from(launch.grid) % tiling.splits, 0, "{what}");
    assert!(u64::from(launch.grid) / tiling.splits <= tiling.strips, "{what}");
    let shared = launch.shared_bytes + limits.shared_memory_reserved_per_block;
    let per_multiprocessor = (limits.shared_memory_per_multiprocessor / shared)
        .min(limits.threads_per_multiprocessor / launch.block())
        .min(limits.blocks_per_multiprocessor)
        .min(resident.blocks);
    assert!(per_multiprocessor >= 1, "{what}");
    let running = u64::from(per_multiprocessor * limits.multiprocessors);
    assert!(u64::from(launch.grid) <= running, "{what}");
    match resident.team {
        Team::Block => assert_eq!(tiling.splits, 1, "{what}"),
        Team::Cluster(blocks) => {
            assert_eq!(tiling.splits, u64::from(blocks), "{what}");
            assert!(blocks <= limits.largest_cluster, "{what}");
        }
        Team::Grid => assert!(tiling.splits > 1, "{what}"),
    }
    // 64 registers per thread, or 128, of 65,536.
    assert!(resident.blocks * launch.block() <= 1024, "{what}");
    if resident.bulk {
        assert!(limits.architecture >= 90, "{what}");
        assert_eq!(
            launch.instantiation.vector as usize * launch.instantiation.dtype.size(),
            16,
            "{what}"
        );
        assert_ne!(launch.instantiation.walk, Walk::PlanesWithEdges, "{what}");
    }
}

/// Walks a launch as `kernels/tensor.cuh` does and counts how often each element is taken, and for which channel.
fn assert_covers_once(problem: &Problem, launch: &KernelLaunch, phase: u64) {
    let Shape {
        batch,
        channels,
        height,
        width,
        layout,
    } = problem.shape;
    let plane = height * width;
    let tiling = &launch.tiling;
    let vector = u64::from(launch.instantiation.vector);
    let mut taken = vec![0u32; batch * channels * plane];
    let mut take = |offset: i64, channel: u64| {
        let element = usize::try_from(offset).expect("no element lies before the tensor");
        let actual = match layout {
            Layout::Nchw => element / plane % channels,
            Layout::Nhwc => element % channels,
        };
        assert_eq!(actual as u64, channel, "{problem:?}: {launch:?}: element {element}");
        taken[element] += 1;
    };
    for strip in 0..tiling.strips {
        for split in 0..tiling.splits {
            let first_channel = strip * tiling.strip_channels;
            match launch.instantiation.walk {
                Walk::Columns => {
                    let rows = split * tiling.share..tiling.outer.min((split + 1) * tiling.share);
                    let columns = strip * tiling.width..tiling.slots.min((strip + 1) * tiling.width);
                    for (row, column) in rows.flat_map(|row| columns.clone().map(move |column| (row, column))) {
                        for lane in 0..vector {
                            let in_strip = (column - strip * tiling.width) * vector + lane;
                            take(
                                (row * tiling.stride + column * vector + lane) as i64,
                                first_channel + in_strip / tiling.inner,
                            );
                        }
                    }
                }
                walk => {
                    let total = tiling.outer * tiling.slots;
                    for item in split * tiling.share..total.min((split + 1) * tiling.share) {
                        let origin = item / tiling.slots * tiling.stride + first_channel * tiling.inner;
                        // Vectors lie at multiples of their size in memory; the tensor begins `phase` elements behind one.
                        let sticks_out = if walk == Walk::PlanesWithEdges {
                            (phase + origin) % vector
                        } else {
                            0
                        };
                        let begin = (item % tiling.slots * vector) as i64 - sticks_out as i64;
                        for place in
                            (begin..begin + vector as i64).filter(|place| (0..tiling.inner as i64).contains(place))
                        {
                            take(origin as i64 + place, first_channel);
                        }
                    }
                }
            }
        }
    }
    assert!(
        taken.iter().all(|&times| times == 1),
        "{problem:?}: {launch:?}: not every element is taken once"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn launches_are_legal_up_to_two_to_the_forty_elements(problem in any_problem(40)) {
        for limits in devices() {
            let plan = Plan::new(&problem, &limits).unwrap();
            for launch in &plan.kernels {
                assert_legal(&problem, &limits, launch);
            }
            let traffic = plan.traffic();
            prop_assert!(traffic.tensors >= plan.minimum_bytes() || plan.kernels.is_empty());
            prop_assert!(traffic.bytes() >= traffic.tensors);
        }
    }

    #[test]
    fn every_candidate_is_legal_and_the_chosen_one_is_among_them(problem in any_problem(24)) {
        for limits in devices() {
            let candidates = Plan::candidates(&problem, &limits).unwrap();
            for candidate in &candidates {
                for launch in &candidate.kernels {
                    assert_legal(&problem, &limits, launch);
                }
            }
            let chosen = Plan::new(&problem, &limits).unwrap();
            prop_assert!(candidates.contains(&chosen), "{chosen}");
            prop_assert!(candidates.iter().all(|plan| plan.modelled_time().is_finite() && plan.modelled_time() > 0.0 || plan.kernels.is_empty()));
        }
    }

    #[test]
    fn every_element_is_covered_exactly_once(problem in any_problem(11), phase in 0u64..8, number in any::<usize>()) {
        // The first tensor's address, in elements: what the alignment says of it, and nothing else.
        for limits in devices() {
            for phase in [0, phase] {
                let size = problem.dtype.size() as u64;
                let problem = Problem { alignment: Alignment::of([phase * size]), ..problem };
                let candidates = Plan::candidates(&problem, &limits).unwrap();
                for plan in [&candidates[0], &candidates[number % candidates.len()]] {
                    for launch in &plan.kernels {
                        assert_legal(&problem, &limits, launch);
                        assert_covers_once(&problem, launch, phase);
                    }
                }
            }
        }
    }
}

fn h200() -> DeviceLimits {
    DeviceLimits::named("h200").unwrap()
}

/// The general path.
fn plan(problem: Problem) -> Plan {
    Plan::chosen(&problem, &h200(), &Choice::GENERAL).unwrap()
}

/// What is chosen if nobody says otherwise.
fn fastest(problem: Problem) -> Plan {
    Plan::new(&problem, &h200()).unwrap()
}

#[test]
fn every_shape_of_resnet_50_can_cross_memory_once_and_does_where_that_is_faster() {
    for batch in [32, 256] {
        for shape in resnet_50::resnet_50().filter(|shape| shape.layout == Layout::Nchw) {
            let shape = Shape { batch, ..shape };
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                for epilogue in Epilogue::ALL {
                    for operation in [Operation::Train, Operation::Backward] {
                        let problem = Problem::new(operation, shape, dtype).epilogue(epilogue);
                        let resident = Plan::chosen(&problem, &h200(), &Choice::resident(None)).unwrap();
                        assert_eq!(resident.traffic_ratio(), 1.0, "{resident}");
                        assert_eq!(resident.kernels.len(), 1, "{resident}");
                        let general = plan(problem);
                        let faster = if resident.modelled_time() <= general.modelled_time() {
                            resident
                        } else {
                            general
                        };
                        assert_eq!(fastest(problem), faster);
                    }
                }
            }
        }
    }
}

#[test]
fn a_choice_is_kept_to_and_says_what_it_is() {
    let problem = Problem::new(Operation::Train, Shape::nchw(32, 64, 56, 56), Dtype::F16);
    for candidate in Plan::candidates(&problem, &h200()).unwrap() {
        let again = Plan::chosen(&problem, &h200(), &candidate.choice()).unwrap();
        assert_eq!(again, candidate, "{}", candidate.choice());
    }
    let wanted = Choice {
        stages: Some(2),
        bulk: Some(true),
        threads: Some(256),
        ..Choice::resident(Some(Team::Cluster(8)))
    };
    let resident = Plan::chosen(&problem, &h200(), &wanted).unwrap().kernels[0]
        .instantiation
        .resident
        .unwrap();
    assert_eq!(
        (resident.team, resident.stages, resident.bulk),
        (Team::Cluster(8), 2, true)
    );
    assert_eq!(wanted.to_string(), "cluster8, 256 threads, 2 stages, bulk copies");
    assert_eq!(Choice::default().to_string(), "any");
    assert_eq!(Choice::GENERAL.to_string(), "general");
    // No cluster of 8 has 3 blocks: the general path is taken.
    let impossible = Choice {
        splits: Some(3),
        ..wanted
    };
    assert_eq!(Plan::chosen(&problem, &h200(), &impossible).unwrap(), plan(problem));
}

#[test]
fn passes_that_want_less_take_the_path_of_the_whole_one() {
    let shape = Shape::nchw(32, 64, 56, 56);
    let all = Problem::new(Operation::Backward, shape, Dtype::F32).epilogue(Epilogue::AddRelu);
    let launch = |problem: Problem| {
        let plan = fastest(problem);
        (
            plan.kernels.len(),
            plan.kernels[0].instantiation,
            plan.kernels[0].tiling,
            plan.kernels[0].grid,
        )
    };
    for problem in [
        Problem {
            parameter_gradients: false,
            ..all
        },
        Problem {
            residual_gradient: false,
            ..all
        },
        Problem {
            input_gradient: false,
            ..all
        },
        Problem { affine: false, ..all },
        Problem {
            accumulate: true,
            ..all
        },
    ] {
        assert_eq!(launch(problem), launch(all));
    }
    // The gradient at the residual alone needs no sums.
    let residual = Problem {
        input_gradient: false,
        parameter_gradients: false,
        ..all
    };
    assert_eq!(fastest(residual).kernels[0].instantiation.kernel, Kernel::BackwardApply);
}

#[test]
fn general_path_moves_three_tensors_forward_two_in_evaluation_five_backward() {
    for layout in [Shape::nchw(32, 64, 56, 56), Shape::nchw(32, 64, 56, 56).channels_last()] {
        for dtype in Dtype::ALL {
            let tensor = (layout.len().unwrap() * dtype.size()) as u64;
            let tensors = |operation, epilogue| {
                plan(Problem::new(operation, layout, dtype).epilogue(epilogue))
                    .traffic()
                    .tensors
                    / tensor
            };
            assert_eq!(tensors(Operation::Train, Epilogue::Identity), 3);
            assert_eq!(tensors(Operation::Train, Epilogue::AddRelu), 4);
            assert_eq!(tensors(Operation::Eval, Epilogue::Identity), 2);
            assert_eq!(tensors(Operation::Eval, Epilogue::AddRelu), 3);
            assert_eq!(tensors(Operation::Backward, Epilogue::Identity), 5);
            assert_eq!(tensors(Operation::Backward, Epilogue::Relu), 5);
            assert_eq!(tensors(Operation::Backward, Epilogue::AddRelu), 8);
            assert_eq!(tensors(Operation::BackwardEval, Epilogue::Identity), 3);
        }
    }
}

#[test]
fn ratio_is_over_the_tensors_that_any_implementation_must_move() {
    let shape = Shape::nchw(32, 64, 56, 56);
    let ratio = |operation| plan(Problem::new(operation, shape, Dtype::F32)).traffic_ratio();
    assert_eq!(ratio(Operation::Train), 1.5);
    assert_eq!(ratio(Operation::Eval), 1.0);
    assert_eq!(ratio(Operation::Backward), 5.0 / 3.0);
    assert_eq!(ratio(Operation::BackwardEval), 1.0);
}

#[test]
fn per_channel_vectors_are_a_small_part_of_the_bytes() {
    for shape in [
        Shape::nchw(32, 64, 112, 112),
        Shape::nchw(32, 256, 56, 56),
        Shape::nchw(32, 2048, 7, 7),
    ] {
        for shape in [shape, shape.channels_last()] {
            for operation in Operation::ALL {
                let traffic = plan(Problem::new(operation, shape, Dtype::F16)).traffic();
                let extra = traffic.bytes() as f64 / traffic.tensors as f64 - 1.0;
                assert!(extra < 0.1, "{operation} {shape}: {extra}");
            }
        }
    }
}

#[test]
fn accesses_are_128_bits_wide_where_alignment_allows() {
    let wide = |shape: Shape, dtype: Dtype| {
        plan(Problem::new(Operation::Train, shape, dtype))
            .kernels
            .iter()
            .all(|launch| launch.instantiation.vector as usize * dtype.size() == 16)
    };
    for dtype in Dtype::ALL {
        for plane in [112, 56, 28, 14, 7] {
            for channels in [64, 256, 2048] {
                assert!(
                    wide(Shape::nchw(32, channels, plane, plane), dtype),
                    "{dtype} {channels} x {plane}"
                );
                assert!(
                    wide(Shape::nchw(32, channels, plane, plane).channels_last(), dtype),
                    "{dtype} nhwc {channels}"
                );
            }
        }
        // Odd planes of an odd number of channels: long enough to take their ends apart.
        assert!(wide(Shape::nchw(1, 3, 33, 65), dtype), "{dtype}");
    }
}

#[test]
fn a_view_at_an_odd_offset_is_still_read_in_vectors() {
    let problem = Problem {
        alignment: Alignment::of([4, 4 + 1024, 4 + 4096]),
        ..Problem::new(Operation::Train, Shape::nchw(32, 64, 56, 56), Dtype::F32)
    };
    for launch in &plan(problem).kernels {
        assert_eq!(
            (launch.instantiation.walk, launch.instantiation.vector),
            (Walk::PlanesWithEdges, 4)
        );
    }
    // Tensors whose vectors lie in different places have none in common.
    let problem = Problem {
        alignment: Alignment::of([0, 4]),
        ..problem
    };
    for launch in &plan(problem).kernels {
        assert_eq!(launch.instantiation.vector, 1);
    }
}

#[test]
fn batches_and_channels_beyond_65535_stay_in_the_x_dimension_of_the_grid() {
    for shape in [
        Shape::nchw(70_000, 2, 2, 2),
        Shape::nchw(2, 70_000, 2, 2),
        Shape::nchw(3, 5_000_000, 1, 1),
    ] {
        for shape in [shape, shape.channels_last()] {
            for limits in devices() {
                for launch in &Plan::new(&Problem::new(Operation::Train, shape, Dtype::F32), &limits)
                    .unwrap()
                    .kernels
                {
                    assert_legal(&Problem::new(Operation::Train, shape, Dtype::F32), &limits, launch);
                }
            }
        }
    }
}

#[test]
fn offsets_are_64_bits_wide_from_two_to_the_31_elements() {
    let wide = |shape| {
        plan(Problem::new(Operation::Train, shape, Dtype::F16)).kernels[0]
            .instantiation
            .wide_index
    };
    assert!(!wide(Shape::nchw(2, 1 << 10, 1 << 10, 1 << 9)));
    assert!(wide(Shape::nchw(2, 1 << 10, 1 << 10, 1 << 10)));
    assert!(wide(Shape::nchw(2, 1 << 10, 1 << 10, 1 << 10).channels_last()));
    assert!(wide(Shape::nchw(1 << 31, 1, 1, 1)));
}

#[test]
fn an_empty_batch_launches_nothing() {
    for operation in Operation::ALL {
        let plan = plan(Problem::new(operation, Shape::nchw(0, 64, 56, 56), Dtype::F32));
        assert!(plan.kernels.is_empty());
        assert_eq!((plan.traffic().bytes(), plan.traffic_ratio()), (0, 1.0));
    }
}

#[test]
fn only_the_gradients_asked_for_are_computed() {
    let kernels = |problem: Problem| -> Vec<Kernel> {
        plan(problem)
            .kernels
            .iter()
            .map(|launch| launch.instantiation.kernel)
            .collect()
    };
    let shape = Shape::nchw(32, 64, 56, 56);
    let all = Problem::new(Operation::Backward, shape, Dtype::F32);
    let parameters_only = Problem {
        input_gradient: false,
        ..all
    };
    assert_eq!(kernels(all), [Kernel::BackwardReduce, Kernel::BackwardApply]);
    assert_eq!(kernels(parameters_only), [Kernel::BackwardReduce]);
    // In evaluation the gradient at x does not wait for the sums.
    let all = Problem {
        operation: Operation::BackwardEval,
        ..all
    };
    let input_only = Problem {
        parameter_gradients: false,
        ..all
    };
    let nothing = Problem {
        input_gradient: false,
        ..input_only
    };
    assert_eq!(kernels(all), [Kernel::BackwardReduce]);
    assert_eq!(kernels(input_only), [Kernel::BackwardApply]);
    assert_eq!(plan(input_only).traffic_ratio(), 1.0);
    assert!(kernels(nothing).is_empty());
}

#[test]
fn what_cannot_be_normalised_has_no_plan() {
    let refused = |operation, shape| Plan::new(&Problem::new(operation, shape, Dtype::F32), &h200()).unwrap_err();
    let one = Shape::nchw(1, 4, 1, 1);
    assert_eq!(refused(Operation::Train, one), Error::OneValuePerChannel { shape: one });
    assert!(Plan::new(&Problem::new(Operation::Eval, one, Dtype::F32), &h200()).is_ok());
    let flat = Shape::nchw(2, 4, 0, 3);
    assert_eq!(refused(Operation::Eval, flat), Error::EmptyDimension { shape: flat });
    let huge = Shape::nchw(1 << 31, 1 << 20, 1 << 12, 1);
    assert_eq!(refused(Operation::Eval, huge), Error::ShapeOverflow { shape: huge });
}

#[test]
fn a_plan_can_be_read() {
    let text = plan(Problem::new(Operation::Train, Shape::nchw(32, 64, 56, 56), Dtype::F16)).to_string();
    for part in [
        "train [32, 64, 56, 56] f16",
        "statistics <planes, 8 x f16",
        "apply",
        "grid",
        "1.50 times",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

/// A block of many threads has more results to join, and a second buffer is of no use to a strip that is alone. (On an H200 the
/// first of these took 13.1 us with 256 threads and 14.6 us with 1024.)
#[test]
fn the_model_knows_threads_and_laps() {
    let time = |shape, threads, stages| {
        let choice = Choice {
            threads: Some(threads),
            stages: Some(stages),
            bulk: Some(true),
            ..Choice::resident(Some(Team::Block))
        };
        Plan::chosen(&Problem::new(Operation::Train, shape, Dtype::F32), &h200(), &choice)
            .unwrap()
            .modelled_time()
    };
    // 128 strips of 100 KB on 132 multiprocessors: one block on each.
    let alone = Shape::nchw(32, 128, 28, 28);
    assert!(time(alone, 1024, 1) > time(alone, 512, 1));
    assert!(time(alone, 512, 2) >= time(alone, 512, 1));
    let many = Shape::nchw(32, 1024, 28, 28);
    assert!(time(many, 1024, 2) < time(many, 1024, 1));
}
