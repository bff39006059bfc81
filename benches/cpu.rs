//! The CPU backend beside a copy of the same tensor: forward in training, evaluation, backward.
//!
//! Throughput is that of the least traffic a pass can have (see `shapes`), so that it can be compared with the copy's.
//! The backend runs on rayon's threads (`RAYON_NUM_THREADS`), and so does the copy.
//!
//!     cargo bench --bench cpu                                   everything: a few minutes
//!     cargo bench --bench cpu -- forward_train/f32              one pass, one element
//!     cargo bench --bench cpu -- '32x64x56x56'                  one shape
//!     cargo bench --bench cpu -- --measurement-time 5           longer, for steadier figures

mod shapes;

use std::hint::black_box;
use std::time::Duration;

use batchnorm_cuda::half::f16;
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Element, Gradients, Real, Result, Saved, Shape};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;

/// All that the passes over one shape need.
struct Step<T: Element> {
    shape: Shape,
    module: BatchNorm2d<Cpu, T::Param>,
    saved: Saved<Cpu, T>,
    gradients: Gradients<Cpu, T::Param>,
    x: Vec<T>,
    dy: Vec<T>,
    result: Vec<T>,
}

impl<T: Element> Step<T> {
    fn new(shape: Shape) -> Result<Self> {
        let len = shape.len()?;
        // Without a pattern that a cache or a predictor could make something of.
        let tensor = |seed: usize| -> Vec<T> {
            (0..len)
                .map(|i| (i + seed).wrapping_mul(2_654_435_761) >> 8 & 0xffff)
                .map(|bits| T::from_param(T::Param::from_f64(bits as f64 / 65536.0 - 0.5)))
                .collect()
        };
        let module = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(shape.channels))?;
        let mut step = Self {
            shape,
            saved: module.prepare(shape)?,
            gradients: module.gradients()?,
            module,
            x: tensor(0),
            dy: tensor(1),
            result: tensor(2),
        };
        // The backward pass needs the statistics of a forward pass.
        step.forward_train()?;
        Ok(step)
    }

    fn copy(&mut self) -> Result<()> {
        let share = self.x.len().div_ceil(rayon::current_num_threads());
        black_box(&mut self.result)
            .par_chunks_mut(share)
            .zip(black_box(&self.x).par_chunks(share))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    fn forward_train(&mut self) -> Result<()> {
        self.module.forward_train(&self.x, &mut self.result, &mut self.saved)
    }

    fn forward_eval(&mut self) -> Result<()> {
        self.module.forward_eval(self.shape, &self.x, &mut self.result)
    }

    fn backward(&mut self) -> Result<()> {
        self.module.backward(
            &self.x,
            &self.dy,
            &mut self.saved,
            &mut self.result,
            &mut self.gradients,
        )
    }
}

/// A pass over all shapes; `tensors` are those it must read or write.
fn pass<T: Element>(criterion: &mut Criterion, name: &str, tensors: u64, run: fn(&mut Step<T>) -> Result<()>) {
    let mut group = criterion.benchmark_group(format!("cpu/{name}"));
    for shape in shapes::resnet_50() {
        // Made when it is first needed: not for what a filter leaves out.
        let mut step = None;
        group.throughput(Throughput::Bytes(shapes::bytes::<T>(shape, tensors)));
        group.bench_function(shapes::name::<T>(shape), |bencher| {
            let step = step.get_or_insert_with(|| Step::new(shape).expect("a shape of ResNet-50"));
            bencher.iter(|| run(step).expect("a step of the prepared shape"));
        });
    }
    group.finish();
}

fn element<T: Element>(criterion: &mut Criterion) {
    pass::<T>(criterion, "copy", 2, Step::copy);
    pass::<T>(criterion, "forward_train", 2, Step::forward_train);
    pass::<T>(criterion, "forward_eval", 2, Step::forward_eval);
    pass::<T>(criterion, "backward", 3, Step::backward);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = element::<f32>, element::<f16>
}
criterion_main!(benches);
