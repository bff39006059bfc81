//! Folding a module's evaluation into the convolution before it, so that inference has one operation less.

use crate::backend::Backend;
use crate::batch_norm::BatchNorm2d;
use crate::element::{Element, Real};
use crate::error::{Error, Result};

/// A convolution with a batch norm folded in: what [`BatchNorm2d::fold_into_conv`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct FoldedConv<T: Element> {
    /// In the order and of the length of the weight that was given.
    pub weight: Vec<T>,
    /// One value per output channel.
    pub bias: Vec<T>,
}

impl<B: Backend, P: Real> BatchNorm2d<B, P> {
    /// The weight and bias of a convolution that does what `conv`, then this module's evaluation does:
    ///
    /// `weight' = weight · s` and `bias' = (bias - running_mean) · s + bn.bias`, per output channel, with
    /// `s = bn.weight / sqrt(running_var + eps)`.
    ///
    /// `weight` is PyTorch's `conv.weight`, contiguous and of `shape` `[out_channels, in_channels / groups, kH, kW]`: each
    /// output channel's values lie together, whatever their order. (A transposed convolution's do not.) `bias` has one
    /// value per output channel, and counts as 0 if absent. Half-precision values are computed with in `f32` and rounded
    /// once.
    ///
    /// Weights are folded once, when a model is loaded, so this works on the host, for modules on any device: copies the
    /// module's parameters and statistics to the host and waits. Weights that are on a device already are read with
    /// [`Backend::read`] before and uploaded with [`Backend::upload`] afterwards.
    ///
    /// ```
    /// use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, StateDict};
    ///
    /// # fn main() -> batchnorm_cuda::Result<()> {
    /// let mut bn: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(2).eps(0.0))?;
    /// bn.load_state_dict(&StateDict {
    ///     weight: Some(vec![1.0, 3.0]),
    ///     bias: Some(vec![0.0, 0.5]),
    ///     running_mean: Some(vec![1.0, -1.0]),
    ///     running_var: Some(vec![4.0, 9.0]),
    ///     num_batches_tracked: Some(1),
    /// })?;
    /// let weight = [2.0f32, 4.0]; // two output channels of one value each
    /// let conv = bn.fold_into_conv(&weight, [2, 1, 1, 1], None)?;
    /// assert_eq!((conv.weight, conv.bias), (vec![1.0, 4.0], vec![-0.5, 1.5]));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NoRunningStatistics`] of a module that tracks none; [`Error::Argument`] if `shape` has other output channels
    /// than the module, a dimension of 0, or not as many values as `weight`; [`Error::VectorLength`] for a bias of another
    /// length; the driver's.
    pub fn fold_into_conv<T>(&self, weight: &[T], shape: [usize; 4], bias: Option<&[T]>) -> Result<FoldedConv<T>>
    where
        T: Element<Param = P>,
    {
        let channels = self.config().num_features;
        let argument = |argument, expected: String, got: String| {
            Err(Error::Argument {
                argument,
                expected,
                got,
            })
        };
        if shape[0] != channels {
            let expected = format!("{channels} output channels (num_features)");
            return argument("shape", expected, format!("{shape:?}"));
        }
        let values = shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size));
        match values {
            Some(values) if values == weight.len() && values > 0 => {}
            _ => {
                return argument(
                    "weight",
                    format!("the values of shape {shape:?}"),
                    format!("{} values", weight.len()),
                );
            }
        }
        if let Some(bias) = bias
            && bias.len() != channels
        {
            return Err(Error::VectorLength {
                argument: "bias",
                expected: channels,
                got: bias.len(),
            });
        }
        if self.running_mean().is_none() {
            return Err(Error::NoRunningStatistics);
        }

        let scales = self.evaluation_scales()?;
        let per_channel = weight.len() / channels;
        let folded = weight.iter().enumerate().map(|(at, value)| {
            let (scale, ..) = scales[at / per_channel];
            T::from_param(value.to_param() * scale)
        });
        Ok(FoldedConv {
            weight: folded.collect(),
            bias: scales
                .iter()
                .enumerate()
                .map(|(channel, &(scale, mean, shift))| {
                    let bias = bias.map_or(P::ZERO, |bias| bias[channel].to_param());
                    T::from_param((bias - mean).mul_add(scale, shift))
                })
                .collect(),
        })
    }

    /// Scale, running mean and shift per channel: `y = (x - mean) · scale + shift`. Of a module with running statistics.
    fn evaluation_scales(&self) -> Result<Vec<(P, P, P)>> {
        let state = self.state_dict()?;
        let eps = P::from_f64(self.config().eps);
        let (means, variances) = (
            state.running_mean.unwrap_or_default(),
            state.running_var.unwrap_or_default(),
        );
        Ok(means
            .into_iter()
            .zip(variances)
            .enumerate()
            .map(|(channel, (mean, variance))| {
                let weight = state.weight.as_ref().map_or(P::ONE, |weight| weight[channel]);
                let shift = state.bias.as_ref().map_or(P::ZERO, |bias| bias[channel]);
                (P::ONE / (variance + eps).sqrt() * weight, mean, shift)
            })
            .collect())
    }
}
