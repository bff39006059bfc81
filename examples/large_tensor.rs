//! A tensor of more than 2^31 elements through every pass, sampled against the closed form of what must come out.
//!
//!     cargo run --release --example large_tensor                                       # on a GPU with 20 GB
//!     cargo run --release --example large_tensor -- --stand-in h200 --shape 2x3x32x32   # the same in small, without one
//!
//! In channel c, x is m + s, where m is a small whole number that depends on c, and s is 1 or -1 by turns; dy is s. So mean
//! and variance are m and 1; with eps = 1, y = s / √2, the sum of dy is 0, that of dy · y is n / √2, and
//! dx = s / √8. Both memory orders are run, on the path that the plan takes and on the general one. Where an index is cut to
//! 32 bits, or a sum loses count, a sample or a sum shows it.

use std::error::Error;

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem};
use batchnorm_cuda::cuda::{DiskCache, is_available};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaSlice};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Dtype, Forward, Layout, Shape};
use clap::Parser;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Elements that are looked at together.
const SAMPLE: usize = 64;
const SAMPLES: usize = 512;

/// Runs every pass over a tensor of more than 2^31 elements.
#[derive(Parser)]
struct Arguments {
    /// Use the stand-in driver, with this device profile.
    #[arg(long)]
    stand_in: Option<String>,
    /// N x C x H x W; H x W is even.
    #[arg(long, default_value = "33x65x1024x1024")]
    shape: String,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cuda = match &arguments.stand_in {
        Some(profile) => {
            emulator::install();
            let context = CudaContext::new(emulator::ordinal(profile))?;
            Cuda::with_cache(context.default_stream(), DiskCache::Off)?
        }
        None => {
            is_available()?;
            Cuda::new(0)?
        }
    };
    let shape = arguments.shape()?;
    let elements = shape.len()?;
    let mut cases = Vec::new();
    for shape in [shape, shape.channels_last()] {
        for choice in [Choice::default(), Choice::GENERAL] {
            cases.push(run(&cuda.with_choice(choice), shape)?);
        }
    }
    let report = json!({
        "device": cuda.limits().name,
        "driver": if arguments.stand_in.is_some() { "stand-in" } else { "real" },
        "elements": elements,
        "beyond_2_31": elements > 1 << 31,
        "cases": cases,
    });
    println!("{report:#}");
    Ok(())
}

impl Arguments {
    fn shape(&self) -> Result<Shape> {
        let sizes: Vec<usize> = self
            .shape
            .split('x')
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?;
        match sizes[..] {
            [n, c, h, w] if (h * w).is_multiple_of(2) && n > 0 => Ok(Shape::nchw(n, c, h, w)),
            _ => Err(format!("{:?}: expected NxCxHxW with an even plane", self.shape).into()),
        }
    }
}

/// 1 or -1: by turns along the pixels of an image.
fn sign(shape: Shape, index: usize) -> f32 {
    let pixel = match shape.layout {
        Layout::Nchw => index,
        Layout::Nhwc => index / shape.channels,
    };
    if pixel.is_multiple_of(2) { 1.0 } else { -1.0 }
}

/// m, a whole number from -3 to 3.
fn mean(shape: Shape, index: usize) -> f32 {
    let channel = match shape.layout {
        Layout::Nchw => index / (shape.height * shape.width) % shape.channels,
        Layout::Nhwc => index % shape.channels,
    };
    (channel % 7) as f32 - 3.0
}

/// A tensor whose images are all the same: one is uploaded, the others are copies of it.
fn images(cuda: &Cuda, shape: Shape, value: impl Fn(usize) -> f32) -> Result<CudaSlice<f16>> {
    let image = shape.len()? / shape.batch;
    let host: Vec<f16> = (0..image).map(|i| f16::from_f32(value(i))).collect();
    let first = cuda.upload(&host)?;
    let mut all = cuda.zeros(shape.len()?)?;
    for number in 0..shape.batch {
        cuda.copy(first.as_view(), all.slice_mut(number * image..(number + 1) * image))?;
    }
    Ok(all)
}

