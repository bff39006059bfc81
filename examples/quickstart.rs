//! The main job on real input: a training step on the example of PyTorch's documentation, number by number, then the speed
//! of a real batch. Runs on the GPU if there is one, else on the CPU; the program is the same.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchnorm_cuda::cuda::plan::{Operation, Plan, Problem};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cpu, Cuda, Element, Error, Real, Result, Shape};

fn main() -> ExitCode {
    let done = match Cuda::new(0) {
        Ok(cuda) => {
            println!("Runs on the GPU: {}.\n", cuda.limits().name);
            run(&cuda).map(|()| print_compile_report(&cuda))
        }
        Err(Error::Unavailable(reason)) => {
            println!("Runs on the CPU, because CUDA cannot be used here:\n{reason}\n");
            run(&Cpu::new())
        }
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run<D: Device>(device: &D) -> Result<()> {
    training_step(device)?;
    println!("Speed: a training forward pass over {}", real_batch());
    speed::<D, f32>(device)?;
    speed::<D, f16>(device)
}

/// What the two devices do not do alike: counting bytes.
trait Device: Backend {
    /// Bytes of a pass, and what these are.
    fn bytes(&self, problem: &Problem) -> Result<(u64, &'static str)>;
}

impl Device for Cpu {
    fn bytes(&self, problem: &Problem) -> Result<(u64, &'static str)> {
        let elements = problem.shape.len()? as u64;
        let tensor = elements * problem.dtype.size() as u64;
        Ok((2 * tensor, "x read once, y written once: the least there can be"))
    }
}

impl Device for Cuda {
    fn bytes(&self, problem: &Problem) -> Result<(u64, &'static str)> {
        let plan = Plan::new(problem, self.limits())?;
        Ok((
            plan.traffic().bytes(),
            "of the plan: all that its kernels read and write",
        ))
    }
}

/// One training step: forward, running statistics, backward.
fn training_step<D: Device>(device: &D) -> Result<()> {
    let shape = Shape::nchw(1, 3, 4, 4);
    let numbers: Vec<f32> = (0..48u8).map(f32::from).collect();

    let mut bn = BatchNorm2d::new(device, BatchNorm2dConfig::new(3))?;
    println!("BatchNorm2d(3), x = arange(48).reshape(1, 3, 4, 4)");
    print_parameters(&bn)?;
    print_running_statistics(&bn)?;

    let mut saved = bn.prepare::<f32>(shape)?;
    let x = device.upload(&numbers)?;
    let mut y = device.zeros::<f32>(numbers.len())?;
    bn.forward_train(&x, &mut y, &mut saved)?;
    println!("\nforward in training: y");
    print_tensor(shape, &device.read(&y)?);
    print_vector("mean of the batch", &saved.mean()?);
    print_vector("1 / sqrt(variance of the batch + eps)", &saved.invstd()?);
    print_running_statistics(&bn)?;

    // The gradient of a loss that is the sum of the first row of every plane.
    let gradient: Vec<f32> = (0..48).map(|i| if i % 16 < 4 { 1.0 } else { 0.0 }).collect();
    let dy = device.upload(&gradient)?;
    let mut dx = device.zeros::<f32>(numbers.len())?;
    let mut gradients = bn.gradients()?;
    bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)?;
    println!("\nbackward, dy = 1 in the first row of every plane, else 0: dx");
    print_tensor(shape, &device.read(&dx)?);
    print_vector("dweight", &device.read(&gradients.weight)?);
    print_vector("dbias", &device.read(&gradients.bias)?);
    println!();
    Ok(())
}

fn print_parameters<D: Device>(bn: &BatchNorm2d<D>) -> Result<()> {
    for (name, parameter) in [("weight", bn.weight()), ("bias", bn.bias())] {
        if let Some(parameter) = parameter {
            print_vector(name, &bn.backend().read(parameter)?);
        }
    }
    Ok(())
}

fn print_running_statistics<D: Device>(bn: &BatchNorm2d<D>) -> Result<()> {
    for (name, statistic) in [("running_mean", bn.running_mean()), ("running_var", bn.running_var())] {
        if let Some(statistic) = statistic {
            print_vector(name, &bn.backend().read(statistic)?);
        }
    }
    if let Some(batches) = bn.num_batches_tracked()? {
        println!("  num_batches_tracked {batches}");
    }
    Ok(())
}

fn print_vector(name: &str, values: &[f32]) {
    println!("  {name} {}", row(values, 0));
}

/// Prints a tensor as PyTorch does.
fn print_tensor(shape: Shape, values: &[f32]) {
    const OPENING: &str = "tensor([[[";
    let width = values
        .iter()
        .map(|value| format!("{value:.4}").len())
        .max()
        .unwrap_or(0);
    let planes: Vec<String> = values
        .chunks(shape.height * shape.width)
        .map(|plane| {
            let rows: Vec<String> = plane.chunks(shape.width).map(|values| row(values, width)).collect();
            rows.join(&format!(",\n{:1$}", "", OPENING.len()))
        })
        .collect();
    let between = format!("],\n\n{:1$}[", "", OPENING.len() - 1);
    println!("{OPENING}{}]]])", planes.join(&between));
}

fn row(values: &[f32], width: usize) -> String {
    let numbers: Vec<String> = values.iter().map(|value| format!("{value:width$.4}")).collect();
    format!("[{}]", numbers.join(", "))
}

/// An early layer of a ResNet-50 at batch size 32.
fn real_batch() -> Shape {
    Shape::nchw(32, 64, 56, 56)
}

/// Times the training forward pass: wall clock over many passes, the device being waited for at both ends.
fn speed<D: Device, T: Element<Param = f32>>(device: &D) -> Result<()> {
    const LEAST_TIME: Duration = Duration::from_millis(500);
    const PASSES_AT_A_TIME: u32 = 10;

    let shape = real_batch();
    let mut bn = BatchNorm2d::new(device, BatchNorm2dConfig::new(shape.channels))?;
    let mut saved = bn.prepare::<T>(shape)?;
    let x = device.upload(&noise::<T>(shape.len()?))?;
    let mut y = device.zeros::<T>(shape.len()?)?;
    let mut passes = |count: u32| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..count {
            bn.forward_train(&x, &mut y, &mut saved)?;
        }
        device.synchronize()?;
        Ok(start.elapsed())
    };

    passes(PASSES_AT_A_TIME)?; // caches, clocks and page tables warm up
    let (mut count, mut time) = (0, Duration::ZERO);
    while time < LEAST_TIME {
        time += passes(PASSES_AT_A_TIME)?;
        count += PASSES_AT_A_TIME;
    }
    let seconds = time.as_secs_f64() / f64::from(count);
    let (bytes, counted) = device.bytes(&Problem::new(Operation::Train, shape, T::DTYPE))?;
    println!(
        "  {}: {:.1} us, mean of {count} passes; {bytes} bytes ({counted}); {:.1} GB/s",
        T::DTYPE,
        seconds * 1e6,
        bytes as f64 / seconds / 1e9,
    );
    Ok(())
}

/// Numbers between -1 and 1, the same on every run: the upper half of a linear congruential generator's state.
fn noise<T: Element<Param = f32>>(len: usize) -> Vec<T> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        T::from_param(f32::from_f64((state >> 32) as f64 / f64::from(1u32 << 31) - 1.0))
    };
    (0..len).map(|_| next()).collect()
}

fn print_compile_report(cuda: &Cuda) {
    let report = cuda.compile_report();
    let start = if report.compiled > 0 { "cold" } else { "warm" };
    println!(
        "\nKernels ({start} start): {} compiled, {} from the disk cache, in {:.1} ms; loaded in {:.1} ms.",
        report.compiled,
        report.from_disk,
        report.compile_time.as_secs_f64() * 1e3,
        report.load_time.as_secs_f64() * 1e3,
    );
}
