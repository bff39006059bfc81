//! Mistakes that implementations of batch normalisation have made: one test each, named after the mistake it rules out.
//!
//! (Tensors of more than 2^31 elements are ruled on where launches are planned.)

mod common;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{Backward, BatchNorm2d, BatchNorm2dConfig, Dtype, Element, Epilogue, Error, Layout, Real, Shape};
use common::{
    Case, Device, Form, Outcome, Random, assert_near_reference, by_channel, channel_indices, element, on_every_device,
    run, run_as, wide, with_element,
};

on_every_device!(
    batch_beyond_65535_makes_an_invalid_grid,
    channels_beyond_65535_make_an_invalid_grid,
    half_values_are_multiplied_before_conversion,
    early_return_before_a_barrier,
    nhwc_statistics_are_wrong_when_channels_are_no_power_of_two,
    gradient_has_another_layout_than_the_input,
    misaligned_base_pointer,
    reduction_drops_elements_when_n_is_no_power_of_two,
    one_value_per_channel_poisons_running_var,
    running_var_takes_the_biased_variance,
    normalisation_takes_the_unbiased_variance,
    cancellation_makes_the_variance_negative,
    inverse_deviation_is_taken_for_the_variance,
    every_thread_updates_the_running_statistics,
    mean_1e4_with_deviation_0_1_loses_all_digits,
    first_values_are_taken_for_typical,
    gradient_is_that_of_a_rounded_mean,
    constant_channel_of_1e7_is_not_constant,
    deviation_1e17_overflows_the_sum_of_squares,
    relu_turns_nan_into_0,
    relu_gradient_is_multiplied_by_its_mask,
    backward_in_evaluation_takes_the_batch_statistics,
    nan_and_infinity_leave_their_channel,
    infinite_mean_of_a_long_channel_becomes_nan,
    relu_gradient_passes_where_the_result_was_rounded_to_0,
    late_values_of_a_long_channel_weigh_less,
    count_is_kept_in_f32,
    constant_channel_without_eps_is_nan,
);

fn random<T: Element>(seed: u64, shape: Shape, epilogue: Epilogue) -> Case<T> {
    Case::random(&mut Random::new(seed), shape, epilogue)
}

/// Runs a step and holds all it gives against the reference.
fn check<B: Device, T: Element>(device: &B, case: &Case<T>) -> Outcome<T> {
    let outcome = run(device, case);
    assert_near_reference(B::NAME, case, &outcome);
    outcome
}

/// A step of a module whose running statistics become those of the batch.
fn taking_over<T: Element>(mut case: Case<T>) -> Case<T> {
    case.config = case.config.momentum(1.0);
    case
}

fn both_layouts(shape: Shape) -> [Shape; 2] {
    [shape, shape.channels_last()]
}

fn batch_beyond_65535_makes_an_invalid_grid<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(65_537, 2, 1, 1)) {
        let case = random::<f32>(1, shape, Epilogue::Relu);
        check(device, &case);
        check(device, &case.evaluation());
    }
}

fn channels_beyond_65535_make_an_invalid_grid<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(2, 65_537, 1, 1)) {
        let case = random::<f32>(2, shape, Epilogue::Relu);
        check(device, &case);
        check(device, &case.evaluation());
    }
}

/// dy · (x - mean) reaches 10^5, which f16 does not hold, and has more digits than either half type.
fn half_values_are_multiplied_before_conversion<B: Device>(device: &B) {
    fn of<B: Device, T: Element>(device: &B) {
        let mut case = random::<T>(3, Shape::nchw(4, 3, 6, 7), Epilogue::Identity);
        for values in [&mut case.x, case.dy.as_mut().unwrap()] {
            values
                .iter_mut()
                .for_each(|value| *value = element(300.0 * value.to_param().to_f64()));
        }
        let outcome = check(device, &case);
        assert!(outcome.dweight.unwrap().into_iter().all(Real::is_finite));
    }
    of::<B, f16>(device);
    of::<B, bf16>(device);
}

/// Threads beyond the data still have barriers to reach: sizes about those of a warp and of a block.
fn early_return_before_a_barrier<B: Device>(device: &B) {
    for width in [2, 31, 32, 33, 63, 65, 127, 129, 255, 257, 511, 513, 1023, 1025] {
        for channels in [1, 3] {
            for shape in both_layouts(Shape::nchw(1, channels, 1, width)) {
                check(device, &random::<f32>(4, shape, Epilogue::Identity));
            }
        }
    }
}

