//! A training step of one layer in candle, forward and backward: this crate's module against candle-nn's.
//!
//!     cargo bench --features candle --bench candle
//!
//! On the CPU, `f32`, with the threads of rayon's pool. Both include what candle's autograd does by itself.

use batchnorm_cuda::candle::batch_norm;
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SHAPES: [[usize; 4]; 2] = [[32, 64, 28, 28], [32, 256, 14, 14]];

fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("candle");
    for shape in SHAPES {
        let [_, channels, ..] = shape;
        let x = Tensor::randn(0f32, 1.0, &shape, &Device::Cpu).expect("memory");
        let dy = Tensor::randn(0f32, 1.0, &shape, &Device::Cpu).expect("memory");
        let x = Var::from_tensor(&x).expect("memory");
        let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        let own = batch_norm(channels, 1e-5, vb()).expect("a module");
        let theirs = candle_nn::batch_norm(channels, 1e-5, vb()).expect("a module");
        let modules: [(&str, &dyn ModuleT); 2] = [("batchnorm-cuda", &own), ("candle-nn", &theirs)];
        group.throughput(Throughput::Bytes(4 * shape.iter().product::<usize>() as u64));
        for (name, module) in modules {
            let forward = || module.forward_t(&x, true);
            let step = || -> Result<()> { (forward()? * &dy)?.sum_all()?.backward().map(|_| ()) };
            let label = |pass| BenchmarkId::new(format!("{name}/{pass}"), format!("{shape:?}"));
            group.bench_function(label("forward"), |bench| bench.iter(|| forward().expect("a pass")));
            group.bench_function(label("step"), |bench| bench.iter(|| step().expect("a step")));
        }
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