/// Compares samples of a tensor with what they must be: at both ends, around 2^31 and 2^32 elements and bytes, and evenly over
/// all of it.
fn check(cuda: &Cuda, name: &str, tensor: &CudaSlice<f16>, expected: impl Fn(usize) -> f32) -> Result<usize> {
    let len = tensor.len();
    let edges = [1usize << 30, 1 << 31, 1 << 32].map(|edge| edge.saturating_sub(SAMPLE / 2));
    let evenly = (0..=SAMPLES).map(|i| (len - SAMPLE) / SAMPLES * i);
    let starts = edges.into_iter().chain(evenly).chain([len - SAMPLE]);
    let mut looked_at = 0;
    for start in starts.filter(|start| start + SAMPLE <= len) {
        let got = cuda.to_vec(tensor.slice(start..start + SAMPLE))?;
        for (offset, got) in got.into_iter().enumerate() {
            let want = f16::from_f32(expected(start + offset));
            // One unit in the last place of f16, for the rounding of what is rounded before it is rounded.
            if (got.to_f32() - want.to_f32()).abs() > want.to_f32().abs() / 1024.0 {
                return Err(format!("{name}[{}] is {got}, not {want}", start + offset).into());
            }
            looked_at += 1;
        }
    }
    Ok(looked_at)
}

/// Forward, evaluation and backward over one shape.
fn run(cuda: &Cuda, shape: Shape) -> Result<Value> {
    let values = shape.values_per_channel()? as f32;
    let config = BatchNorm2dConfig::new(shape.channels).eps(1.0).momentum(1.0);
    let mut bn: BatchNorm2d<Cuda> = BatchNorm2d::new(cuda, config)?;
    let mut saved = bn.prepare::<f16>(shape)?;
    let mut gradients = bn.gradients()?;
    let x = images(cuda, shape, |i| mean(shape, i) + sign(shape, i))?;
    let mut dy = images(cuda, shape, |i| sign(shape, i))?;
    let mut y = cuda.zeros::<f16>(shape.len()?)?;
    let root = 0.5f32.sqrt();
    let mut samples = 0;

    bn.forward_train(&x, &mut y, &mut saved)?;
    samples += check(cuda, "y", &y, |i| root * sign(shape, i))?;
    let unbiased = values / (values - 1.0);
    for (c, (mean, variance)) in read(cuda, bn.running_mean())?
        .into_iter()
        .zip(read(cuda, bn.running_var())?)
        .enumerate()
    {
        let expected = (c % 7) as f32 - 3.0;
        if (mean - expected).abs() > 1e-5 || (variance - unbiased).abs() > 1e-5 {
            return Err(format!("channel {c}: mean {mean}, variance {variance}, not {expected} and {unbiased}").into());
        }
    }

    bn.backward_with(Backward::in_place(&x, &mut dy).parameters(&mut gradients), &mut saved)?;
    samples += check(cuda, "dx", &dy, |i| root / 2.0 * sign(shape, i))?;
    for (c, (dweight, dbias)) in read(cuda, Some(&gradients.weight))?
        .into_iter()
        .zip(read(cuda, Some(&gradients.bias))?)
        .enumerate()
    {
        if (dweight / (values * root) - 1.0).abs() > 1e-5 || dbias.abs() > values * 1e-6 {
            return Err(format!(
                "channel {c}: dweight {dweight}, dbias {dbias}, not {} and 0",
                values * root
            )
            .into());
        }
    }

    // By the running statistics, which are those of this batch with the unbiased variance.
    bn.forward_eval_with(shape, Forward::new(&x, &mut y))?;
    let invstd = (unbiased + 1.0).sqrt().recip();
    samples += check(cuda, "evaluated", &y, |i| invstd * sign(shape, i))?;

    let problem = Problem::new(Operation::Train, shape, Dtype::F16);
    let plan = Plan::chosen(&problem, cuda.limits(), cuda.choice())?;
    let wide = plan.kernels.iter().all(|launch| launch.instantiation.wide_index);
    Ok(json!({
        "shape": shape.to_string(),
        "samples": samples,
        "kernels": plan.kernels.iter().map(|launch| launch.instantiation.to_string()).collect::<Vec<_>>(),
        "wide_index": wide,
    }))
}

fn read(cuda: &Cuda, buffer: Option<&CudaSlice<f32>>) -> Result<Vec<f32>> {
    Ok(cuda.read(buffer.ok_or("the module has no such buffer")?)?)
}
