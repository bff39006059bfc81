//! A small residual network, with a normalisation that can be exchanged.

use batchnorm_cuda::candle::BatchNorm2d;
use candle_core::{D, Module as _, ModuleT as _, Result, Tensor};
use candle_nn::{BatchNorm, Conv2d, Conv2dConfig, Linear, VarBuilder};

/// Batch normalisation with what follows it.
pub trait Norm: Sized {
    fn new(channels: usize, vb: VarBuilder) -> Result<Self>;
    /// `relu(bn(x))`
    fn relu(&self, x: &Tensor, train: bool) -> Result<Tensor>;
    /// `relu(bn(x) + residual)`
    fn add_relu(&self, x: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor>;
}

/// This crate's: each is one pass.
impl Norm for BatchNorm2d {
    fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        batchnorm_cuda::candle::batch_norm(channels, 1e-5, vb)
    }

    fn relu(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_relu_t(x, train)
    }

    fn add_relu(&self, x: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_add_relu_t(x, residual, train)
    }
}

/// candle-nn's.
impl Norm for BatchNorm {
    fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        candle_nn::batch_norm(channels, 1e-5, vb)
    }

    fn relu(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_t(x, train)?.relu()
    }

    fn add_relu(&self, x: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor> {
        (self.forward_t(x, train)? + residual)?.relu()
    }
}

/// Three convolutions, the last two around a residual, and a linear layer.
pub struct Network<N> {
    first: (Conv2d, N),
    second: (Conv2d, N),
    third: (Conv2d, N),
    last: Linear,
}

const CHANNELS: usize = 24;

impl<N: Norm> Network<N> {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        let layer = |name: &str, channels: usize| -> Result<(Conv2d, N)> {
            let config = Conv2dConfig {
                padding: 1,
                ..Conv2dConfig::default()
            };
            let vb = vb.pp(name);
            // The normalisation takes away what a bias would add.
            let conv = candle_nn::conv2d_no_bias(channels, CHANNELS, 3, config, vb.pp("conv"))?;
            Ok((conv, N::new(CHANNELS, vb.pp("bn"))?))
        };
        Ok(Self {
            first: layer("first", 1)?,
            second: layer("second", CHANNELS)?,
            third: layer("third", CHANNELS)?,
            last: candle_nn::linear_no_bias(CHANNELS * 4 * 4, 10, vb.pp("last"))?,
        })
    }

    /// Scores [N, 10] of images [N, 1, 8, 8].
    pub fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let (conv, bn) = &self.first;
        let x = bn.relu(&conv.forward(images)?, train)?.max_pool2d(2)?;
        let (conv, bn) = &self.second;
        let y = bn.relu(&conv.forward(&x)?, train)?;
        let (conv, bn) = &self.third;
        let y = bn.add_relu(&conv.forward(&y)?, &x, train)?;
        self.last.forward(&y.flatten_from(D::Minus(3))?)
    }
}
