//! candle-nn's `BatchNorm`.

use candle_core::{Device, Tensor, Var};
use candle_nn::{BatchNorm, ModuleT};

use crate::{EPS, Inputs, Outputs, Peer};

/// candle on the CPU.
pub struct Candle {
    module: BatchNorm,
    weight: Var,
    bias: Var,
    x: Var,
    dy: Tensor,
}

impl Candle {
    /// Copies the inputs.
    pub fn new(inputs: &Inputs) -> Self {
        Self::try_new(inputs).expect("tensors of valid shapes")
    }

    fn try_new(inputs: &Inputs) -> candle_core::Result<Self> {
        let channels = inputs.shape.channels;
        let size = [inputs.shape.batch, channels, inputs.shape.height, inputs.shape.width];
        let vector = |values: &[f32]| Tensor::from_slice(values, channels, &Device::Cpu);
        let weight = Var::from_tensor(&vector(&inputs.weight)?)?;
        let bias = Var::from_tensor(&vector(&inputs.bias)?)?;
        Ok(Self {
            module: BatchNorm::new(
                channels,
                vector(&vec![0.0; channels])?,
                vector(&vec![1.0; channels])?,
                weight.as_tensor().clone(),
                bias.as_tensor().clone(),
                EPS,
            )?,
            weight,
            bias,
            x: Var::from_tensor(&Tensor::from_slice(&inputs.x, &size, &Device::Cpu)?)?,
            dy: Tensor::from_slice(&inputs.dy, &size, &Device::Cpu)?,
        })
    }

    fn try_outputs(&self) -> candle_core::Result<Outputs> {
        let y = self.module.forward_train(&self.x)?;
        let gradients = (&y * &self.dy)?.sum_all()?.backward()?;
        let flat = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let gradient = |var: &Var| flat(gradients.get(var).expect("a gradient at every variable"));
        Ok(Outputs {
            y: flat(&y)?,
            dx: gradient(&self.x)?,
            dweight: gradient(&self.weight)?,
            dbias: gradient(&self.bias)?,
        })
    }
}

impl Peer for Candle {
    fn name(&self) -> &'static str {
        "candle-nn"
    }

    fn train(&mut self) {
        self.module.forward_train(&self.x).expect("a training pass");
    }

    fn eval(&mut self) {
        self.module
            .forward_t(&self.x.as_detached_tensor(), false)
            .expect("an evaluation");
    }

    fn step(&mut self) {
        // The gradient at the output is then one: a given one would cost a product and a sum more.
        let y = self.module.forward_train(&self.x).expect("a training pass");
        y.backward().expect("a backward pass");
    }

    fn outputs(&mut self) -> Outputs {
        self.try_outputs().expect("a step")
    }
}
