//! Batch normalisation of this crate, of candle and of burn behind one interface, so that one program can time them in turns
//! and compare their errors. All tensors are `f32` and NCHW, which all of them have.

mod burn;
mod candle;
mod ours;

pub use burn::Burn;
pub use candle::Candle;
pub use ours::Ours;

use batchnorm_cuda::{Cpu, Shape};

/// Added to the variance; PyTorch's default and everybody's.
pub const EPS: f64 = 1e-5;

/// What a step is computed from.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// N, C, H, W; in NCHW.
    pub shape: Shape,
    /// The input.
    pub x: Vec<f32>,
    /// The gradient at the output.
    pub dy: Vec<f32>,
    /// Scale per channel.
    pub weight: Vec<f32>,
    /// Shift per channel.
    pub bias: Vec<f32>,
}

/// What a training step yields.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// The normalised tensor.
    pub y: Vec<f32>,
    /// The gradient at x.
    pub dx: Vec<f32>,
    /// The gradient at weight.
    pub dweight: Vec<f32>,
    /// The gradient at bias.
    pub dbias: Vec<f32>,
}

/// An implementation of batch normalisation, set up for some inputs.
pub trait Peer {
    /// What it is called in tables.
    fn name(&self) -> &'static str;

    /// A forward pass in training, as its users write it.
    fn train(&mut self);

    /// A forward pass by the running statistics.
    fn eval(&mut self);

    /// A forward pass in training and the gradients at x, weight and bias.
    fn step(&mut self);

    /// The numbers of a training step.
    fn outputs(&mut self) -> Outputs;
}

/// Everyone that runs on the CPU, this crate first.
pub fn on_cpu(inputs: &Inputs) -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(Ours::new("batchnorm-cuda", &Cpu::new(), inputs)),
        Box::new(Candle::new(inputs)),
        Box::new(Burn::new(inputs)),
    ]
}
