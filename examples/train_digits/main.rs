//! A small network learns to read real handwritten digits in candle, once with this crate's normalisation and once with
//! candle-nn's, from the same start.
//!
//!     cargo run --release --features candle --example train_digits -- [--epochs N] [--seed N] [--rate R]
//!
//! Prints loss and test accuracy of every epoch and both times, and draws the curves into `train_digits.svg` in the target
//! folder. Fails where a network reads fewer than 97 % of the test images, or where the two learn differently from the
//! start.

mod chart;
mod digits;
mod network;

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use batchnorm_cuda::candle::BatchNorm2d;
use candle_core::{DType, Device, Tensor};
use candle_nn::{BatchNorm, Optimizer, SGD, VarBuilder, VarMap};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use digits::Set;
use network::{Network, Norm};

const BATCH: usize = 32;
const LEAST_ACCURACY: f64 = 0.97;

#[derive(Parser)]
struct Arguments {
    /// How often every training image is seen.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    epochs: u16,
    /// Deals the images, shuffles them, and draws the first weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The learning rate of the first step.
    #[arg(long, default_value_t = 0.02)]
    rate: f64,
}

/// What a training went through.
struct Course {
    name: &'static str,
    /// Of the first step, before anything was learnt.
    first_loss: f64,
    epochs: Vec<Epoch>,
    time: Duration,
}

/// What an epoch came to.
struct Epoch {
    /// Mean cross entropy over the training images, each before its step.
    loss: f64,
    /// Of the test images, how many were read right.
    accuracy: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    // The CPU, unless candle was built for GPUs and there is one.
    let device = Device::cuda_if_available(0)?;
    let sets = digits::load(arguments.seed, &device)?;
    let courses = [
        train::<BatchNorm2d>("batchnorm-cuda", &sets, &arguments, &device)?,
        train::<BatchNorm>("candle-nn", &sets, &arguments, &device)?,
    ];
    check_agreement(&courses)?;
    let path = target_folder()?.join("train_digits.svg");
    chart::draw(&courses, &path)?;
    println!("curves: {}", path.display());
    for course in &courses {
        println!("training time ({}): {:.1} s", course.name, course.time.as_secs_f64());
    }
    let mut accuracies = Vec::new();
    for course in &courses {
        let accuracy = course.epochs.last().ok_or("no epochs")?.accuracy;
        println!("test accuracy ({}): {:.1} %", course.name, 100.0 * accuracy);
        accuracies.push(accuracy);
    }
    if accuracies.iter().any(|&accuracy| accuracy < LEAST_ACCURACY) {
        return Err(format!("a test accuracy is below {:.0} %", 100.0 * LEAST_ACCURACY).into());
    }
    Ok(())
}

/// Fails where two courses from the same start part too soon.
///
/// In the first step only roundings differ, some 1e-7 each. Every step passes the difference on, and enlarges it where a
/// value has come to the other side of a relu or of a maximum (four seeds gave 1e-9 to 7e-4): so the epochs have more room,
/// and only the first ones are compared.
fn check_agreement([own, theirs]: &[Course; 2]) -> Result<(), Box<dyn Error>> {
    const EPOCHS: usize = 3;
    let epochs = own.epochs.iter().zip(&theirs.epochs).take(EPOCHS);
    let losses = epochs.map(|(own, theirs)| (own.loss, theirs.loss, 1e-2));
    for (own, theirs, limit) in [(own.first_loss, theirs.first_loss, 1e-6)].into_iter().chain(losses) {
        let difference = (own / theirs - 1.0).abs();
        println!("losses of both: {own:.6} and {theirs:.6}, {difference:.0e} apart");
        if difference.is_nan() || difference > limit {
            return Err(format!("the losses differ by more than {limit:.0e}").into());
        }
    }
    Ok(())
}

fn train<N: Norm>(
    name: &'static str,
    [train, test]: &[Set; 2],
    arguments: &Arguments,
    device: &Device,
) -> candle_core::Result<Course> {
    let variables = VarMap::new();
    let network = Network::<N>::new(VarBuilder::from_varmap(&variables, DType::F32, device))?;
    let mut random = StdRng::seed_from_u64(arguments.seed);
    draw_weights(&variables, &mut random)?;
    let mut optimizer = SGD::new(variables.all_vars(), 0.0)?;

    let batches = train.len().div_ceil(BATCH);
    let steps = usize::from(arguments.epochs) * batches;
    let bar = ProgressBar::new(steps as u64)
        .with_prefix(name)
        .with_style(ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta}").expect("a template"));
    let mut course = Course {
        name,
        first_loss: f64::NAN,
        epochs: Vec::new(),
        time: Duration::ZERO,
    };
    let mut order: Vec<u32> = (0..train.len() as u32).collect();
    let mut step = 0;
    for epoch in 1..=arguments.epochs {
        let start = Instant::now();
        order.shuffle(&mut random);
        let mut losses = 0.0;
        for numbers in order.chunks(BATCH) {
            let batch = train.select(numbers)?;
            let logits = network.forward(&batch.images, true)?;
            let loss = candle_nn::loss::cross_entropy(&logits, &batch.labels)?;
            optimizer.set_learning_rate(annealed(arguments.rate, step, steps));
            optimizer.backward_step(&loss)?;
            let loss = f64::from(loss.to_scalar::<f32>()?);
            if step == 0 {
                course.first_loss = loss;
            }
            losses += loss * batch.len() as f64;
            step += 1;
            bar.inc(1);
        }
        course.time += start.elapsed();
        let loss = losses / train.len() as f64;
        let accuracy = test.accuracy(&network.forward(&test.images, false)?)?;
        let line = format!(
            "{name}, epoch {epoch}: loss {loss:.4}, test accuracy {:.1} %",
            100.0 * accuracy
        );
        bar.suspend(|| println!("{line}"));
        course.epochs.push(Epoch { loss, accuracy });
    }
    bar.finish_and_clear();
    Ok(course)
}

/// Half a cosine, from the rate of the first step to nothing (Loshchilov and Hutter 2017).
fn annealed(rate: f64, step: usize, steps: usize) -> f64 {
    rate * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos())
}

/// Gives matrices and kernels their first numbers, evenly within the bounds of He et al. 2015. (candle's own cannot be drawn again from a seed on the CPU.)
fn draw_weights(variables: &VarMap, random: &mut StdRng) -> candle_core::Result<()> {
    let data = variables.data().lock().expect("no panic while it was locked");
    let mut names: Vec<_> = data.keys().collect();
    names.sort();
    for name in names {
        let variable = &data[name];
        if variable.rank() < 2 {
            continue;
        }
        let inputs: usize = variable.dims()[1..].iter().product();
        let bound = (1.0 / inputs as f32).sqrt();
        let values: Vec<f32> = (0..variable.elem_count())
            .map(|_| random.random_range(-bound..bound))
            .collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), variable.device())?)?;
    }
    Ok(())
}

/// Where cargo has put this program: `target/release/examples` or the like.
fn target_folder() -> Result<PathBuf, Box<dyn Error>> {
    let program = std::env::current_exe()?;
    Ok(program
        .ancestors()
        .nth(3)
        .ok_or("the program lies in no target folder")?
        .into())
}
