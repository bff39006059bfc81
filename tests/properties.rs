//! What holds for every shape, layout, element, epilogue and offset, tried on random ones. The seed is fixed.

mod common;

use batchnorm_cuda::{Cuda, Dtype, Element, Epilogue, Layout, Real, Shape};
use common::{
    Case, Device, Driver, Form, Gradient, Random, assert_near, assert_near_reference, assert_same, assert_same_bits,
    on_every_device, reference, run, run_as, wide, with_element,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

on_every_device!(
    agrees_with_the_reference,
    channels_last_is_the_same_permuted,
    gradients_are_finite_differences,
    normalised_values_have_mean_0_and_variance_1,
    repeats_bit_for_bit,
    in_place_is_out_of_place,
    accumulating_is_writing_and_adding,
    some_gradients_are_those_of_all,
);

/// A random step, described so that a failing one shrinks to a small one.
#[derive(Clone, Debug)]
struct Setting {
    shape: Shape,
    dtype: Dtype,
    epilogue: Epilogue,
    affine: bool,
    track: bool,
    training: bool,
    offsets: [usize; 6],
    seed: u64,
}

impl Setting {
    fn case<T: Element>(&self) -> Case<T> {
        let case = Case::random(&mut Random::new(self.seed), self.shape, self.epilogue)
            .affine(self.affine)
            .track_running_stats(self.track);
        if self.training { case } else { case.evaluation() }
    }

    /// The same, with all tensors at equal offsets. What is vectorised depends on the alignment of all tensors of a call, and
    /// the order of a sum on what is vectorised: calls that must agree bit for bit have to be aligned alike, whichever
    /// tensors they have.
    fn aligned_alike(&self) -> Self {
        Self {
            offsets: [self.offsets[0]; 6],
            ..self.clone()
        }
    }

    fn form(&self) -> Form {
        Form {
            offsets: self.offsets,
            ..Form::default()
        }
    }
}

/// Settings of up to `elements` elements.
fn settings(elements: usize) -> impl Strategy<Value = Setting> {
    let small = (1..6usize, 1..40usize, 1..9usize, 1..9usize);
    let few_long_channels = (1..3usize, 1..4usize, 1..40usize, 20..80usize);
    let many_channels = (1..4usize, 40..300usize, 1..3usize, 1..4usize);
    let many_images = (20..200usize, 1..5usize, 1..4usize, 1..3usize);
    let dimensions = prop_oneof![4 => small, 2 => few_long_channels, 2 => many_channels, 1 => many_images];
    let shape = (dimensions, any::<bool>())
        .prop_map(|((n, c, h, w), channels_last)| {
            let shape = Shape::nchw(n, c, h, w);
            if channels_last { shape.channels_last() } else { shape }
        })
        .prop_filter("too many elements", move |shape| shape.len().unwrap() <= elements);
    let module = (
        proptest::sample::select(Dtype::ALL.to_vec()),
        proptest::sample::select(Epilogue::ALL.to_vec()),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.7),
    );
    let offsets = prop_oneof![
        1 => Just([0; 6]),
        2 => (0..17usize).prop_map(|offset| [offset; 6]),
        2 => prop::array::uniform6(0..17usize),
    ];
    (shape, module, offsets, any::<u64>())
        .prop_map(
            |(shape, (dtype, epilogue, affine, track, training), offsets, seed)| Setting {
                shape,
                dtype,
                epilogue,
                affine,
                track,
                training,
                offsets,
                seed,
            },
        )
        .prop_filter("no variance in one value", |setting| {
            setting.shape.values_per_channel().unwrap() > 1 || !setting.training && setting.track
        })
}

/// Tries a property on `cases` random settings, a third of them on a stand-in.
fn check<B: Device>(cases: u32, settings: impl Strategy<Value = Setting>, property: impl Fn(&Setting)) {
    let config = Config {
        cases: B::size(cases as usize, (cases / 3).max(1) as usize) as u32,
        rng_seed: RngSeed::Fixed(20_150_211),
        failure_persistence: None,
        ..Config::default()
    };
    let tried = TestRunner::new(config).run(&settings, |setting| {
        property(&setting);
        Ok(())
    });
    tried.unwrap_or_else(|failure| panic!("{}: {failure}", B::NAME));
}

fn agrees_with_the_reference<B: Device>(device: &B) {
    check::<B>(96, settings(B::size(20_000, 4_000)), |setting| {
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>();
            let outcome = run_as(device, &case, &setting.form()).unwrap();
            assert_near_reference(B::NAME, &case, &outcome);
        })
    });
}