fn nhwc_statistics_are_wrong_when_channels_are_no_power_of_two<B: Device>(device: &B) {
    for channels in [1, 3, 5, 6, 7, 12, 17, 24, 33, 48, 63, 65, 96, 100, 129, 130, 193, 257] {
        let shape = Shape::nchw(2, channels, 3, 5).channels_last();
        check(device, &taking_over(random::<f32>(5, shape, Epilogue::Identity)));
        check(device, &taking_over(random::<f16>(5, shape, Epilogue::Identity)));
    }
}

/// All four tensors of a backward pass have one order: the numbers of NHWC are those of NCHW, each at its own place.
fn gradient_has_another_layout_than_the_input<B: Device>(device: &B) {
    let nchw = random::<f32>(6, Shape::nchw(2, 6, 3, 5), Epilogue::AddRelu);
    let nhwc = nchw.in_layout(Layout::Nhwc);
    let straight = check(device, &nchw);
    let permuted = check(device, &nhwc).permuted(nhwc.shape, nchw.shape);
    for (got, want) in [(permuted.dx, straight.dx), (permuted.dz, straight.dz)] {
        for (got, want) in got.unwrap().iter().zip(want.unwrap()) {
            approx::assert_abs_diff_eq!(*got, want, epsilon = 1e-5);
        }
    }
}

/// Each tensor alone begins at an address that no vector access may have; then all at different ones.
fn misaligned_base_pointer<B: Device>(device: &B) {
    let mut all_offsets: Vec<[usize; 6]> = (0..6)
        .map(|tensor| std::array::from_fn(|i| usize::from(i == tensor)))
        .collect();
    all_offsets.extend([[1; 6], [2, 4, 8, 1, 3, 5], [4; 6], [7, 6, 5, 4, 3, 2]]);
    for dtype in Dtype::ALL {
        with_element!(dtype, T => for shape in both_layouts(Shape::nchw(2, 8, 4, 16)) {
            let case = random::<T>(7, shape, Epilogue::AddRelu);
            for offsets in &all_offsets {
                let form = Form { offsets: *offsets, ..Form::default() };
                for case in [&case, &case.clone().evaluation()] {
                    let outcome = run_as(device, case, &form).unwrap();
                    assert_near_reference(&format!("{} at {offsets:?}", B::NAME), case, &outcome);
                }
            }
        });
    }
}

/// A sum of ones counts what was summed, and a single one in an otherwise empty channel is found wherever it is.
fn reduction_drops_elements_when_n_is_no_power_of_two<B: Device>(device: &B) {
    for n in [
        2, 3, 5, 7, 31, 33, 100, 127, 129, 255, 257, 1000, 1023, 1025, 2049, 4097,
    ] {
        for shape in both_layouts(Shape::nchw(1, 2, 1, n)) {
            for spike in [0, n / 2, n - 1] {
                let mut case = taking_over(random::<f64>(8, shape, Epilogue::Identity));
                case.dy.as_mut().unwrap().fill(1.0);
                case.x.fill(0.0);
                for c in 0..2 {
                    let at = channel_indices(shape, c).nth(spike).unwrap();
                    case.x[at] = 1.0;
                }
                let outcome = run(device, &case);
                let ones = n as f64;
                for c in 0..2 {
                    assert_eq!(outcome.dbias.as_ref().unwrap()[c], ones, "{shape}");
                    let mean = outcome.state.running_mean.as_ref().unwrap()[c];
                    approx::assert_relative_eq!(mean, 1.0 / ones, max_relative = 1e-13);
                    // Σ(x - 1/n)² / (n - 1) of one 1 among zeros is 1/n again.
                    let variance = outcome.state.running_var.as_ref().unwrap()[c];
                    approx::assert_relative_eq!(variance, 1.0 / ones, max_relative = 1e-13);
                }
            }
        }
    }
}

