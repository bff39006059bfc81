//! Batch normalisation in float64, by the textbook formulas, and how far a result may be from it.
//!
//! The scaled errors are those that the README of `tests/golden` defines.

use batchnorm_cuda::{Dtype, Element, Epilogue, Momentum, Real, Shape};

use super::case::{Case, channel_indices, wide};

/// Everything a step may give, in float64.
#[derive(Clone, Debug, Default)]
pub struct Values {
    pub y: Option<Vec<f64>>,
    pub dx: Option<Vec<f64>>,
    pub dz: Option<Vec<f64>>,
    pub dweight: Option<Vec<f64>>,
    pub dbias: Option<Vec<f64>>,
    pub running_mean: Option<Vec<f64>>,
    pub running_var: Option<Vec<f64>>,
    pub save_mean: Option<Vec<f64>>,
    pub save_invstd: Option<Vec<f64>>,
    pub num_batches_tracked: Option<i64>,
}

impl Values {
    /// The tensors with their names in the golden files.
    pub fn tensors(&self) -> [(&'static str, &Option<Vec<f64>>); 9] {
        [
            ("y", &self.y),
            ("dx", &self.dx),
            ("dz", &self.dz),
            ("dweight", &self.dweight),
            ("dbias", &self.dbias),
            ("running_mean_out", &self.running_mean),
            ("running_var_out", &self.running_var),
            ("save_mean", &self.save_mean),
            ("save_invstd", &self.save_invstd),
        ]
    }
}

/// Per channel, the size of the terms that a value is summed from: what its error is measured by.
#[derive(Clone, Debug, Default)]
pub struct Scales {
    pub y: Vec<f64>,
    pub dx: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
    pub running_mean: Vec<f64>,
    pub running_var: Vec<f64>,
    pub save_mean: Vec<f64>,
    pub save_invstd: Vec<f64>,
}

/// The greatest scaled error allowed of a tensor stored in this type.
pub fn limit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F64 => 2e-15,
        Dtype::F32 => 6e-7,
        Dtype::F16 => 5.5e-4,
        Dtype::Bf16 => 4e-3,
    }
}

/// A sum that loses nothing which float64 can hold (Neumaier 1974).
pub fn sum(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut total, mut lost, mut plain) = (0.0f64, 0.0f64, 0.0f64);
    for value in values {
        plain += value;
        let next = total + value;
        lost += if total.abs() >= value.abs() {
            (total - next) + value
        } else {
            (value - next) + total
        };
        total = next;
    }
    // NaN and infinity have no rounding error to make good; the plain sum says which of them it is.
    if plain.is_finite() { total + lost } else { plain }
}

