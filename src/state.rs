//! State dicts under PyTorch's names, and safetensors files of them.

use crate::element::Real;

/// A module's parameters and statistics on the host, under PyTorch's names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict<P: Real> {
    /// Scale per channel, if affine.
    pub weight: Option<Vec<P>>,
    /// Shift per channel, if affine.
    pub bias: Option<Vec<P>>,
    /// Running mean per channel, if tracked.
    pub running_mean: Option<Vec<P>>,
    /// Running variance per channel, if tracked.
    pub running_var: Option<Vec<P>>,
    /// Batches counted, if tracked.
    pub num_batches_tracked: Option<i64>,
}
