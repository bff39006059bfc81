//! Bad input: the error says which argument, what was expected and what came, and nothing has changed.

mod common;

use batchnorm_cuda::half::f16;
use batchnorm_cuda::{
    Backward, BatchNorm2d, BatchNorm2dConfig, Epilogue, Error, Forward, Gradients, Momentum, Result, Saved, Shape,
    StateDict,
};
use common::{Case, Device, Random, on_every_device, reference};

on_every_device!(
    length_differs_from_the_shape,
    gradient_vectors_have_another_length,
    channels_differ_from_num_features,
    dimensions_overflow,
    dimensions_are_zero,
    one_value_per_channel,
    config_is_no_config,
    saved_is_for_another_shape,
    saved_is_for_another_epilogue,
    saved_is_empty,
    statistics_are_missing,
    statistics_are_there,
    parameters_are_missing,
    training_in_place,
    residual_gradient_without_residual,
    empty_batch_is_no_bad_input,
);

const SHAPE: Shape = Shape::nchw(2, 3, 4, 2);
const LEN: usize = 48;

/// A module in the midst of its work, with everything a call may touch.
struct World<B: Device> {
    device: B,
    module: BatchNorm2d<B>,
    saved: Saved<B, f32>,
    saved_add_relu: Saved<B, f32>,
    x: B::Buffer<f32>,
    y: B::Buffer<f32>,
    z: B::Buffer<f32>,
    dy: B::Buffer<f32>,
    dx: B::Buffer<f32>,
    dz: B::Buffer<f32>,
    gradients: Gradients<B, f32>,
}

