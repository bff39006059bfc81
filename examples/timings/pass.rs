//! What is timed: the passes over one shape, and copies of its tensor.

use std::time::Instant;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Dtype, Element, Gradients, Real, Result, Saved, Shape};

use crate::copies;

/// A pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Forward in training.
    Train,
    /// Forward by the running statistics.
    Eval,
    /// Backward in training.
    Backward,
    /// Forward in training, then backward.
    Step,
}

impl Op {
    /// All passes.
    pub const ALL: [Op; 4] = [Op::Train, Op::Eval, Op::Backward, Op::Step];
    /// Those that are timed unless others are asked for.
    pub const REPORTED: [Op; 3] = [Op::Train, Op::Eval, Op::Backward];

    /// What the command line and the output call it.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Train => "train",
            Op::Eval => "eval",
            Op::Backward => "backward",
            Op::Step => "step",
        }
    }
}

impl std::str::FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Op::ALL
            .into_iter()
            .find(|op| op.name() == text)
            .ok_or_else(|| format!("unknown op {text:?}"))
    }
}

/// Passes over one shape and element, on the threads of the current pool.
pub trait Passes: Send {
    /// Runs a pass: forward from x to y, backward from x and dy to dx, so that [`Op::Step`] has all four tensors in use.
    fn run(&mut self, op: Op) -> Result<()>;

    /// Copies x to y as memcpy does.
    fn memcpy(&mut self) -> Result<()>;

    /// Copies x to y without reading the lines that are written.
    fn streaming_copy(&mut self) -> Result<()>;

    /// What the passes before have left: y and dx in the order of memory, then the gradients at weight and bias.
    fn results(&self) -> [Vec<f64>; 4];
}

/// Prepares the passes of `cpu` over `shape`.
pub fn passes(cpu: Cpu, shape: Shape, element: Dtype) -> Result<Box<dyn Passes>> {
    Ok(match element {
        Dtype::F16 => Box::new(Tensors::<f16>::new(cpu, shape)?),
        Dtype::Bf16 => Box::new(Tensors::<bf16>::new(cpu, shape)?),
        Dtype::F32 => Box::new(Tensors::<f32>::new(cpu, shape)?),
        Dtype::F64 => Box::new(Tensors::<f64>::new(cpu, shape)?),
    })
}

/// How long `work` takes.
pub fn milliseconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

struct Tensors<T: Element> {
    shape: Shape,
    module: BatchNorm2d<Cpu, T::Param>,
    saved: Saved<Cpu, T>,
    gradients: Gradients<Cpu, T::Param>,
    x: Vec<T>,
    dy: Vec<T>,
    y: Vec<T>,
    dx: Vec<T>,
}

impl<T: Element> Tensors<T> {
    fn new(cpu: Cpu, shape: Shape) -> Result<Self> {
        let module = BatchNorm2d::new(&cpu, BatchNorm2dConfig::new(shape.channels))?;
        let len = shape.len()?;
        let mut tensors = Self {
            shape,
            saved: module.prepare(shape)?,
            gradients: module.gradients()?,
            module,
            x: noise(len, 0),
            dy: noise(len, 1),
            y: noise(len, 2),
            dx: noise(len, 3),
        };
        // The backward pass needs the statistics of a forward pass.
        tensors.run(Op::Train)?;
        Ok(tensors)
    }
}

/// Numbers between -1/2 and 1/2, without a pattern that a cache or a predictor could make something of.
fn noise<T: Element>(len: usize, seed: usize) -> Vec<T> {
    (0..len)
        .map(|i| (i + seed).wrapping_mul(2_654_435_761) >> 8 & 0xffff)
        .map(|bits| T::from_param(T::Param::from_f64(bits as f64 / 65536.0 - 0.5)))
        .collect()
}

impl<T: Element> Passes for Tensors<T> {
    fn run(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Train => self.module.forward_train(&self.x, &mut self.y, &mut self.saved),
            Op::Eval => self.module.forward_eval(self.shape, &self.x, &mut self.y),
            Op::Backward => self
                .module
                .backward(&self.x, &self.dy, &mut self.saved, &mut self.dx, &mut self.gradients),
            Op::Step => {
                self.run(Op::Train)?;
                self.run(Op::Backward)
            }
        }
    }

    fn memcpy(&mut self) -> Result<()> {
        copies::in_parallel(&self.x, &mut self.y, |from, to| to.copy_from_slice(from));
        Ok(())
    }

    fn streaming_copy(&mut self) -> Result<()> {
        copies::in_parallel(&self.x, &mut self.y, copies::streaming);
        Ok(())
    }

    fn results(&self) -> [Vec<f64>; 4] {
        /// As numbers that JSON has.
        fn doubles<T: Element>(values: &[T]) -> Vec<f64> {
            values.iter().map(|value| value.to_param().to_f64()).collect()
        }
        let Gradients { weight, bias } = &self.gradients;
        [doubles(&self.y), doubles(&self.dx), doubles(weight), doubles(bias)]
    }
}