/// n / (n - 1) is infinite for n = 1, and 0 times infinity is NaN.
fn one_value_per_channel_poisons_running_var<B: Device>(device: &B) {
    let shape = Shape::nchw(1, 3, 1, 1);
    let mut module = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(3)).unwrap();
    let mut saved = module.prepare::<f32>(shape).unwrap();
    let x = device.upload(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut y = device.zeros::<f32>(3).unwrap();
    let before = module.state_dict().unwrap();
    let refused = module.forward_train(&x, &mut y, &mut saved).unwrap_err();
    assert_eq!(refused, Error::OneValuePerChannel { shape });
    assert_eq!(
        refused.to_string(),
        "expected more than 1 value per channel when training, got input size [1, 3, 1, 1]"
    );
    assert_eq!(module.state_dict().unwrap(), before);
}

fn running_var_takes_the_biased_variance<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(1, 1, 1, 2)) {
        let mut case = taking_over(random::<f32>(9, shape, Epilogue::Identity));
        case.x = vec![-1.0, 1.0];
        // Two values at distance 1 from their mean: 1 if divided by 2, 2 if divided by 1.
        let outcome = check(device, &case);
        assert_eq!(outcome.state.running_var.unwrap(), [2.0]);
        approx::assert_relative_eq!(outcome.save_invstd.unwrap()[0], 1.0, max_relative = 1e-5);
    }
}

/// The numbers that PyTorch prints for 0..48.
fn normalisation_takes_the_unbiased_variance<B: Device>(device: &B) {
    let shape = Shape::nchw(1, 3, 4, 4);
    let mut module = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(3)).unwrap();
    let mut saved = module.prepare::<f32>(shape).unwrap();
    let x = device.upload(&Vec::from_iter((0..48u8).map(f32::from))).unwrap();
    let y = module.forward_train_alloc(&x, &mut saved).unwrap();
    let y = device.download(&y).unwrap();
    for (got, want) in y.iter().zip([-1.6270, -1.4100, -1.1931]) {
        approx::assert_abs_diff_eq!(*got, want, epsilon = 5e-5);
    }
}

/// E[x²] - E[x]² of nearly equal large numbers may come out below 0, and its root NaN.
fn cancellation_makes_the_variance_negative<B: Device>(device: &B) {
    for (seed, centre) in [4097.3, 1e6 + 0.1, -33_333.3, 0.1].into_iter().enumerate() {
        for shape in both_layouts(Shape::nchw(3, 4, 7, 9)) {
            let mut case = taking_over(random::<f32>(seed as u64, shape, Epilogue::Identity));
            case.config = case.config.eps(1e-12);
            // Channel 0 is constant, the others have a unit in the last place here and there.
            let mut choose = Random::new(seed as u64);
            let centre = centre as f32;
            case.x = by_channel(shape, |c| match c > 0 && choose.below(3) == 0 {
                true => centre.next_up().into(),
                false => centre.into(),
            });
            let outcome = check(device, &case);
            assert_eq!(outcome.state.running_var.as_ref().unwrap()[0], 0.0, "{shape}");
            assert!(
                outcome
                    .state
                    .running_var
                    .unwrap()
                    .iter()
                    .all(|&variance| variance >= 0.0)
            );
            assert!(outcome.save_invstd.unwrap().iter().all(|invstd| invstd.is_finite()));
        }
    }
}

fn inverse_deviation_is_taken_for_the_variance<B: Device>(device: &B) {
    // -2 and 2: variance 4, its inverse root 0.5; of 2 values the unbiased variance is 8.
    let shape = Shape::nchw(2, 1, 1, 1);
    let mut case = taking_over(random::<f64>(10, shape, Epilogue::Identity));
    case.config = case.config.eps(0.0);
    case.x = vec![-2.0, 2.0];
    let outcome = check(device, &case);
    assert_eq!(outcome.save_invstd.unwrap(), [0.5]);
    assert_eq!(outcome.state.running_var.unwrap(), [8.0]);

    // In evaluation running_var is a variance, forward and backward.
    let mut case = case.evaluation();
    case.state.weight = Some(vec![1.0]);
    case.state.bias = Some(vec![0.0]);
    case.state.running_mean = Some(vec![0.0]);
    case.state.running_var = Some(vec![16.0]);
    case.dy = Some(vec![4.0, 8.0]);
    let outcome = check(device, &case);
    assert_eq!(outcome.y, [-0.5, 0.5]);
    assert_eq!(outcome.dx.unwrap(), [1.0, 2.0]);
}