/// Everything that a refused call must leave as it was.
type Snapshot = (StateDict<f32>, Vec<(&'static str, Vec<f32>)>);

impl<B: Device> World<B> {
    fn new(device: &B) -> Self {
        Self::of(device, BatchNorm2dConfig::new(SHAPE.channels))
    }

    fn of(device: &B, config: BatchNorm2dConfig) -> Self {
        let case = Case::<f32>::random(&mut Random::new(1), SHAPE, Epilogue::AddRelu)
            .affine(config.affine)
            .track_running_stats(config.track_running_stats);
        let upload = |values: &[f32]| device.upload(values).unwrap();
        let mut module = BatchNorm2d::new(device, config).unwrap();
        module.load_state_dict(&case.state).unwrap();
        let mut world = Self {
            device: device.clone(),
            saved: module.prepare(SHAPE).unwrap(),
            saved_add_relu: module.prepare_fused(SHAPE, Epilogue::AddRelu).unwrap(),
            module,
            x: upload(&case.x),
            y: upload(&[5.0; LEN]),
            z: upload(case.z.as_ref().unwrap()),
            dy: upload(case.dy.as_ref().unwrap()),
            dx: upload(&[6.0; LEN]),
            dz: upload(&[7.0; LEN]),
            gradients: Gradients {
                weight: upload(&[8.0; 3]),
                bias: upload(&[9.0; 3]),
            },
        };
        let w = &mut world;
        w.module.forward_train(&w.x, &mut w.y, &mut w.saved).unwrap();
        let fused = Forward::new(&w.x, &mut w.y).add_relu(&w.z);
        w.module.forward_train_with(fused, &mut w.saved_add_relu).unwrap();
        world
    }

    fn snapshot(&self) -> Snapshot {
        let buffers = [
            ("x", &self.x),
            ("y", &self.y),
            ("z", &self.z),
            ("dy", &self.dy),
            ("dx", &self.dx),
            ("dz", &self.dz),
            ("gradients.weight", &self.gradients.weight),
            ("gradients.bias", &self.gradients.bias),
        ];
        let mut values: Vec<_> = buffers
            .map(|(name, buffer)| (name, B::download(&self.device, buffer).unwrap()))
            .into();
        for saved in [&self.saved, &self.saved_add_relu] {
            values.push(("saved.mean", saved.mean().unwrap()));
            values.push(("saved.invstd", saved.invstd().unwrap()));
        }
        (self.module.state_dict().unwrap(), values)
    }

    /// Makes a call that must fail with this error and change nothing.
    #[track_caller]
    fn refuses<R>(&mut self, expected: Error, call: impl FnOnce(&mut Self) -> Result<R>) {
        let before = self.snapshot();
        let refused = call(self)
            .err()
            .unwrap_or_else(|| panic!("accepted, not refused: {expected}"));
        assert_eq!(refused, expected);
        assert_eq!(
            self.snapshot(),
            before,
            "changed by a call that was refused: {expected}"
        );
    }
}

fn length(argument: &'static str, got: usize) -> Error {
    Error::Length {
        argument,
        shape: SHAPE,
        expected: LEN,
        got,
    }
}

/// The backward pass of training or of evaluation: both look at their operands.
fn backward_pass<B: Device>(
    evaluation: bool,
    module: &BatchNorm2d<B>,
    backward: Backward<'_, B, f32>,
    saved: &mut Saved<B, f32>,
) -> Result<()> {
    match evaluation {
        false => module.backward_with(backward, saved),
        true => module.backward_eval_with(backward, saved),
    }
}

fn length_differs_from_the_shape<B: Device>(device: &B) {
    let mut world = World::new(device);
    for got in [0, 1, LEN - 1, LEN + 1, 2 * LEN] {
        let mut wrong = device.zeros::<f32>(got).unwrap();

        world.refuses(length("x", got), |w| {
            w.module.forward_train(&wrong, &mut w.y, &mut w.saved)
        });
        world.refuses(length("y", got), |w| {
            w.module.forward_train(&w.x, &mut wrong, &mut w.saved)
        });
        world.refuses(length("z", got), |w| {
            let forward = Forward::new(&w.x, &mut w.y).add_relu(&wrong);
            w.module.forward_train_with(forward, &mut w.saved_add_relu)
        });

        world.refuses(length("x", got), |w| w.module.forward_eval(SHAPE, &wrong, &mut w.y));
        world.refuses(length("y", got), |w| w.module.forward_eval(SHAPE, &w.x, &mut wrong));
        world.refuses(length("x", got), |w| w.module.forward_eval_in_place(SHAPE, &mut wrong));
        world.refuses(length("z", got), |w| {
            w.module
                .forward_eval_with(SHAPE, Forward::new(&w.x, &mut w.y).add_relu(&wrong))
        });

        for evaluation in [false, true] {
            world.refuses(length("x", got), |w| {
                let backward = Backward::new(&wrong, &w.dy).dx(&mut w.dx).parameters(&mut w.gradients);
                backward_pass(evaluation, &w.module, backward, &mut w.saved)
            });
            world.refuses(length("dy", got), |w| {
                let backward = Backward::new(&w.x, &wrong).dx(&mut w.dx).parameters(&mut w.gradients);
                backward_pass(evaluation, &w.module, backward, &mut w.saved)
            });
            world.refuses(length("dx", got), |w| {
                let backward = Backward::new(&w.x, &w.dy).dx(&mut wrong).parameters(&mut w.gradients);
                backward_pass(evaluation, &w.module, backward, &mut w.saved)
            });
            world.refuses(length("dy", got), |w| {
                let backward = Backward::in_place(&w.x, &mut wrong).parameters(&mut w.gradients);
                backward_pass(evaluation, &w.module, backward, &mut w.saved)
            });
            world.refuses(length("dy", got), |w| {
                let backward = Backward::new(&w.x, &wrong).parameters(&mut w.gradients);
                backward_pass(evaluation, &w.module, backward, &mut w.saved)
            });
            world.refuses(length("y", got), |w| {
                let backward = Backward::new(&w.x, &w.dy)
                    .dx(&mut w.dx)
                    .add_relu(&wrong)
                    .dz(&mut w.dz)?;
                backward_pass(evaluation, &w.module, backward, &mut w.saved_add_relu)
            });
            world.refuses(length("dz", got), |w| {
                let backward = Backward::new(&w.x, &w.dy).dx(&mut w.dx).add_relu(&w.y).dz(&mut wrong)?;
                backward_pass(evaluation, &w.module, backward, &mut w.saved_add_relu)
            });
        }
    }
}

fn gradient_vectors_have_another_length<B: Device>(device: &B) {
    let mut world = World::new(device);
    for got in [0, 2, 4] {
        for argument in ["gradients.weight", "gradients.bias"] {
            let expected = Error::VectorLength {
                argument,
                expected: 3,
                got,
            };
            let mut wrong = world.module.gradients().unwrap();
            match argument {
                "gradients.weight" => wrong.weight = device.zeros(got).unwrap(),
                _ => wrong.bias = device.zeros(got).unwrap(),
            }
            world.refuses(expected.clone(), |w| {
                w.module.backward(&w.x, &w.dy, &mut w.saved, &mut w.dx, &mut wrong)
            });
            world.refuses(expected, |w| {
                let backward = Backward::in_place(&w.x, &mut w.dy).accumulate_parameters(&mut wrong);
                w.module.backward_eval_with(backward, &mut w.saved)
            });
        }
    }
}

fn channels_differ_from_num_features<B: Device>(device: &B) {
    let mut world = World::new(device);
    for channels in [1, 2, 4, 6] {
        let shape = Shape::nchw(2, channels, 4, 2);
        let wrong = device.zeros::<f32>(shape.len().unwrap()).unwrap();
        let expected = Error::Channels { shape, expected: 3 };
        world.refuses(expected.clone(), |w| w.module.prepare::<f32>(shape));
        world.refuses(expected.clone(), |w| {
            w.module.prepare_fused::<f16>(shape, Epilogue::Relu)
        });
        world.refuses(expected.clone(), |w| {
            w.module.prepare_eval::<f32>(shape, Epilogue::Identity)
        });
        world.refuses(expected.clone(), |w| w.module.forward_eval(shape, &wrong, &mut w.y));
        world.refuses(expected, |w| w.module.forward_eval_alloc(shape, &wrong));
    }
}

fn dimensions_overflow<B: Device>(device: &B) {
    let mut world = World::new(device);
    let most = usize::MAX;
    let shapes = [
        Shape::nchw(most, 3, 1, 1),
        Shape::nchw(most / 3 + 1, 3, 1, 1),
        Shape::nchw(1, 3, most / 2, 2).channels_last(),
        Shape::nchw(1 << 31, 3, 1 << 31, 1 << 31),
        // The number of elements fits, their bytes do not.
        Shape::nchw(1 << 30, 3, 1 << 15, 1 << 15),
        // No elements at all, of which the others are too many.
        Shape::nchw(0, 3, most, 2),
    ];
    for shape in shapes {
        let expected = Error::ShapeOverflow { shape };
        assert_eq!(shape.len(), Err(expected.clone()));
        world.refuses(expected.clone(), |w| w.module.prepare::<f32>(shape));
        world.refuses(expected.clone(), |w| {
            w.module.prepare_eval::<f16>(shape, Epilogue::AddRelu)
        });
        world.refuses(expected.clone(), |w| w.module.forward_eval(shape, &w.x, &mut w.y));
        world.refuses(expected.clone(), |w| w.module.forward_eval_in_place(shape, &mut w.x));
        world.refuses(expected, |w| w.module.forward_eval_alloc(shape, &w.x));
    }
}

fn dimensions_are_zero<B: Device>(device: &B) {
    let mut world = World::new(device);
    for (channels, height, width) in [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)] {
        for batch in [0, 2] {
            let shape = Shape::nchw(batch, channels, height, width);
            let mut empty = device.zeros::<f32>(0).unwrap();
            let expected = Error::EmptyDimension { shape };
            world.refuses(expected.clone(), |w| w.module.prepare::<f32>(shape));
            world.refuses(expected.clone(), |w| {
                w.module.prepare_eval::<f32>(shape, Epilogue::Relu)
            });
            world.refuses(expected.clone(), |w| w.module.forward_eval(shape, &w.x, &mut w.y));
            world.refuses(expected, |w| w.module.forward_eval_in_place(shape, &mut empty));
        }
    }
}

fn one_value_per_channel<B: Device>(device: &B) {
    let shape = Shape::nchw(1, 3, 1, 1);
    let expected = Error::OneValuePerChannel { shape };
    let one = device.upload(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut y = device.upload(&[4.0f32; 3]).unwrap();

    let mut world = World::new(device);
    let mut saved = world.module.prepare::<f32>(shape).unwrap();
    world.refuses(expected.clone(), |w| w.module.forward_train(&one, &mut y, &mut saved));

    // PyTorch's F.batch_norm asks the same wherever the batch's statistics are used.
    let mut world = World::of(device, BatchNorm2dConfig::new(3).track_running_stats(false));
    let mut saved = world.module.prepare::<f32>(shape).unwrap();
    world.refuses(expected.clone(), |w| w.module.forward_train(&one, &mut y, &mut saved));
    world.refuses(expected.clone(), |w| {
        w.module
            .forward_eval_batch_statistics(Forward::new(&one, &mut y), &mut saved)
    });

    assert_eq!(B::download(device, &y).unwrap(), [4.0; 3]);
    assert_eq!(saved.mean(), Err(Error::SavedEmpty));
    assert_eq!(
        expected.to_string(),
        "expected more than 1 value per channel when training, got input size [1, 3, 1, 1]"
    );
}

fn config_is_no_config<B: Device>(device: &B) {
    let refused = |config| BatchNorm2d::<B, f32>::new(device, config).err();
    let config = BatchNorm2dConfig::new(3);
    assert_eq!(refused(BatchNorm2dConfig::new(0)), Some(Error::NoFeatures));
    for eps in [-1e-30, -1.0, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(refused(config.clone().eps(eps)), Some(Error::Eps { eps }));
    }
    assert!(matches!(refused(config.clone().eps(f64::NAN)), Some(Error::Eps { eps }) if eps.is_nan()));
    for momentum in [f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(
            refused(config.clone().momentum(momentum)),
            Some(Error::Momentum { momentum })
        );
    }
    assert!(matches!(
        refused(config.clone().momentum(f64::NAN)),
        Some(Error::Momentum { momentum }) if momentum.is_nan()
    ));

    // What looks odd, and PyTorch takes.
    for config in [
        config.clone().eps(0.0),
        config.clone().momentum(0.0),
        config.clone().momentum(-0.5),
        config.clone().momentum(1.5),
        config.momentum(Momentum::CumulativeAverage),
    ] {
        assert_eq!(refused(config), None);
    }
}

/// `saved` says what shape a call has: operands of another one have the wrong length, and a module of other channels is
/// the wrong module.
fn saved_is_for_another_shape<B: Device>(device: &B) {
    let mut world = World::new(device);
    let other = Shape::nchw(2, 3, 4, 4);
    let mut saved = world.module.prepare::<f32>(other).unwrap();
    let expected = |argument| Error::Length {
        argument,
        shape: other,
        expected: 2 * LEN,
        got: LEN,
    };
    world.refuses(expected("x"), |w| w.module.forward_train(&w.x, &mut w.y, &mut saved));
    world.refuses(expected("x"), |w| {
        w.module
            .backward_eval_with(Backward::new(&w.x, &w.dy).dx(&mut w.dx), &mut saved)
    });

    let five = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(5)).unwrap();
    let of_five = Shape::nchw(2, 5, 4, 2);
    let mut saved = five.prepare::<f32>(of_five).unwrap();
    let expected = Error::SavedMismatch {
        what: "shape",
        expected: "[2, 5, 4, 2]".into(),
        got: "a module of 3 channels".into(),
    };
    world.refuses(expected.clone(), |w| w.module.forward_train(&w.x, &mut w.y, &mut saved));
    world.refuses(expected.clone(), |w| {
        w.module.backward(&w.x, &w.dy, &mut saved, &mut w.dx, &mut w.gradients)
    });
    world.refuses(expected, |w| {
        w.module
            .backward_eval_with(Backward::new(&w.x, &w.dy).dx(&mut w.dx), &mut saved)
    });
}

fn saved_is_for_another_epilogue<B: Device>(device: &B) {
    let mismatch = |expected: &str, got: &str| Error::SavedMismatch {
        what: "epilogue",
        expected: expected.into(),
        got: got.into(),
    };
    let mut world = World::new(device);
    world.refuses(mismatch("none", "relu"), |w| {
        w.module
            .forward_train_with(Forward::new(&w.x, &mut w.y).relu(), &mut w.saved)
    });
    world.refuses(mismatch("none", "add_relu"), |w| {
        w.module
            .forward_train_with(Forward::new(&w.x, &mut w.y).add_relu(&w.z), &mut w.saved)
    });
    world.refuses(mismatch("add_relu", "none"), |w| {
        w.module.forward_train(&w.x, &mut w.y, &mut w.saved_add_relu)
    });
    for evaluation in [false, true] {
        world.refuses(mismatch("none", "relu"), |w| {
            backward_pass(
                evaluation,
                &w.module,
                Backward::new(&w.x, &w.dy).dx(&mut w.dx).relu(),
                &mut w.saved,
            )
        });
        world.refuses(mismatch("none", "add_relu"), |w| {
            backward_pass(
                evaluation,
                &w.module,
                Backward::new(&w.x, &w.dy).dx(&mut w.dx).add_relu(&w.y),
                &mut w.saved,
            )
        });
        world.refuses(mismatch("add_relu", "none"), |w| {
            backward_pass(
                evaluation,
                &w.module,
                Backward::new(&w.x, &w.dy).dx(&mut w.dx),
                &mut w.saved_add_relu,
            )
        });
        world.refuses(mismatch("add_relu", "relu"), |w| {
            backward_pass(
                evaluation,
                &w.module,
                Backward::in_place(&w.x, &mut w.dy).relu(),
                &mut w.saved_add_relu,
            )
        });
    }
}

fn saved_is_empty<B: Device>(device: &B) {
    let mut world = World::new(device);
    let mut fresh = world.module.prepare::<f32>(SHAPE).unwrap();
    assert_eq!(fresh.mean(), Err(Error::SavedEmpty));
    assert_eq!(fresh.invstd(), Err(Error::SavedEmpty));
    world.refuses(Error::SavedEmpty, |w| {
        w.module.backward(&w.x, &w.dy, &mut fresh, &mut w.dx, &mut w.gradients)
    });
    // A forward pass that is refused fills nothing.
    let short = device.zeros::<f32>(1).unwrap();
    world.refuses(length("x", 1), |w| w.module.forward_train(&short, &mut w.y, &mut fresh));
    world.refuses(Error::SavedEmpty, |w| {
        w.module.backward_with(Backward::in_place(&w.x, &mut w.dy), &mut fresh)
    });
}

fn statistics_are_missing<B: Device>(device: &B) {
    let mut world = World::of(device, BatchNorm2dConfig::new(3).track_running_stats(false));
    let missing = || Error::NoRunningStatistics;
    world.refuses(missing(), |w| w.module.forward_eval(SHAPE, &w.x, &mut w.y));
    world.refuses(missing(), |w| w.module.forward_eval_in_place(SHAPE, &mut w.x));
    world.refuses(missing(), |w| w.module.forward_eval_alloc(SHAPE, &w.x));
    world.refuses(missing(), |w| {
        let backward = Backward::new(&w.x, &w.dy).dx(&mut w.dx).parameters(&mut w.gradients);
        w.module.backward_eval_with(backward, &mut w.saved)
    });
}

fn statistics_are_there<B: Device>(device: &B) {
    let mut world = World::new(device);
    world.refuses(Error::HasRunningStatistics, |w| {
        w.module
            .forward_eval_batch_statistics(Forward::new(&w.x, &mut w.y), &mut w.saved)
    });
}

fn parameters_are_missing<B: Device>(device: &B) {
    let mut world = World::of(device, BatchNorm2dConfig::new(3).affine(false));
    world.refuses(Error::NotAffine, |w| w.module.gradients());
    world.refuses(Error::NotAffine, |w| {
        w.module
            .backward(&w.x, &w.dy, &mut w.saved, &mut w.dx, &mut w.gradients)
    });
    world.refuses(Error::NotAffine, |w| {
        let backward = Backward::new(&w.x, &w.dy)
            .dx(&mut w.dx)
            .accumulate_parameters(&mut w.gradients);
        w.module.backward_eval_with(backward, &mut w.saved)
    });
}

fn training_in_place<B: Device>(device: &B) {
    let mut world = World::new(device);
    world.refuses(Error::InPlaceTraining, |w| {
        w.module.forward_train_with(Forward::in_place(&mut w.x), &mut w.saved)
    });
}

fn residual_gradient_without_residual<B: Device>(device: &B) {
    let mut world = World::new(device);
    let expected = |epilogue: &str| Error::Argument {
        argument: "dz",
        expected: "a pass with add_relu(y)".into(),
        got: format!("the epilogue {epilogue}"),
    };
    world.refuses(expected("none"), |w| {
        Backward::new(&w.x, &w.dy).dz(&mut w.dz).map(|_| ())
    });
    world.refuses(expected("relu"), |w| {
        Backward::new(&w.x, &w.dy).relu().dz(&mut w.dz).map(|_| ())
    });
}

/// N = 0: nothing to normalise, statistics stay, gradients are zero.
fn empty_batch_is_no_bad_input<B: Device>(device: &B) {
    for epilogue in Epilogue::ALL {
        let World {
            mut module,
            mut gradients,
            ..
        } = World::new(device);
        let shape = Shape::nchw(0, 3, 4, 2);
        let nothing = || device.zeros::<f32>(0).unwrap();
        let (x, mut y, z, mut dx, mut dz) = (nothing(), nothing(), nothing(), nothing(), nothing());
        let mut saved = module.prepare_fused::<f32>(shape, epilogue).unwrap();
        let before = module.state_dict().unwrap();

        fn forward<'a, B: Device>(
            epilogue: Epilogue,
            x: &'a B::Buffer<f32>,
            y: &'a mut B::Buffer<f32>,
            z: &'a B::Buffer<f32>,
        ) -> Forward<'a, B, f32> {
            match epilogue {
                Epilogue::Identity => Forward::new(x, y),
                Epilogue::Relu => Forward::new(x, y).relu(),
                Epilogue::AddRelu => Forward::new(x, y).add_relu(z),
            }
        }
        module
            .forward_train_with(forward::<B>(epilogue, &x, &mut y, &z), &mut saved)
            .unwrap();
        module
            .forward_eval_with(shape, forward::<B>(epilogue, &x, &mut y, &z))
            .unwrap();
        assert_eq!(module.state_dict().unwrap(), before, "statistics stay");

        for (accumulate, expected) in [(true, [8.0, 9.0]), (false, [0.0, 0.0])] {
            for evaluation in [false, true] {
                let backward = Backward::new(&x, &y).dx(&mut dx);
                let backward = match accumulate {
                    true => backward.accumulate_parameters(&mut gradients),
                    false => backward.parameters(&mut gradients),
                };
                let backward = match epilogue {
                    Epilogue::Identity => backward,
                    Epilogue::Relu => backward.relu(),
                    Epilogue::AddRelu => backward.add_relu(&y).dz(&mut dz).unwrap(),
                };
                match evaluation {
                    false => module.backward_with(backward, &mut saved).unwrap(),
                    true => module.backward_eval_with(backward, &mut saved).unwrap(),
                }
                assert_eq!(B::download(device, &gradients.weight).unwrap(), [expected[0]; 3]);
                assert_eq!(B::download(device, &gradients.bias).unwrap(), [expected[1]; 3]);
            }
        }
        assert_eq!(module.state_dict().unwrap(), before, "statistics stay");
    }
}

