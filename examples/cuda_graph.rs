//! A training step captured in a CUDA graph and replayed: one launch for forward and backward, with a new batch each time.
//! The replayed graph goes on counting batches, and gives the same bits as the same steps launched one by one.
//!
//!     cargo run --release --example cuda_graph                 # on a machine with a GPU
//!     cargo run --release --example cuda_graph -- --stand-in   # anywhere: on the stand-in driver of the tests
//!
//! Without a GPU and without `--stand-in` it says what is missing, and that nothing was captured.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use batchnorm_cuda::cudarc::driver::{CudaContext, CudaGraph, CudaSlice};
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Gradients, Momentum, Result, Saved, Shape, cuda};
use clap::Parser;

/// Captures a training step in a CUDA graph and replays it.
#[derive(Parser)]
struct Arguments {
    /// Use the stand-in driver.
    #[arg(long)]
    stand_in: bool,
    /// How many batches to train on.
    #[arg(long, default_value_t = 20)]
    steps: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.stand_in {
        emulator::install();
    } else if let Err(reason) = cuda::is_available() {
        println!("No graph was captured, because CUDA cannot be used here:\n{reason}");
        println!("With --stand-in the example runs on the stand-in driver.");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cuda_graph: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> std::result::Result<(), Box<dyn Error>> {
    let context = CudaContext::new(0)?;
    // A graph cannot hold the events by which cudarc orders the streams of a context.
    // SAFETY: every buffer of this program is used on one stream only, so no work needs events to be ordered.
    unsafe { context.disable_event_tracking() };
    let shape = if arguments.stand_in {
        Shape::nchw(4, 8, 6, 6)
    } else {
        Shape::nchw(32, 64, 28, 28)
    };

    let mut direct = Training::new(&context, arguments, shape)?;
    let mut replayed = Training::new(&context, arguments, shape)?;
    let driver = if arguments.stand_in {
        ", as the stand-in driver has it"
    } else {
        ""
    };
    println!("{shape} on {}{driver}", direct.device.limits().name);

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

    for step in 1..=arguments.steps {
        direct.load_batch(step)?;
        direct.step()?;
        replayed.load_batch(step)?;
        graph.launch()?;
    }
    let (one_by_one, by_graph) = (direct.module.state_dict()?, replayed.module.state_dict()?);
    println!(
        "after {} batches: num_batches_tracked is {:?} one by one, {:?} by the graph",
        arguments.steps, one_by_one.num_batches_tracked, by_graph.num_batches_tracked
    );
    if one_by_one != by_graph || direct.results()? != replayed.results()? {
        return Err("the graph's results differ from those of the steps one by one".into());
    }
    println!("y, dx, gradients and running statistics are the same to the bit");

    if !arguments.stand_in {
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
    fn new(
        context: &Arc<CudaContext>,
        arguments: &Arguments,
        shape: Shape,
    ) -> std::result::Result<Self, Box<dyn Error>> {
        // The default stream cannot be captured.
        let stream = context.new_stream()?;
        // Kernels of the stand-in have no business among those of the user.
        let cache = if arguments.stand_in {
            DiskCache::Off
        } else {
            DiskCache::Default
        };
        let device = Cuda::with_cache(stream, cache)?;
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
