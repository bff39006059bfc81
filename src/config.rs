//! What a `BatchNorm2d` is made from: PyTorch's arguments under PyTorch's names and with its defaults.

use crate::error::{Error, Result};

/// How the running statistics follow the batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Momentum {
    /// `running = (1 - momentum) * running + momentum * batch`. PyTorch's default is 0.1.
    Factor(f64),
    /// The average over all batches: the factor is `1 / num_batches_tracked`, this batch counted. PyTorch's
    /// `momentum=None`.
    CumulativeAverage,
}

impl From<f64> for Momentum {
    fn from(factor: f64) -> Self {
        Momentum::Factor(factor)
    }
}

impl From<Option<f64>> for Momentum {
    /// `None` is the cumulative average, as in PyTorch.
    fn from(momentum: Option<f64>) -> Self {
        momentum.map_or(Momentum::CumulativeAverage, Momentum::Factor)
    }
}

/// Configuration of a [`BatchNorm2d`](crate::BatchNorm2d), with the names and defaults of
/// [`torch.nn.BatchNorm2d`](https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html).
///
/// ```
/// use batchnorm_cuda::{BatchNorm2dConfig, Momentum};
///
/// let config = BatchNorm2dConfig::new(64).eps(1e-3).momentum(Momentum::CumulativeAverage);
/// assert!(config.affine && config.track_running_stats);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNorm2dConfig {
    /// C: number of channels.
    pub num_features: usize,
    /// Added to the variance before the square root. Default 1e-5.
    pub eps: f64,
    /// How the running statistics follow the batches. Default 0.1.
    pub momentum: Momentum,
    /// Whether there are a learnt weight and bias per channel. Default true.
    pub affine: bool,
    /// Whether running statistics are kept, and used in evaluation. Default true. Without them evaluation takes the
    /// statistics of the batch at hand.
    pub track_running_stats: bool,
    /// Whether a channel whose batch mean or variance is not finite leaves its running statistics as they are. Default
    /// false, as in PyTorch, where one infinity in one batch spoils them for good. The batch is counted all the same.
    pub skip_non_finite: bool,
}

impl BatchNorm2dConfig {
    /// PyTorch's defaults for `num_features` channels.
    pub const fn new(num_features: usize) -> Self {
        Self {
            num_features,
            eps: 1e-5,
            momentum: Momentum::Factor(0.1),
            affine: true,
            track_running_stats: true,
            skip_non_finite: false,
        }
    }

    /// Sets [`BatchNorm2dConfig::eps`].
    pub const fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Sets [`BatchNorm2dConfig::momentum`]: a number, `None`, or a [`Momentum`].
    pub fn momentum(mut self, momentum: impl Into<Momentum>) -> Self {
        self.momentum = momentum.into();
        self
    }

    /// Sets [`BatchNorm2dConfig::affine`].
    pub const fn affine(mut self, affine: bool) -> Self {
        self.affine = affine;
        self
    }

    /// Sets [`BatchNorm2dConfig::track_running_stats`].
    pub const fn track_running_stats(mut self, track_running_stats: bool) -> Self {
        self.track_running_stats = track_running_stats;
        self
    }

    /// Sets [`BatchNorm2dConfig::skip_non_finite`].
    pub const fn skip_non_finite(mut self, skip_non_finite: bool) -> Self {
        self.skip_non_finite = skip_non_finite;
        self
    }

    /// Refuses what no normalisation can be made from.
    pub(crate) fn validate(&self) -> Result<()> {
        if self.num_features == 0 {
            return Err(Error::NoFeatures);
        }
        if !self.eps.is_finite() || self.eps < 0.0 {
            return Err(Error::Eps { eps: self.eps });
        }
        match self.momentum {
            Momentum::Factor(momentum) if !momentum.is_finite() => Err(Error::Momentum { momentum }),
            _ => Ok(()),
        }
    }
}