/// The numbers are right once a call is right: a refused call leaves nothing behind that spoils the next.
#[test]
fn a_refused_call_does_not_spoil_the_next() {
    let mut world = World::new(&common::cpu());
    let short = [0.0; 1];
    let untouched = World::new(&common::cpu()).snapshot();
    for _ in 0..3 {
        world.refuses(length("x", 1), |w| {
            w.module.forward_train(&short, &mut w.y, &mut w.saved)
        });
    }
    assert_eq!(world.snapshot(), untouched);
    let case = Case::<f32>::random(&mut Random::new(1), SHAPE, Epilogue::AddRelu);
    let want = reference(&case).0.save_mean.unwrap();
    for (got, want) in world.saved.mean().unwrap().into_iter().zip(want) {
        approx::assert_relative_eq!(f64::from(got), want, max_relative = 1e-6);
    }
}

/// What only a CUDA device can be given. (What a machine may lack has a file of its own.)
#[cfg(target_os = "linux")]
mod cuda {
    use batchnorm_cuda::cudarc::driver::CudaContext;
    use batchnorm_cuda::{Backend, Cuda};

    use super::*;

    /// Two contexts of one device compare equal, but do not order each other's work.
    #[test]
    fn buffer_of_another_context() {
        let mut world = World::new(&common::cuda());
        let other = common::on_own_stream(&CudaContext::new(0).unwrap());
        let mut foreign = other.zeros::<f32>(LEN).unwrap();
        let context = |argument| Error::Context {
            argument,
            expected: 0,
            got: 0,
        };
        world.refuses(context("x"), |w| {
            w.module.forward_train(&foreign, &mut w.y, &mut w.saved)
        });
        world.refuses(context("y"), |w| {
            w.module.forward_train(&w.x, &mut foreign, &mut w.saved)
        });
        world.refuses(context("z"), |w| {
            let forward = Forward::new(&w.x, &mut w.y).add_relu(&foreign);
            w.module.forward_train_with(forward, &mut w.saved_add_relu)
        });
        world.refuses(context("x"), |w| w.module.forward_eval(SHAPE, &foreign, &mut w.y));
        world.refuses(context("y"), |w| w.module.forward_eval(SHAPE, &w.x, &mut foreign));
        world.refuses(context("x"), |w| w.module.forward_eval_in_place(SHAPE, &mut foreign));
        // A view is its buffer's.
        world.refuses(context("x"), |w| {
            w.module.forward_train(&foreign.slice(..), &mut w.y, &mut w.saved)
        });
        for evaluation in [false, true] {
            world.refuses(context("x"), |w| {
                backward_pass(
                    evaluation,
                    &w.module,
                    Backward::new(&foreign, &w.dy).dx(&mut w.dx),
                    &mut w.saved,
                )
            });
            world.refuses(context("dy"), |w| {
                backward_pass(
                    evaluation,
                    &w.module,
                    Backward::new(&w.x, &foreign).dx(&mut w.dx),
                    &mut w.saved,
                )
            });
            world.refuses(context("dx"), |w| {
                backward_pass(
                    evaluation,
                    &w.module,
                    Backward::new(&w.x, &w.dy).dx(&mut foreign),
                    &mut w.saved,
                )
            });
            world.refuses(context("dy"), |w| {
                backward_pass(
                    evaluation,
                    &w.module,
                    Backward::in_place(&w.x, &mut foreign),
                    &mut w.saved,
                )
            });
            world.refuses(context("y"), |w| {
                let backward = Backward::new(&w.x, &w.dy).dx(&mut w.dx).add_relu(&foreign);
                backward_pass(evaluation, &w.module, backward, &mut w.saved_add_relu)
            });
            world.refuses(context("dz"), |w| {
                let backward = Backward::new(&w.x, &w.dy).add_relu(&w.y).dz(&mut foreign)?;
                backward_pass(evaluation, &w.module, backward, &mut w.saved_add_relu)
            });
            for argument in ["gradients.weight", "gradients.bias"] {
                let mut gradients = world.module.gradients().unwrap();
                match argument {
                    "gradients.weight" => gradients.weight = other.zeros(3).unwrap(),
                    _ => gradients.bias = other.zeros(3).unwrap(),
                }
                world.refuses(context(argument), |w| {
                    backward_pass(
                        evaluation,
                        &w.module,
                        Backward::new(&w.x, &w.dy).parameters(&mut gradients),
                        &mut w.saved,
                    )
                });
            }
        }
    }

