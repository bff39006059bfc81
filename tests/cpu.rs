//! The CPU backend at the sizes where it changes its ways: several groups of channels, parts of the batch and threads,
//! results past the caches, one value of a channel far from the others.

mod common;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Element, Epilogue, Forward, Real, Shape};
use common::{Case, Form, Random, assert_near_reference, assert_same, run, run_as};

/// Shapes beyond the thresholds of the backend's geometry, in both layouts.
fn large_shapes() -> impl Iterator<Item = Shape> {
    [
        // Few long channels; a plane that is cut; streamed.
        Shape::nchw(9, 3, 199, 201),
        // Small planes, several of which a task has.
        Shape::nchw(33, 40, 14, 14),
        Shape::nchw(40, 300, 3, 3),
        // Several groups of channels in NHWC, the last one short.
        Shape::nchw(7, 530, 9, 11),
        // One value per channel and image.
        Shape::nchw(5000, 33, 1, 1),
        // One channel.
        Shape::nchw(1, 1, 701, 303),
    ]
    .into_iter()
    .flat_map(|shape| [shape, shape.channels_last()])
}

fn agrees_with_the_reference<T: Element>(shapes: impl Iterator<Item = Shape>) {
    let mut random = Random::new(20);
    for (number, shape) in shapes.enumerate() {
        let case = Case::<T>::random(&mut random, shape, Epilogue::ALL[number / 2 % 3]);
        let case = if number % 5 == 4 { case.evaluation() } else { case };
        assert_near_reference("cpu", &case, &run(&Cpu::new(), &case));
    }
}

#[test]
fn large_f32_tensors_agree_with_the_reference() {
    agrees_with_the_reference::<f32>(large_shapes());
}

#[test]
fn large_f64_tensors_agree_with_the_reference() {
    agrees_with_the_reference::<f64>(large_shapes());
}

#[test]
fn large_half_tensors_agree_with_the_reference() {
    agrees_with_the_reference::<f16>(large_shapes().step_by(3));
    agrees_with_the_reference::<bf16>(large_shapes().skip(1).step_by(3));
}

/// Where tensors lie decides where vectors and streamed lines begin, and nothing else.
#[test]
fn addresses_change_no_bit() {
    addresses_change_nothing::<f32>();
    addresses_change_nothing::<bf16>();
}

fn addresses_change_nothing<T: Element>() {
    let mut random = Random::new(21);
    for shape in [
        Shape::nchw(9, 3, 199, 201),
        Shape::nchw(3, 20, 14, 14),
        Shape::nchw(2, 17, 5, 5),
    ] {
        for shape in [shape, shape.channels_last()] {
            let case = Case::<T>::random(&mut random, shape, Epilogue::AddRelu);
            let aligned = run(&Cpu::new(), &case);
            for offsets in [[1, 0, 0, 0, 0, 0], [3, 7, 1, 5, 11, 13], [0, 16, 8, 4, 2, 1]] {
                let form = Form {
                    offsets,
                    ..Form::default()
                };
                assert_same(&run_as(&Cpu::new(), &case, &form).unwrap(), &aligned);
            }
        }
    }
}

/// In place and past the caches at once.
#[test]
fn large_tensors_in_place() {
    let mut random = Random::new(22);
    for shape in [Shape::nchw(9, 3, 199, 201), Shape::nchw(9, 3, 199, 201).channels_last()] {
        let case = Case::<f32>::random(&mut random, shape, Epilogue::Relu);
        for case in [case.clone(), case.evaluation()] {
            let form = Form {
                forward_in_place: !case.training,
                backward_in_place: true,
                ..Form::default()
            };
            assert_same(&run_as(&Cpu::new(), &case, &form).unwrap(), &run(&Cpu::new(), &case));
        }
    }
}

/// The pivot is the channel's first element: also when that is one of the rarest.
#[test]
fn an_outlier_as_the_pivot() {
    let mut random = Random::new(23);
    for shape in [Shape::nchw(4, 2, 60, 60), Shape::nchw(4, 2, 60, 60).channels_last()] {
        let mut case = Case::<f32>::random(&mut random, shape, Epilogue::Identity);
        case.x[0] = 8.0;
        assert_near_reference("cpu", &case, &run(&Cpu::new(), &case));
    }
}