/// What a step must give, and by what its errors are measured.
pub fn reference<T: Element>(case: &Case<T>) -> (Values, Scales) {
    let shape = case.shape;
    let n = shape.values_per_channel().unwrap() as f64;
    let x = wide(&case.x);
    let z = case.z.as_deref().map(wide);
    let dy = case.dy.as_deref().map(wide);
    let weight = case.state.weight.as_deref().map(wide);
    let bias = case.state.bias.as_deref().map(wide);
    let old_mean = case.state.running_mean.as_deref().map(wide);
    let old_var = case.state.running_var.as_deref().map(wide);
    let batches = case
        .state
        .num_batches_tracked
        .map(|seen| seen + i64::from(case.training));

    let tensor = || vec![f64::NAN; x.len()];
    let vector = || vec![f64::NAN; shape.channels];
    let mut values = Values {
        y: Some(tensor()),
        dx: dy.as_ref().map(|_| tensor()),
        dz: dy.as_ref().and(z.as_ref()).map(|_| tensor()),
        dweight: dy.as_ref().and(weight.as_ref()).map(|_| vector()),
        dbias: dy.as_ref().and(weight.as_ref()).map(|_| vector()),
        running_mean: old_mean.clone(),
        running_var: old_var.clone(),
        save_mean: case.by_batch().then(vector),
        save_invstd: case.by_batch().then(vector),
        num_batches_tracked: batches,
    };
    let mut scales = Scales::default();

    for c in 0..shape.channels {
        let here = || channel_indices(shape, c);
        let (mean, var) = match (&old_mean, &old_var) {
            (Some(mean), Some(var)) if !case.by_batch() => (mean[c], var[c]),
            _ => {
                let mean = sum(here().map(|i| x[i])) / n;
                (mean, sum(here().map(|i| (x[i] - mean) * (x[i] - mean))) / n)
            }
        };
        let invstd = 1.0 / (var + case.config.eps).sqrt();
        let (w, b) = (
            weight.as_ref().map_or(1.0, |w| w[c]),
            bias.as_ref().map_or(0.0, |b| b[c]),
        );

        if let (Some(save_mean), Some(save_invstd)) = (&mut values.save_mean, &mut values.save_invstd) {
            (save_mean[c], save_invstd[c]) = (mean, invstd);
        }
        let spoilt = !(mean.is_finite() && var.is_finite());
        if let (true, Some(running_mean), Some(running_var), Some(batches)) = (
            case.training,
            &mut values.running_mean,
            &mut values.running_var,
            batches,
        ) && !(spoilt && case.config.skip_non_finite)
        {
            let m = match case.config.momentum {
                Momentum::Factor(momentum) => momentum,
                Momentum::CumulativeAverage => 1.0 / batches as f64,
            };
            running_mean[c] = (1.0 - m) * running_mean[c] + m * mean;
            running_var[c] = (1.0 - m) * running_var[c] + m * var * n / (n - 1.0);
        }

        let y = values.y.as_mut().unwrap();
        for i in here() {
            let before_relu = (x[i] - mean) * invstd * w + b + z.as_ref().map_or(0.0, |z| z[i]);
            // Not f64::max, which takes the number where there is a number and NaN.
            let stopped = case.epilogue != Epilogue::Identity && before_relu <= 0.0;
            y[i] = if stopped { 0.0 } else { before_relu };
        }
        if let (Some(dy), Some(dx)) = (&dy, &mut values.dx) {
            let stops = |i: usize| case.epilogue != Epilogue::Identity && y[i] <= 0.0;
            let g = |i: usize| if stops(i) { 0.0 } else { dy[i] };
            let x_hat = |i: usize| (x[i] - mean) * invstd;
            let sum_g = sum(here().map(g));
            let sum_gx = sum(here().map(|i| g(i) * x_hat(i)));
            for i in here() {
                let through_statistics = if case.by_batch() {
                    (sum_g + x_hat(i) * sum_gx) / n
                } else {
                    0.0
                };
                dx[i] = w * invstd * (g(i) - through_statistics);
            }
            if let Some(dz) = &mut values.dz {
                here().for_each(|i| dz[i] = g(i));
            }
            if let (Some(dweight), Some(dbias)) = (&mut values.dweight, &mut values.dbias) {
                (dweight[c], dbias[c]) = (sum_gx, sum_g);
            }
        }

        let finite = |value: f64| if value.is_finite() { value.abs() } else { 0.0 };
        let greatest = |tensor: &[f64]| here().map(|i| finite(tensor[i])).fold(0.0, f64::max);
        let reach = invstd * (greatest(&x) + mean.abs());
        let square = mean * mean + var;
        scales
            .y
            .push(w.abs() * reach + b.abs() + z.as_deref().map_or(0.0, greatest));
        scales.save_mean.push(square.sqrt());
        scales.save_invstd.push(invstd * reach.max(1.0));
        if let (Some(old_mean), Some(old_var)) = (&old_mean, &old_var) {
            scales.running_mean.push(old_mean[c].abs().max(square.sqrt()));
            scales.running_var.push(old_var[c].max(square));
        }
        if let Some(dy) = &dy {
            let total = sum(here().map(|i| finite(dy[i])));
            scales.dx.push(w.abs() * invstd * greatest(dy) * reach.max(1.0));
            scales.dweight.push(total * reach);
            scales.dbias.push(total);
        }
    }
    (values, scales)
}

/// The scaled error of every tensor that is due: never NaN, and infinite where NaN, infinity, presence or length differ.
pub fn errors(shape: Shape, got: &Values, want: &Values, scales: &Scales) -> Vec<(&'static str, f64)> {
    got.tensors()
        .into_iter()
        .zip(want.tensors())
        .filter_map(|((name, got), (_, want))| {
            let scale = match name {
                "y" => &scales.y,
                "dx" => &scales.dx,
                "dweight" => &scales.dweight,
                "dbias" => &scales.dbias,
                "running_mean_out" => &scales.running_mean,
                "running_var_out" => &scales.running_var,
                "save_mean" => &scales.save_mean,
                "save_invstd" => &scales.save_invstd,
                // dz is dy or 0: copied, never computed.
                "dz" => &vec![0.0; shape.channels],
                _ => unreachable!(),
            };
            match (got, want) {
                (None, None) => None,
                (Some(got), Some(want)) if got.len() == want.len() => Some((name, error(shape, got, want, scale))),
                _ => Some((name, f64::INFINITY)),
            }
        })
        .collect()
}

fn error(shape: Shape, got: &[f64], want: &[f64], scale: &[f64]) -> f64 {
    let one = |got: f64, want: f64, scale: f64| {
        let same = got == want || got.is_nan() && want.is_nan();
        match (same, (got - want).abs() / scale) {
            (true, _) => 0.0,
            (false, ratio) if ratio.is_nan() => f64::INFINITY,
            (false, ratio) => ratio,
        }
    };
    // A vector has one value per channel. So has a tensor of one value per channel, at the same addresses.
    let vector = want.len() == shape.channels;
    let addresses = |c| match vector {
        true => vec![c],
        false => channel_indices(shape, c).collect(),
    };
    (0..shape.channels)
        .flat_map(|c| addresses(c).into_iter().map(move |i| one(got[i], want[i], scale[c])))
        .fold(0.0, f64::max)
}
