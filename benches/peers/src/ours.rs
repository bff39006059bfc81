//! This crate, which writes into the caller's buffers.

use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Gradients, Saved, Shape};

use crate::{EPS, Inputs, Outputs, Peer};

/// This crate on a device.
pub struct Ours<B: Backend> {
    name: &'static str,
    device: B,
    shape: Shape,
    module: BatchNorm2d<B>,
    saved: Saved<B, f32>,
    gradients: Gradients<B, f32>,
    x: B::Buffer<f32>,
    dy: B::Buffer<f32>,
    y: B::Buffer<f32>,
    dx: B::Buffer<f32>,
}

impl<B: Backend> Ours<B> {
    /// Uploads the inputs to `device`.
    pub fn new(name: &'static str, device: &B, inputs: &Inputs) -> Self {
        let config = BatchNorm2dConfig::new(inputs.shape.channels).eps(EPS);
        let mut module = BatchNorm2d::new(device, config).expect("a module");
        let upload = |values: &[f32]| device.upload(values).expect("memory");
        let (weight, bias) = (upload(&inputs.weight), upload(&inputs.bias));
        use batchnorm_cuda::AsTensor;
        device
            .copy(weight.view(), module.weight_mut().expect("affine"))
            .expect("one value per channel");
        device
            .copy(bias.view(), module.bias_mut().expect("affine"))
            .expect("one value per channel");
        Self {
            name,
            device: device.clone(),
            shape: inputs.shape,
            saved: module.prepare(inputs.shape).expect("a valid shape"),
            gradients: module.gradients().expect("affine"),
            module,
            x: upload(&inputs.x),
            dy: upload(&inputs.dy),
            y: upload(&inputs.x),
            dx: upload(&inputs.x),
        }
    }
}

impl<B: Backend> Peer for Ours<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn train(&mut self) {
        self.module
            .forward_train(&self.x, &mut self.y, &mut self.saved)
            .expect("a training pass");
    }

    fn eval(&mut self) {
        self.module
            .forward_eval(self.shape, &self.x, &mut self.y)
            .expect("an evaluation");
    }

    fn step(&mut self) {
        self.train();
        let Self {
            module,
            saved,
            gradients,
            x,
            dy,
            dx,
            ..
        } = self;
        module.backward(x, dy, saved, dx, gradients).expect("a backward pass");
    }

    fn outputs(&mut self) -> Outputs {
        self.step();
        use batchnorm_cuda::AsTensor;
        let download = |buffer: &B::Buffer<f32>| self.device.to_vec(buffer.view()).expect("a copy to the host");
        Outputs {
            y: download(&self.y),
            dx: download(&self.dx),
            dweight: download(&self.gradients.weight),
            dbias: download(&self.gradients.bias),
        }
    }
}