/// In a channel that many blocks share, the step is still one step.
fn every_thread_updates_the_running_statistics<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(8, 2, 32, 33)) {
        let case = random::<f32>(11, shape, Epilogue::Identity).forward_only();
        let outcome = check(device, &case);
        assert_eq!(outcome.state.num_batches_tracked, Some(8));
    }
}

fn mean_1e4_with_deviation_0_1_loses_all_digits<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(4, 3, 16, 17)) {
        let mut case = random::<f32>(12, shape, Epilogue::Identity);
        let mut numbers = Random::new(12);
        case.x = by_channel(shape, |_| 1e4 + 0.1 * numbers.normal());
        let outcome = check(device, &case);
        // Beyond the scaled error, which forgives what a large mean costs: the digits are there.
        let want = common::reference(&case).0.y.unwrap();
        let greatest = want.iter().fold(0.0f64, |greatest, y| greatest.max(y.abs()));
        for (got, want) in wide(&outcome.y).into_iter().zip(want) {
            approx::assert_abs_diff_eq!(got, want, epsilon = 1e-6 * greatest);
        }
    }
}

/// The mean lies between two numbers of the type, which are as far apart as half of a deviation: no gradient may be taken from
/// one of them. And dy has a mean, so that the distance is counted once for every value.
fn gradient_is_that_of_a_rounded_mean<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(4, 3, 16, 17)) {
        let mut case = random::<f32>(24, shape, Epilogue::Identity);
        let mut numbers = Random::new(24);
        case.x = by_channel(shape, |_| 1e6 + 0.13 * numbers.normal());
        case.dy = Some(by_channel(shape, |_| 1.0 + numbers.normal()));
        let outcome = check(device, &case);
        let want = common::reference(&case).0;
        for (got, want, digits) in [
            (wide(&outcome.y), want.y, 1e-6),
            (wide(&outcome.dx.unwrap()), want.dx, 1e-5),
            (wide(&outcome.dweight.unwrap()), want.dweight, 1e-4),
        ] {
            let want = want.unwrap();
            let greatest = want.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
            for (got, want) in got.into_iter().zip(want) {
                approx::assert_abs_diff_eq!(got, want, epsilon = digits * greatest);
            }
        }
    }
}

/// Squares of distances from a channel's first value, or from the mean of its first few hundred, say little of the variance where
/// all the others are far away: what is taken off them leaves no digits.
fn first_values_are_taken_for_typical<B: Device>(device: &B) {
    const UNLIKE: f64 = 1e4;
    // Planes of the second begin anywhere in a vector, and threads of a GPU with vectors that have nothing of theirs.
    let shapes = [
        Shape::nchw(5, 3, 65, 67),
        Shape::nchw(400, 3, 5, 10),
        Shape::nchw(32, 2, 3, 43),
    ]
    .map(both_layouts);
    for shape in shapes.into_iter().flatten() {
        let n = shape.values_per_channel().unwrap();
        for unlike in [1, 8, 300, n / 2] {
            let mut case = taking_over(random::<f32>(23, shape, Epilogue::Identity)).forward_only();
            let mut numbers = Random::new(23);
            case.x = by_channel(shape, |_| numbers.normal());
            for c in 0..shape.channels {
                for i in channel_indices(shape, c).take(unlike) {
                    case.x[i] = UNLIKE as f32;
                }
            }
            let outcome = run(device, &case);
            for c in 0..shape.channels {
                let channel: Vec<f64> = channel_indices(shape, c).map(|i| case.x[i].into()).collect();
                let mean = channel.iter().sum::<f64>() / n as f64;
                let variance = channel.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
                let got = f64::from(outcome.state.running_var.as_ref().unwrap()[c]);
                approx::assert_relative_eq!(got, variance, max_relative = 2e-6);
                // The mean is found and kept as a distance from the first value, and has the digits of that.
                let got = f64::from(outcome.state.running_mean.as_ref().unwrap()[c]);
                approx::assert_abs_diff_eq!(got, mean, epsilon = 2.0 * UNLIKE * f64::from(f32::EPSILON));
            }
        }
    }
}

