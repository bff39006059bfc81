//! The same steps one by one and by a graph, on two modules that begin alike.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaGraph, CudaSlice};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Gradients, Momentum, Result, Saved, Shape};

/// What is run.
pub struct Comparison {
    /// Of the batches.
    pub shape: Shape,
    /// How many batches there are.
    pub steps: usize,
    /// Where compiled kernels are kept.
    pub cache: DiskCache,
    /// Whether steps are timed in the end.
    pub timed: bool,
}

/// Trains one module step by step and another one by a graph, and holds them against each other to the bit.
pub fn compare(comparison: &Comparison) -> std::result::Result<(), Box<dyn Error>> {
    let Comparison { shape, steps, .. } = *comparison;
    let context = CudaContext::new(0)?;
    // A graph cannot hold the events by which cudarc orders the streams of a context.
    // SAFETY: every buffer of this program is used on one stream only, so no work needs events to be ordered.
    unsafe { context.disable_event_tracking() };
    let mut direct = Training::new(&context, comparison)?;
    let mut replayed = Training::new(&context, comparison)?;
    println!("{shape} on {}", direct.device.limits().name);

    // Once before the capture, so that everything is loaded.
    for training in [&mut direct, &mut replayed] {
        training.load_batch(0)?;
        training.step()?;
    }
    let graph = replayed.capture()?;
    println!(
        "captured: forward and backward; num_batches_tracked is still {:?}",
        replayed.module.num_batches_tracked()?
    );

    for step in 1..=steps {
        direct.load_batch(step)?;
        direct.step()?;
        replayed.load_batch(step)?;
        graph.launch()?;
    }
    let (one_by_one, by_graph) = (direct.module.state_dict()?, replayed.module.state_dict()?);
    println!(
        "after {} batches: num_batches_tracked is {:?} one by one, {:?} by the graph",
        steps, one_by_one.num_batches_tracked, by_graph.num_batches_tracked
    );
    if one_by_one != by_graph || direct.results()? != replayed.results()? {
        return Err("the graph's results differ from those of the steps one by one".into());
    }
    println!("y, dx, gradients and running statistics are the same to the bit");

    if comparison.timed {
        let steps = 1000;
        let time = |step: &mut dyn FnMut() -> std::result::Result<(), Box<dyn Error>>| {
            let start = Instant::now();
            (0..steps).try_for_each(|_| step())?;
            context.synchronize()?;
            Ok::<_, Box<dyn Error>>(start.elapsed().as_secs_f64() / f64::from(steps) * 1e6)
        };
        let one_by_one = time(&mut || Ok(direct.step()?))?;
        let by_graph = time(&mut || Ok(graph.launch()?))?;
        println!("a step takes {one_by_one:.1} µs one by one, {by_graph:.1} µs by the graph");
    }
    Ok(())
}

/// A module with everything that a step of it touches: a graph holds the addresses.
struct Training {
    device: Cuda,
    module: BatchNorm2d<Cuda>,
    saved: Saved<Cuda, f16>,
    gradients: Gradients<Cuda, f32>,
    x: CudaSlice<f16>,
    y: CudaSlice<f16>,
    dy: CudaSlice<f16>,
    dx: CudaSlice<f16>,
}

impl Training {
    fn new(context: &Arc<CudaContext>, comparison: &Comparison) -> std::result::Result<Self, Box<dyn Error>> {
        let shape = comparison.shape;
        // The default stream cannot be captured.
        let device = Cuda::with_cache(context.new_stream()?, comparison.cache.clone())?;
        // The factor of the average changes with every batch. It is on the device, so the graph need not change.
        let config = BatchNorm2dConfig::new(shape.channels).momentum(Momentum::CumulativeAverage);
        let module = BatchNorm2d::new(&device, config)?;
        let blank = || device.zeros::<f16>(shape.len()?);
        Ok(Self {
            saved: module.prepare(shape)?,
            gradients: module.gradients()?,
            module,
            x: blank()?,
            y: blank()?,
            dy: blank()?,
            dx: blank()?,
            device,
        })
    }

    /// A new batch in the place of the old.
    fn load_batch(&mut self, number: usize) -> Result<()> {
        let batch = |seed: usize| -> Vec<f16> {
            (0..self.x.len())
                .map(|i| f16::from_f64(((i * 7919 + (2 * number + seed) * 104_729) as f64 * 0.618) % 4.0 - 2.0))
                .collect()
        };
        let (x, dy) = (self.device.upload(&batch(0))?, self.device.upload(&batch(1))?);
        self.device.copy(x.as_view(), self.x.as_view_mut())?;
        self.device.copy(dy.as_view(), self.dy.as_view_mut())
    }

    fn step(&mut self) -> Result<()> {
        self.module.forward_train(&self.x, &mut self.y, &mut self.saved)?;
        self.module
            .backward(&self.x, &self.dy, &mut self.saved, &mut self.dx, &mut self.gradients)
    }

    fn capture(&mut self) -> std::result::Result<CudaGraph, Box<dyn Error>> {
        let stream = self.device.stream().clone();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let step = self.step();
        // The capture must end even if the step could not be captured.
        let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        step?;
        Ok(graph?.ok_or("nothing was captured")?)
    }

    /// Everything that a step gives, as bits.
    fn results(&self) -> Result<Vec<u32>> {
        let mut bits = Vec::new();
        for tensor in [&self.y, &self.dx] {
            bits.extend(
                self.device
                    .read(tensor)?
                    .into_iter()
                    .map(|value| u32::from(value.to_bits())),
            );
        }
        for vector in [&self.gradients.weight, &self.gradients.bias] {
            bits.extend(self.device.read(vector)?.into_iter().map(f32::to_bits));
        }
        Ok(bits)
    }
}