/// What is launched depends on the device: each of the stand-in's has its turn.
#[cfg(target_os = "linux")]
#[test]
fn agrees_with_the_reference_on_every_device_profile() {
    let devices: Vec<usize> = match common::driver() {
        Driver::Real => vec![0],
        Driver::StandIn => emulator::PROFILES
            .iter()
            .filter(|profile| profile.name != "too-old")
            .map(|profile| emulator::ordinal(profile.name))
            .collect(),
    };
    for ordinal in devices {
        let device = common::cuda_device(ordinal);
        check::<Cuda>(24, settings(3_000), |setting| {
            with_element!(setting.dtype, T => {
                let case = setting.case::<T>();
                let outcome = run_as(&device, &case, &setting.form()).unwrap();
                assert_near_reference(&format!("{device:?}"), &case, &outcome);
            })
        });
    }
}

/// Directly, and not through a reference that both may be near to.
#[cfg(target_os = "linux")]
#[test]
fn cuda_agrees_with_the_cpu() {
    let device = common::cuda();
    check::<Cuda>(96, settings(4_000), |setting| {
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>();
            let on_cuda = run_as(&device, &case, &setting.form()).unwrap().values();
            let on_cpu = run_as(&common::cpu(), &case, &setting.form()).unwrap().values();
            let (_, scales) = reference(&case);
            assert_near::<T>("cuda beside cpu", case.shape, &on_cuda, &on_cpu, &scales, 2.0);
        })
    });
}

fn channels_last_is_the_same_permuted<B: Device>(device: &B) {
    check::<B>(48, settings(4_000), |setting| {
        with_element!(setting.dtype, T => {
            let nchw = setting.case::<T>().in_layout(Layout::Nchw);
            let nhwc = nchw.in_layout(Layout::Nhwc);
            let straight = run(device, &nchw);
            let permuted = run(device, &nhwc).permuted(nhwc.shape, nchw.shape);
            if nchw.by_batch() {
                // Sums run in another order.
                let (_, scales) = reference(&nchw);
                assert_near::<T>(B::NAME, nchw.shape, &permuted.values(), &straight.values(), &scales, 2.0);
            } else {
                assert_same_bits("y", &permuted.y, &straight.y);
                assert_same_bits("dx", permuted.dx.as_ref().unwrap(), straight.dx.as_ref().unwrap());
            }
        })
    });
}

/// Along a random direction, the slope of Σ dy · y is the sum of the gradients in that direction.
fn gradients_are_finite_differences<B: Device>(device: &B) {
    // Steps of one size need channels whose deviation is not tiny by chance, and a relu none of whose arguments is so
    // near 0 that a step turns it over.
    let smooth = settings(2_000)
        .prop_map(|setting| Setting {
            dtype: Dtype::F64,
            ..setting
        })
        .prop_filter("a channel of few values", |setting| {
            setting.shape.values_per_channel().unwrap() >= 8
        })
        .prop_filter("relu near 0", |setting| {
            let without_relu = Setting {
                epilogue: Epilogue::Identity,
                ..setting.clone()
            };
            let mut before_relu = reference(&without_relu.case::<f64>()).0.y.unwrap();
            if let Some(z) = setting.case::<f64>().z {
                before_relu.iter_mut().zip(z).for_each(|(y, z)| *y += z);
            }
            setting.epilogue == Epilogue::Identity || before_relu.iter().all(|value| value.abs() > 2e-4)
        });
    check::<B>(48, smooth, |setting| {
        const STEP: f64 = 1e-6;
        let case = setting.case::<f64>();
        let outcome = run(device, &case).values();
        let dy = case.dy.as_ref().unwrap();
        let mut random = Random::new(!setting.seed);
        let mut direction = |len: usize| -> Vec<f64> { (0..len).map(|_| random.normal()).collect() };

        let (of_x, of_z) = (direction(case.x.len()), direction(case.x.len()));
        let (of_weight, of_bias) = (direction(setting.shape.channels), direction(setting.shape.channels));
        let moved = |step: f64| {
            let along = |values: &mut Vec<f64>, direction: &[f64]| {
                values
                    .iter_mut()
                    .zip(direction)
                    .for_each(|(value, by)| *value += step * by);
            };
            let mut case = case.clone().forward_only();
            along(&mut case.x, &of_x);
            case.z.iter_mut().for_each(|z| along(z, &of_z));
            case.state
                .weight
                .iter_mut()
                .for_each(|weight| along(weight, &of_weight));
            case.state.bias.iter_mut().for_each(|bias| along(bias, &of_bias));
            run(device, &case).y
        };
        let (ahead, behind) = (moved(STEP), moved(-STEP));
        let difference = common::sum((0..dy.len()).map(|i| dy[i] * (ahead[i] - behind[i]))) / (2.0 * STEP);

        let mut terms = Vec::new();
        let pairs = [
            (outcome.dx, &of_x),
            (outcome.dz, &of_z),
            (outcome.dweight, &of_weight),
            (outcome.dbias, &of_bias),
        ];
        for (gradient, direction) in pairs {
            terms.extend(
                gradient
                    .into_iter()
                    .flatten()
                    .zip(direction)
                    .map(|(gradient, by)| gradient * by),
            );
        }
        let size = common::sum(terms.iter().map(|term| term.abs()));
        approx::assert_abs_diff_eq!(common::sum(terms), difference, epsilon = 1e-6 * size);
    });
}

