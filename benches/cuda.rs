//! Throughput of the CUDA backend, timed by CUDA events, beside a device copy of the same tensor.
//!
//!     cargo bench --bench cuda
//!
//! Bytes are the fewest that any implementation must move (forward and evaluation 2T, backward 3T, copy 2T), so that
//! criterion's GB/s compare with each other and with the device's bandwidth. `cold` rotates among tensors that together are
//! more than four times the L2 cache; `warm` uses one set of tensors again and again.
//!
//! Where CUDA cannot be used it says why and measures nothing: the stand-in driver's times would say nothing about a GPU.

mod shapes;

use std::time::Duration;

use batchnorm_cuda::cuda::is_available;
use batchnorm_cuda::cudarc::driver::CudaSlice;
use batchnorm_cuda::cudarc::driver::sys::CUevent_flags;
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Element, Gradients, Real, Result, Saved, Shape};
use criterion::{BenchmarkId, Criterion, Throughput};

fn main() -> Result<()> {
    if let Err(reason) = is_available() {
        println!("cuda: nothing was measured: {reason}");
        return Ok(());
    }
    let cuda = Cuda::new(0)?;
    println!("cuda: on {}", cuda.limits().name);
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    for shape in shapes::resnet_50() {
        bench::<f32>(&mut criterion, &cuda, shape)?;
        bench::<f16>(&mut criterion, &cuda, shape)?;
    }
    criterion.final_summary();
    Ok(())
}

/// The tensors of one step.
struct Tensors<T: Element> {
    x: CudaSlice<T>,
    y: CudaSlice<T>,
    dy: CudaSlice<T>,
    dx: CudaSlice<T>,
}

/// What is timed: one pass over one set of tensors.
struct Step<T: Element> {
    cuda: Cuda,
    bn: BatchNorm2d<Cuda, T::Param>,
    saved: Saved<Cuda, T>,
    gradients: Gradients<Cuda, T::Param>,
    shape: Shape,
}

type Pass<T> = fn(&mut Step<T>, &mut Tensors<T>) -> Result<()>;

fn bench<T: Element>(criterion: &mut Criterion, cuda: &Cuda, shape: Shape) -> Result<()> {
    let bn = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(shape.channels))?;
    let mut step = Step {
        cuda: cuda.clone(),
        saved: bn.prepare::<T>(shape)?,
        gradients: bn.gradients()?,
        bn,
        shape,
    };
    let len = shape.len()?;
    // A pass touches two or three of the four tensors of a set.
    let sets = 1 + (4 * cuda.limits().l2_cache / shapes::bytes::<T>(shape, 2)) as usize;
    let values: Vec<T> = (0..len)
        .map(|i| T::from_param(T::Param::from_f64((i * 7919 % 4096) as f64 / 1024.0 - 2.0)))
        .collect();
    let mut tensors = (0..sets)
        .map(|_| {
            Ok(Tensors {
                x: cuda.upload(&values)?,
                y: cuda.zeros(len)?,
                dy: cuda.upload(&values)?,
                dx: cuda.zeros(len)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;

    let passes: [(&str, u64, Pass<T>); 4] = [
        ("copy", 2, |step, tensors| {
            step.cuda.copy(tensors.x.as_view(), tensors.y.as_view_mut())
        }),
        ("forward training", 2, |step, tensors| {
            step.bn.forward_train(&tensors.x, &mut tensors.y, &mut step.saved)
        }),
        ("evaluation", 2, |step, tensors| {
            step.bn.forward_eval(step.shape, &tensors.x, &mut tensors.y)
        }),
        ("backward", 3, |step, tensors| {
            let Tensors { x, dy, dx, .. } = tensors;
            step.bn.backward(x, dy, &mut step.saved, dx, &mut step.gradients)
        }),
    ];
    for (cache, sets) in [("cold", sets), ("warm", 1)] {
        for (name, times, pass) in passes {
            let mut group = criterion.benchmark_group(format!("cuda {name}, {cache} L2"));
            group.throughput(Throughput::Bytes(shapes::bytes::<T>(shape, times)));
            group.bench_function(BenchmarkId::from_parameter(shapes::name::<T>(shape)), |bencher| {
                bencher.iter_custom(|iterations| {
                    time(&mut step, &mut tensors[..sets], pass, iterations).expect("a pass that runs")
                });
            });
        }
    }
    Ok(())
}

/// Time on the device of so many passes, one after another, each on the next set of tensors.
fn time<T: Element>(
    step: &mut Step<T>,
    tensors: &mut [Tensors<T>],
    pass: Pass<T>,
    iterations: u64,
) -> Result<Duration> {
    let stream = step.cuda.stream().clone();
    let event = || {
        stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .expect("an event")
    };
    let start = event();
    let sets = tensors.len();
    for iteration in 0..iterations {
        pass(step, &mut tensors[iteration as usize % sets])?;
    }
    let milliseconds = start.elapsed_ms(&event()).expect("the time between two events");
    Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
}