/// And more than 10^6 of it, where a sum in f32 has no digit left. (Of 0.01 and the like the mean is small beside the deviation
/// that eps makes of none.)
fn constant_channel_of_1e7_is_not_constant<B: Device>(device: &B) {
    for (channels, plane, value) in [(2, 1021, 1e7), (64, 7, 0.01)] {
        for shape in both_layouts(Shape::nchw(1, channels, plane, plane)) {
            let mut case = random::<f32>(13, shape, Epilogue::Identity).forward_only();
            let constant = |c: usize| value * (1.0 + c as f32 / 64.0);
            case.x = by_channel(shape, |c| constant(c).into());
            // Beside another bias much that is wrong is rounded away.
            case.state.bias.as_mut().unwrap()[0..channels / 2].fill(0.0);
            let outcome = run(device, &case);
            let bias = case.state.bias.as_ref().unwrap();
            for (c, &bias) in bias.iter().enumerate() {
                assert!(channel_indices(shape, c).all(|i| outcome.y[i] == bias), "{shape}");
                assert_eq!(outcome.save_mean.as_ref().unwrap()[c], constant(c));
                let invstd = f64::from(outcome.save_invstd.as_ref().unwrap()[c]);
                approx::assert_relative_eq!(invstd, 1.0 / case.config.eps.sqrt(), max_relative = 1e-6);
            }
        }
    }
}

/// 0 / 0: PyTorch takes 0 for 1 / sqrt(0), so that y is the bias and no gradient passes.
fn constant_channel_without_eps_is_nan<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(2, 3, 5, 7)) {
        let mut case = random::<f32>(31, shape, Epilogue::Identity);
        case.config = case.config.eps(0.0);
        case.x.fill(0.1);
        let outcome = run(device, &case);
        let bias = case.state.bias.as_ref().unwrap();
        for (c, &bias) in bias.iter().enumerate() {
            assert!(channel_indices(shape, c).all(|i| outcome.y[i] == bias), "{shape}");
        }
        assert_eq!(outcome.save_invstd, Some(vec![0.0; 3]));
        assert!(outcome.dx.unwrap().iter().all(|&dx| dx == 0.0));
    }
}

/// The variance, 1e34, fits f32 well; 10^5 times as much does not. And of 1e37 not even 30 times as much does: no few values
/// may be summed up first either.
fn deviation_1e17_overflows_the_sum_of_squares<B: Device>(device: &B) {
    let shapes = both_layouts(Shape::nchw(1, 2, 317, 317));
    for (shape, deviation) in shapes.into_iter().flat_map(|shape| [(shape, 1e17), (shape, 3.5e18)]) {
        let mut case = taking_over(random::<f32>(14, shape, Epilogue::Identity));
        let mut numbers = Random::new(14);
        case.x = by_channel(shape, |_| deviation * numbers.normal());
        let n = shape.values_per_channel().unwrap() as f64;
        assert!(
            n * deviation * deviation > f32::MAX.into(),
            "too few values to overflow"
        );
        check(device, &case);
    }
}

/// NaN is no number below 0, forward and backward.
fn relu_turns_nan_into_0<B: Device>(device: &B) {
    for dtype in Dtype::ALL {
        with_element!(dtype, T => for shape in both_layouts(Shape::nchw(2, 3, 3, 5)) {
            for epilogue in [Epilogue::Relu, Epilogue::AddRelu] {
                let mut case = random::<T>(15, shape, epilogue);
                let spoilt = channel_indices(shape, 1).nth(7).unwrap();
                case.x[spoilt] = element(f64::NAN);

                let trained = check(device, &case).values();
                let dy = wide(case.dy.as_ref().unwrap());
                for i in channel_indices(shape, 1) {
                    assert!(trained.y.as_ref().unwrap()[i].is_nan());
                    if let Some(dz) = &trained.dz {
                        assert_eq!(dz[i], dy[i], "the gradient passes where relu gave NaN");
                    }
                }
                let all_of_dy = common::sum(channel_indices(shape, 1).map(|i| dy[i]));
                approx::assert_abs_diff_eq!(trained.dbias.unwrap()[1], all_of_dy, epsilon = 1e-5);

                let evaluated = check(device, &case.evaluation()).values();
                let nan: Vec<usize> = (0..evaluated.y.as_ref().unwrap().len())
                    .filter(|&i| evaluated.y.as_ref().unwrap()[i].is_nan())
                    .collect();
                assert_eq!(nan, [spoilt]);
            }
        });
    }
}