fn normalised_values_have_mean_0_and_variance_1<B: Device>(device: &B) {
    check::<B>(48, settings(4_000), |setting| {
        let setting = Setting {
            training: true,
            epilogue: Epilogue::Identity,
            affine: false,
            ..setting.clone()
        };
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>().forward_only();
            let Ok(n @ 2..) = case.shape.values_per_channel() else { return };
            let outcome = run(device, &case);
            let (want, _) = reference(&case);
            // Each of the n values is off by half a unit of its type at most, where the largest is sqrt(n) at most.
            let rounding = common::limit(T::DTYPE) * (n as f64).sqrt();
            let y = wide(&outcome.y);
            for c in 0..case.shape.channels {
                let channel = || common::channel_indices(case.shape, c).map(|i| y[i]);
                let mean = common::sum(channel()) / n as f64;
                let variance = common::sum(channel().map(|y| y * y)) / n as f64;
                // eps keeps the variance below 1 by as much as it is above the batch's.
                let invstd = want.save_invstd.as_ref().unwrap()[c];
                let expected = 1.0 - case.config.eps * invstd * invstd;
                approx::assert_abs_diff_eq!(mean, 0.0, epsilon = 4.0 * rounding);
                approx::assert_abs_diff_eq!(variance, expected, epsilon = 8.0 * rounding);
            }
        })
    });
}

fn repeats_bit_for_bit<B: Device>(device: &B) {
    check::<B>(24, settings(B::size(40_000, 4_000)), |setting| {
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>();
            let once = run(device, &case);
            for _ in 0..3 {
                assert_same(&run(device, &case), &once);
            }
        })
    });
}

fn in_place_is_out_of_place<B: Device>(device: &B) {
    check::<B>(48, settings(4_000), |setting| {
        let setting = setting.aligned_alike();
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>();
            let apart = run_as(device, &case, &setting.form()).unwrap();
            let form = Form {
                // Training keeps x for the backward pass.
                forward_in_place: !case.training,
                backward_in_place: true,
                ..setting.form()
            };
            assert_same(&run_as(device, &case, &form).unwrap(), &apart);
        })
    });
}

fn accumulating_is_writing_and_adding<B: Device>(device: &B) {
    check::<B>(48, settings(4_000), |setting| {
        let setting = Setting {
            affine: true,
            ..setting.aligned_alike()
        };
        with_element!(setting.dtype, T => {
            type P = <T as Element>::Param;
            let case = setting.case::<T>();
            let mut random = Random::new(!setting.seed);
            let start: Vec<f64> = (0..case.shape.channels).map(|_| (random.normal() as f32).into()).collect();
            let mut expected = run_as(device, &case, &setting.form()).unwrap();
            for gradient in [&mut expected.dweight, &mut expected.dbias] {
                let values = gradient.as_mut().unwrap();
                values.iter_mut().zip(&start).for_each(|(value, &start)| *value += P::from_f64(start));
            }
            let form = Form {
                accumulate_to: Some(start),
                ..setting.form()
            };
            assert_same(&run_as(device, &case, &form).unwrap(), &expected);
        })
    });
}

fn some_gradients_are_those_of_all<B: Device>(device: &B) {
    check::<B>(32, settings(4_000), |setting| {
        let setting = setting.aligned_alike();
        with_element!(setting.dtype, T => {
            let case = setting.case::<T>();
            let all = run_as(device, &case, &setting.form()).unwrap();
            let gradients = [Gradient::X, Gradient::Z, Gradient::Parameters];
            for wanted in 0..8 {
                let without = (0..3).filter(|i| wanted & 1 << i == 0).map(|i| gradients[i]).collect();
                let form = Form { without, ..setting.form() };
                let some = run_as(device, &case, &form).unwrap();
                let mut expected = all.clone();
                for gradient in &form.without {
                    match gradient {
                        Gradient::X => expected.dx = None,
                        Gradient::Z => expected.dz = None,
                        Gradient::Parameters => (expected.dweight, expected.dbias) = (None, None),
                    }
                }
                assert_same(&some, &expected);
            }
        })
    });
}

/// However many threads share the work of a pass on the CPU.
#[test]
fn repeats_bit_for_bit_on_any_number_of_threads() {
    for shape in [Shape::nchw(6, 3, 64, 65), Shape::nchw(2, 70, 31, 33)] {
        for shape in [shape, shape.channels_last()] {
            let case = Case::<f32>::random(&mut Random::new(5), shape, Epilogue::AddRelu);
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| run(&common::cpu(), &case))
            };
            let alone = on(1);
            for threads in [2, 3, 8] {
                assert_same(&on(threads), &alone);
            }
        }
    }
}
