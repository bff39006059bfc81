//! burn's `BatchNorm`, which works in training on devices with automatic differentiation only.

use burn_core::module::Param;
use burn_core::tensor::{Device, Tensor, TensorData};
use burn_nn::{BatchNorm, BatchNormConfig};

use crate::{EPS, Inputs, Outputs, Peer};

/// burn on the backend that it recommends for the CPU, burn-flex. (burn-ndarray is given up by burn itself and takes minutes to
/// compile; burn-cpu needs a prebuilt LLVM.)
pub struct Burn {
    training: BatchNorm,
    evaluation: BatchNorm,
    tracked: Tensor<4>,
    plain: Tensor<4>,
    dy: Tensor<4>,
}

impl Burn {
    /// Copies the inputs.
    pub fn new(inputs: &Inputs) -> Self {
        let plain = Device::flex();
        let device = plain.clone().autodiff();
        let shape = inputs.shape;
        let tensor = |values: &[f32], device: &Device| {
            let size = [shape.batch, shape.channels, shape.height, shape.width];
            Tensor::<4>::from_data(TensorData::new(values.to_vec(), size), device)
        };
        let module = |device: &Device| {
            let vector = |values: &[f32]| {
                let data = TensorData::new(values.to_vec(), [shape.channels]);
                let tensor = Tensor::<1>::from_data(data, device);
                let differentiated = device.is_autodiff();
                Param::from_tensor(if differentiated { tensor.require_grad() } else { tensor })
            };
            let mut module = BatchNormConfig::new(shape.channels).with_epsilon(EPS).init(device);
            module.gamma = vector(&inputs.weight);
            module.beta = vector(&inputs.bias);
            module
        };
        Self {
            training: module(&device),
            evaluation: module(&plain),
            tracked: tensor(&inputs.x, &device).require_grad(),
            plain: tensor(&inputs.x, &plain),
            dy: tensor(&inputs.dy, &device),
        }
    }
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32")
}

impl Peer for Burn {
    fn name(&self) -> &'static str {
        "burn-flex"
    }

    fn train(&mut self) {
        self.training.forward(self.tracked.clone());
    }

    fn eval(&mut self) {
        self.evaluation.forward(self.plain.clone());
    }

    fn step(&mut self) {
        // As for candle: the gradient at the output is one.
        self.training.forward(self.tracked.clone()).backward();
    }

    fn outputs(&mut self) -> Outputs {
        let y = self.training.forward(self.tracked.clone());
        let gradients = (y.clone() * self.dy.clone()).sum().backward();
        let gradient = |parameter: &Param<Tensor<1>>| {
            let gradient = parameter.val().grad(&gradients);
            numbers(gradient.expect("a gradient at every parameter"))
        };
        Outputs {
            dx: numbers(self.tracked.grad(&gradients).expect("a gradient at x")),
            dweight: gradient(&self.training.gamma),
            dbias: gradient(&self.training.beta),
            y: numbers(y),
        }
    }
}
