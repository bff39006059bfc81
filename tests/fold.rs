//! Folding a module into the convolution before it: the folded convolution gives what the convolution and then the module's
//! evaluation give.

mod common;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Dtype, Element, Error, Real, Shape, StateDict};
use common::{Device, Random, element, on_every_device, wide};

const IN_CHANNELS: usize = 3;

const KERNEL: usize = 3;
const SIZE: usize = 6;

/// A convolution without padding, in float64; beside each result, the sum of its terms' absolute values.
fn convolve(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<(f64, f64)> {
    let out = SIZE - KERNEL + 1;
    let mut y = Vec::new();
    for (channel, &bias) in bias.iter().enumerate() {
        for row in 0..out {
            for column in 0..out {
                let (mut sum, mut size) = (bias, bias.abs());
                for input in 0..IN_CHANNELS {
                    for (i, j) in (0..KERNEL).flat_map(|i| (0..KERNEL).map(move |j| (i, j))) {
                        let w = weight[((channel * IN_CHANNELS + input) * KERNEL + i) * KERNEL + j];
                        let term = w * x[(input * SIZE + row + i) * SIZE + column + j];
                        sum += term;
                        size += term.abs();
                    }
                }
                y.push((sum, size));
            }
        }
    }
    y
}

/// Half a unit in the last place of 1.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F64 => 2f64.powi(-53),
    }
}

struct Conv<T> {
    x: Vec<T>,
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    shape: [usize; 4],
}

fn random_conv<T: Element>(random: &mut Random, channels: usize, with_bias: bool) -> Conv<T> {
    let mut values = |len: usize| (0..len).map(|_| element::<T>(random.normal())).collect::<Vec<T>>();
    Conv {
        x: values(IN_CHANNELS * SIZE * SIZE),
        weight: values(channels * IN_CHANNELS * KERNEL * KERNEL),
        bias: with_bias.then(|| values(channels)),
        shape: [channels, IN_CHANNELS, KERNEL, KERNEL],
    }
}

fn random_state<P: Real>(random: &mut Random, channels: usize, affine: bool) -> StateDict<P> {
    let mut values = |f: fn(f64) -> f64| -> Vec<P> { (0..channels).map(|_| P::from_f64(f(random.normal()))).collect() };
    StateDict {
        weight: affine.then(|| values(|v| 1.0 + 0.5 * v)),
        bias: affine.then(|| values(|v| v)),
        running_mean: Some(values(|v| 2.0 * v)),
        running_var: Some(values(|v| 0.3 + v * v)),
        num_batches_tracked: Some(5),
    }
}

fn folded_conv_is_conv_then_norm<B: Device>(device: &B) {
    fn with<B: Device, T: Element>(device: &B, seed: u64) {
        let mut random = Random::new(seed);
        let channels = 5;
        for (affine, with_bias, eps) in [
            (true, true, 1e-5),
            (true, false, 1e-3),
            (false, true, 1e-5),
            (false, false, 0.5),
        ] {
            let state = random_state::<T::Param>(&mut random, channels, affine);
            let config = BatchNorm2dConfig::new(channels).affine(affine).eps(eps);
            let mut bn = BatchNorm2d::<B, T::Param>::new(device, config).unwrap();
            bn.load_state_dict(&state).unwrap();
            let conv = random_conv::<T>(&mut random, channels, with_bias);
            let folded = bn
                .fold_into_conv(&conv.weight, conv.shape, conv.bias.as_deref())
                .unwrap();

            let x = wide(&conv.x);
            let bias = conv.bias.as_deref().map_or(vec![0.0; channels], wide);
            let plain = convolve(&x, &wide(&conv.weight), &bias);
            let got = convolve(&x, &wide(&folded.weight), &wide(&folded.bias));

            // The module's own evaluation, in its parameter type, of the exact convolution.
            let out = SIZE - KERNEL + 1;
            let between: Vec<T::Param> = plain.iter().map(|&(sum, _)| T::Param::from_f64(sum)).collect();
            let y = bn
                .forward_eval_alloc(Shape::nchw(1, channels, out, out), &device.upload(&between).unwrap())
                .unwrap();
            let expected = wide(&device.download(&y).unwrap());

            // One rounding to the element, and a few in the parameter type, of each weight and bias.
            let relative = rounding(T::DTYPE) + 6.0 * rounding(T::Param::DTYPE);
            for (at, ((got, size), expected)) in got.into_iter().zip(expected).enumerate() {
                let channel = at / (out * out);
                let of =
                    |values: &Option<Vec<T::Param>>, absent| values.as_ref().map_or(absent, |v| v[channel].to_f64());
                let scale = of(&state.weight, 1.0) / (of(&state.running_var, 0.0) + eps).sqrt();
                let terms = size + 2.0 * (scale * of(&state.running_mean, 0.0)).abs() + of(&state.bias, 0.0).abs();
                let error = (got - expected).abs();
                assert!(
                    error <= relative * terms,
                    "{} {}: {got} for {expected}, off by {error:.1e}, allowed {:.1e}",
                    B::NAME,
                    T::DTYPE,
                    relative * terms
                );
            }
        }
    }
    with::<B, f32>(device, 1);
    with::<B, f64>(device, 2);
    with::<B, f16>(device, 3);
    with::<B, bf16>(device, 4);
}