/// Where relu stops the gradient nothing comes through: 0 times NaN would.
fn relu_gradient_is_multiplied_by_its_mask<B: Device>(device: &B) {
    for epilogue in [Epilogue::Relu, Epilogue::AddRelu] {
        for shape in both_layouts(Shape::nchw(2, 3, 4, 5)) {
            let mut case = random::<f32>(16, shape, epilogue);
            for not_finite in [f32::NAN, f32::INFINITY] {
                for case in [case.clone(), case.clone().evaluation()] {
                    let mut case = case;
                    let (want, _) = common::reference(&case);
                    let dy = case.dy.as_mut().unwrap();
                    for (dy, y) in dy.iter_mut().zip(want.y.unwrap()) {
                        if y == 0.0 {
                            *dy = not_finite;
                        }
                    }
                    let outcome = check(device, &case);
                    assert!(outcome.dx.unwrap().iter().all(|dx| dx.is_finite()));
                    assert!(outcome.dbias.unwrap().iter().all(|dbias| dbias.is_finite()));
                }
            }
            // Nor does it where relu is given exactly 0.
            case.state.weight.as_mut().unwrap()[2] = 0.0;
            case.state.bias.as_mut().unwrap()[2] = 0.0;
            case.z.iter_mut().for_each(|z| z.fill(0.0));
            let outcome = check(device, &case);
            assert_eq!(outcome.dbias.unwrap()[2], 0.0);
        }
    }
}

fn backward_in_evaluation_takes_the_batch_statistics<B: Device>(device: &B) {
    for epilogue in Epilogue::ALL {
        for shape in both_layouts(Shape::nchw(2, 5, 4, 3)) {
            let case = random::<f32>(17, shape, epilogue).evaluation();
            let outcome = check(device, &case);
            // No gradient goes through the statistics, so each dx is a multiple of its own dy.
            let values = outcome.values();
            let (weight, var) = (
                case.state.weight.as_ref().unwrap(),
                case.state.running_var.as_ref().unwrap(),
            );
            for c in 0..shape.channels {
                let factor = f64::from(weight[c]) / (f64::from(var[c]) + case.config.eps).sqrt();
                for i in channel_indices(shape, c) {
                    let stopped = epilogue != Epilogue::Identity && outcome.y[i] <= 0.0;
                    let dy = if stopped {
                        0.0
                    } else {
                        case.dy.as_ref().unwrap()[i].into()
                    };
                    let dx = values.dx.as_ref().unwrap()[i];
                    approx::assert_relative_eq!(dx, factor * dy, max_relative = 1e-6);
                }
            }
        }
    }
}