    #[test]
    fn saved_of_another_context() {
        let mut world = World::new(&common::cuda());
        let other = common::on_own_stream(&CudaContext::new(0).unwrap());
        let elsewhere = BatchNorm2d::<Cuda, f32>::new(&other, BatchNorm2dConfig::new(3)).unwrap();
        let mut saved = elsewhere.prepare::<f32>(SHAPE).unwrap();
        let expected = Error::SavedMismatch {
            what: "device",
            expected: format!("{other:?}"),
            got: format!("{:?}", world.device),
        };
        world.refuses(expected.clone(), |w| w.module.forward_train(&w.x, &mut w.y, &mut saved));
        world.refuses(expected.clone(), |w| {
            w.module.backward(&w.x, &w.dy, &mut saved, &mut w.dx, &mut w.gradients)
        });
        world.refuses(expected, |w| {
            w.module
                .backward_eval_with(Backward::new(&w.x, &w.dy).dx(&mut w.dx), &mut saved)
        });
    }

    /// Wherever the memory ends, the module is what it was.
    #[test]
    fn out_of_memory() {
        common::alone("cuda::out_of_memory", || {
            const CHANNELS: usize = 1 << 20;
            let device = common::cuda();
            let context = device.stream().context().cu_ctx();
            let mut module = BatchNorm2d::<Cuda, f32>::new(&device, BatchNorm2dConfig::new(CHANNELS)).unwrap();
            let before = module.state_dict().unwrap();
            let mut state = before.clone();
            state.weight.as_mut().unwrap().fill(3.0);
            state.num_batches_tracked = Some(5);
            let vector = CHANNELS * size_of::<f32>();
            let used = emulator::live_memory(context).bytes;
            for vectors in 0..4 {
                emulator::set_memory_limit(context, used + vectors * vector + vector / 2);
                let out_of_memory = Err(Error::OutOfMemory { bytes: vector });
                assert_eq!(module.load_state_dict(&state), out_of_memory);
                assert_eq!(
                    device.zeros::<f32>((vectors + 1) * CHANNELS).map(|_| ()),
                    Err(Error::OutOfMemory {
                        bytes: (vectors + 1) * vector,
                    })
                );
                let shape = Shape::nchw(2, CHANNELS, 1, 1);
                if vectors < 3 {
                    assert_eq!(module.prepare::<f32>(shape).map(|_| ()), out_of_memory);
                }
            }
            emulator::set_memory_limit(context, usize::MAX);
            assert_eq!(module.state_dict().unwrap(), before);
            module.load_state_dict(&state).unwrap();
            assert_eq!(module.state_dict().unwrap(), state);
        });
    }
}