/// Not to half precision on the way.
fn half_weights_are_rounded_once<B: Device>(device: &B) {
    let mut bn = BatchNorm2d::<B>::new(device, BatchNorm2dConfig::new(1).eps(0.0)).unwrap();
    let state = StateDict {
        weight: Some(vec![1.000_1f32]),
        bias: Some(vec![0.1]),
        running_mean: Some(vec![1000.1]),
        running_var: Some(vec![1.0]),
        num_batches_tracked: Some(1),
    };
    bn.load_state_dict(&state).unwrap();
    let weight: Vec<f16> = (0..100).map(|at| f16::from_f32(0.1 + at as f32 / 64.0)).collect();
    let bias = [f16::from_f32(1000.0)];
    let folded = bn.fold_into_conv(&weight, [1, 100, 1, 1], Some(&bias)).unwrap();
    for (folded, weight) in folded.weight.iter().zip(&weight) {
        assert_eq!(*folded, f16::from_f32(weight.to_f32() * 1.000_1));
    }
    // The mean in half precision would be 1000.
    assert_eq!(folded.bias, [f16::from_f32((1000.0f32 - 1000.1).mul_add(1.000_1, 0.1))]);
}

fn what_does_not_fit_is_refused<B: Device>(device: &B) {
    let bn = BatchNorm2d::<B>::new(device, BatchNorm2dConfig::new(4)).unwrap();
    let weight = [1.0f32; 72];
    let refused = |weight: &[f32], shape, bias: Option<&[f32]>| bn.fold_into_conv(weight, shape, bias).unwrap_err();
    // 72 values would do for 4 channels as for 8.
    assert_eq!(
        refused(&weight, [8, 1, 3, 3], None),
        Error::Argument {
            argument: "shape",
            expected: "4 output channels (num_features)".into(),
            got: "[8, 1, 3, 3]".into()
        }
    );
    for (len, shape) in [(71, [4, 2, 3, 3]), (0, [4, 0, 3, 3]), (72, [4, usize::MAX, 3, 3])] {
        let error = refused(&weight[..len], shape, None);
        assert!(matches!(error, Error::Argument { argument: "weight", .. }), "{error}");
    }
    assert_eq!(
        refused(&weight, [4, 2, 3, 3], Some(&[0.0; 3])),
        Error::VectorLength {
            argument: "bias",
            expected: 4,
            got: 3
        }
    );
    let config = BatchNorm2dConfig::new(4).track_running_stats(false);
    let bn = BatchNorm2d::<B>::new(device, config).unwrap();
    let error = bn.fold_into_conv(&weight, [4, 2, 3, 3], None).unwrap_err();
    assert_eq!(error, Error::NoRunningStatistics);
}

on_every_device!(
    folded_conv_is_conv_then_norm,
    half_weights_are_rounded_once,
    what_does_not_fit_is_refused,
);