/// The variance fits the type, the sum of squared deviations does not.
#[test]
fn a_deviation_of_1e17_in_many_values() {
    for shape in [
        Shape::nchw(16, 3, 100, 100),
        Shape::nchw(16, 3, 100, 100).channels_last(),
    ] {
        let x: Vec<f32> = (0..shape.len().unwrap())
            .map(|i| if i / 3 % 2 == 0 { 1e17 } else { -1e17 })
            .collect();
        let mut module = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(3)).unwrap();
        let mut saved = module.prepare::<f32>(shape).unwrap();
        let mut y = vec![0.0; x.len()];
        module.forward_train(&x, &mut y, &mut saved).unwrap();
        for (x, y) in x.iter().zip(&y) {
            assert!((y - x.signum()).abs() < 1e-3, "{x} became {y}");
        }
    }
}

/// The largest deviations that half precision can have, and the smallest: of `bf16`, where sums are scaled, those whose variance
/// still fits, and those of subnormal numbers, where it is 0 and the mean is not.
#[test]
fn half_tensors_at_both_ends_of_their_range() {
    fn normal<T: Element>(shape: Shape, [mean, deviation]: [f64; 2]) {
        let mut random = Random::new(25);
        let mut case = Case::<T>::random(&mut random, shape, Epilogue::Identity);
        for x in &mut case.x {
            let value = mean + deviation * random.normal().clamp(-2.0, 2.0);
            *x = T::from_param(T::Param::from_f64(value));
        }
        assert_near_reference("cpu", &case, &run(&Cpu::new(), &case));
    }
    for shape in [Shape::nchw(16, 3, 80, 80), Shape::nchw(16, 3, 80, 80).channels_last()] {
        normal::<f16>(shape, [0.0, 30000.0]);
        normal::<f16>(shape, [60000.0, 500.0]);
        normal::<f16>(shape, [3e-7, 2e-7]);
        normal::<bf16>(shape, [0.0, 3.5e18]);
        normal::<bf16>(shape, [1e19, 3.5e18]);
        normal::<bf16>(shape, [3e-39, 1e-39]);
    }
}

/// A pass may be called from within a pool of the caller's, on which it then runs.
#[test]
fn called_from_within_a_pool() {
    let shape = Shape::nchw(8, 16, 56, 56);
    let case = Case::<f32>::random(&mut Random::new(24), shape, Epilogue::Identity).forward_only();
    let alone = run(&Cpu::new(), &case);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    pool.scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|_| assert_same(&run(&Cpu::new(), &case), &alone));
        }
    });
}

/// What a relu stops and what it lets through, at the places where floating-point numbers are treacherous.
#[test]
fn relu_of_special_values() {
    let mut module = BatchNorm2d::<Cpu>::new(&Cpu::new(), BatchNorm2dConfig::new(1).eps(0.0)).unwrap();
    module.bias_mut().unwrap()[0] = -0.0;
    let shape = Shape::nchw(1, 1, 1, 6);
    let x = [f32::NAN, -0.0, 0.0, f32::NEG_INFINITY, f32::INFINITY, -1e-45];
    let mut y = [7.0f32; 6];
    module
        .forward_eval_with(shape, Forward::new(&x, &mut y).relu())
        .unwrap();
    assert!(y[0].is_nan());
    assert_eq!(
        y[1..].iter().map(|y| y.to_bits()).collect::<Vec<_>>(),
        [0, 0, 0, f32::INFINITY.to_bits(), 0]
    );
}

/// What is meant to save page faults must not allocate where it need not.
#[test]
fn a_result_of_the_right_length_keeps_its_memory() {
    let shape = Shape::nchw(3, 2, 4, 5);
    let x: Vec<f32> = (0..120).map(|i| i as f32).collect();
    let mut bn: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(2)).unwrap();
    let mut saved = bn.prepare::<f32>(shape).unwrap();
    let mut y = Vec::new();
    bn.forward_train_reusing(&x, &mut y, &mut saved).unwrap();
    let expected = bn.forward_train_alloc(&x, &mut saved).unwrap();
    assert_eq!(y, expected);

    let memory = y.as_ptr();
    bn.forward_train_reusing(&x, &mut y, &mut saved).unwrap();
    bn.forward_eval_reusing(shape, &x, &mut y).unwrap();
    assert_eq!(y.as_ptr(), memory);
    assert_eq!(y, bn.forward_eval_alloc(shape, &x).unwrap());

    let fewer = Shape::nchw(1, 2, 4, 5);
    bn.forward_eval_reusing(fewer, &x[..40], &mut y).unwrap();
    assert_eq!(y, bn.forward_eval_alloc(fewer, &x[..40]).unwrap());
}
