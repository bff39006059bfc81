//! What a call costs the host: the time from entering a CUDA forward or backward call to leaving it, with launches made
//! empty by the stand-in driver. A real launch adds what the real driver takes.
//!
//!     cargo bench --bench host_overhead
//!
//! The bar is 3 µs for a forward call; the program fails where the best of some rounds takes longer.

#[cfg(target_os = "linux")]
mod on_stand_in {
    use std::time::{Duration, Instant};

    use batchnorm_cuda::cudarc::driver::CudaContext;
    use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Result, Shape};
    use criterion::Criterion;

    const BAR: Duration = Duration::from_micros(3);
    const ROUNDS: u32 = 20;
    const CALLS: u32 = 10_000;

    pub fn bench(criterion: &mut Criterion) -> Result<()> {
        emulator::install();
        let context = CudaContext::new(emulator::ordinal("h200")).expect("the stand-in's device");
        let cuda = Cuda::on_stream(context.default_stream())?;
        let shape = Shape::nchw(32, 64, 56, 56);
        let len = shape.len()?;
        let x = cuda.zeros::<f32>(len)?;
        let dy = cuda.zeros::<f32>(len)?;
        let mut y = cuda.zeros::<f32>(len)?;
        let mut bn: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(64))?;
        let mut saved = bn.prepare::<f32>(shape)?;
        let mut gradients = bn.gradients()?;
        emulator::set_empty_launches(context.cu_ctx(), true);

        let mut group = criterion.benchmark_group("host overhead");
        group.bench_function("forward_train (2 launches)", |bencher| {
            bencher.iter(|| bn.forward_train(&x, &mut y, &mut saved).expect("a forward pass"));
        });
        group.bench_function("forward_eval (1 launch)", |bencher| {
            bencher.iter(|| bn.forward_eval(shape, &x, &mut y).expect("an evaluation"));
        });
        group.bench_function("backward (2 launches)", |bencher| {
            bencher.iter(|| {
                bn.backward(&x, &dy, &mut saved, &mut y, &mut gradients)
                    .expect("a backward pass")
            });
        });
        group.finish();

        let best = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..CALLS {
                    bn.forward_train(&x, &mut y, &mut saved).expect("a forward pass");
                }
                start.elapsed() / CALLS
            })
            .min()
            .expect("some rounds");
        println!(
            "forward_train: {} ns at best, bar {} ns",
            best.as_nanos(),
            BAR.as_nanos()
        );
        assert!(best <= BAR, "a forward call costs the host too much");
        Ok(())
    }
}

fn main() {
    #[cfg(target_os = "linux")]
    {
        let mut criterion = criterion::Criterion::default().configure_from_args();
        on_stand_in::bench(&mut criterion).expect("the stand-in driver");
        criterion.final_summary();
    }
    #[cfg(not(target_os = "linux"))]
    println!("host_overhead: the stand-in driver is for Linux, so nothing was measured");
}