fn nan_and_infinity_leave_their_channel<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(3, 9, 5, 7)) {
        for not_finite in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // At the first place of a channel as well, where the pivot is taken.
            for place in [0, 1, 50, 104] {
                for in_dy in [false, true] {
                    let clean = random::<f32>(18, shape, Epilogue::Identity);
                    let mut case = clean.clone();
                    let at = channel_indices(shape, 4).nth(place).unwrap();
                    match in_dy {
                        true => case.dy.as_mut().unwrap()[at] = not_finite,
                        false => case.x[at] = not_finite,
                    }
                    let (spoilt, clean) = (run(device, &case), run(device, &clean));
                    if !in_dy {
                        assert_near_reference(B::NAME, &case, &spoilt);
                    }
                    let (spoilt, clean) = (spoilt.values(), clean.values());
                    for ((name, spoilt), (_, clean)) in spoilt.tensors().into_iter().zip(clean.tensors()) {
                        let (Some(spoilt), Some(clean)) = (spoilt, clean) else {
                            continue;
                        };
                        for c in (0..9).filter(|&c| c != 4) {
                            let addresses: Vec<usize> = match spoilt.len() {
                                9 => vec![c],
                                _ => channel_indices(shape, c).collect(),
                            };
                            assert!(
                                addresses.iter().all(|&i| spoilt[i] == clean[i]),
                                "{name} of channel {c}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Where partial results meet, infinity less infinity must not come up: the mean is infinite, and only the variance NaN.
fn infinite_mean_of_a_long_channel_becomes_nan<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(2, 2, 150, 160)) {
        for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
            for places in [&[0][..], &[1], &[24_000], &[47_999], &[0, 13_000, 24_000, 40_000]] {
                let mut case = random::<f32>(21, shape, Epilogue::Identity).forward_only();
                let channel: Vec<usize> = channel_indices(shape, 1).collect();
                places.iter().for_each(|&place| case.x[channel[place]] = infinity);
                let outcome = check(device, &case);
                assert_eq!(outcome.save_mean.unwrap()[1], infinity, "{shape}, at {places:?}");
            }
        }
    }
}

/// y as it was stored decides, not as it was before rounding: forward and backward must mean the same elements.
fn relu_gradient_passes_where_the_result_was_rounded_to_0<B: Device>(device: &B) {
    for shape in both_layouts(Shape::nchw(2, 3, 12, 15)) {
        for epilogue in [Epilogue::Relu, Epilogue::AddRelu] {
            for evaluation in [false, true] {
                let mut case = random::<f16>(22, shape, epilogue);
                // Results about the least number of f16, 6e-8, of which half of the positive ones are rounded to 0.
                case.state.weight.as_mut().unwrap().fill(4e-8);
                case.state.bias.as_mut().unwrap().fill(0.0);
                case.z.iter_mut().for_each(|z| z.fill(f16::ZERO));
                case.dy.as_mut().unwrap().fill(f16::ONE);
                let case = if evaluation { case.evaluation() } else { case };
                let outcome = run(device, &case);
                let exact = common::reference(&case).0.y.unwrap();
                for c in 0..shape.channels {
                    let count =
                        |positive: &dyn Fn(usize) -> bool| channel_indices(shape, c).filter(|&i| positive(i)).count();
                    let stored = count(&|i| outcome.y[i] > f16::ZERO);
                    assert!(stored < count(&|i| exact[i] > 0.0), "nothing was rounded to 0");
                    assert_eq!(outcome.dbias.as_ref().unwrap()[c], stored as f32, "{shape}");
                }
            }
        }
    }
}

/// One channel of more than 10^6 values, each of which must weigh as much as the others.
fn late_values_of_a_long_channel_weigh_less<B: Device>(device: &B) {
    let (height, width) = (1031, 1033);
    for shape in both_layouts(Shape::nchw(1, 1, height, width)) {
        let mut case = taking_over(random::<f32>(19, shape, Epilogue::Identity));
        // The second half differs: a mean that forgets or slights the late values shows.
        let half = case.x.len() / 2;
        case.x[half..].iter_mut().for_each(|x| *x += 3.0);
        check(device, &case);
    }
    let shape = Shape::nchw(1, 1, height, width);
    check(device, &taking_over(random::<f16>(20, shape, Epilogue::Relu)));
}

/// f32 counts to 2^24 and no further; two thirds of these values are zeros, and a third, counted last, ones.
fn count_is_kept_in_f32<B: Device>(device: &B) {
    const N: usize = 3 << 23;
    for shape in both_layouts(Shape::nchw(3, 1, 1 << 11, 1 << 12)) {
        let mut module = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(1).momentum(1.0)).unwrap();
        let mut saved = module.prepare::<f16>(shape).unwrap();
        let mut values = vec![f16::ZERO; N];
        values[2 << 23..].fill(f16::ONE);
        let x = device.upload(&values).unwrap();
        module.forward_train_alloc(&x, &mut saved).unwrap();
        let state = module.state_dict().unwrap();
        approx::assert_relative_eq!(state.running_mean.unwrap()[0], 1.0 / 3.0, max_relative = 1e-6);
        approx::assert_relative_eq!(state.running_var.unwrap()[0], 2.0 / 9.0, max_relative = 1e-6);

        // A gradient of ones counts the values once more.
        let mut gradients = module.gradients().unwrap();
        let ones = device.upload(&vec![f16::ONE; N]).unwrap();
        module
            .backward_with(Backward::new(&x, &ones).parameters(&mut gradients), &mut saved)
            .unwrap();
        assert_eq!(B::download(device, &gradients.bias).unwrap(), [N as f32]);
    }
}
