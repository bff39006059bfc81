//! Prints what will run for a shape on a device: which kernels, with which launch shapes, moving how many bytes. No GPU is
//! needed.
//!
//! ```text
//! cargo run --example plan -- --device h200 --shape 32x64x56x56 --element f16 --layout nchw --op train
//! ```

use std::process::ExitCode;

use batchnorm_cuda::cuda::DeviceLimits;
use batchnorm_cuda::cuda::plan::{KernelLaunch, Operation, Plan, Problem};
use batchnorm_cuda::{Dtype, Epilogue, Layout, Shape};
use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};

/// Prints the plan of one pass: kernels, launch shapes, bytes.
#[derive(Parser)]
#[command(name = "plan", max_term_width = 100)]
struct Arguments {
    /// The GPU.
    #[arg(long, default_value = "h200", value_parser = PossibleValuesParser::new(DeviceLimits::NAMES))]
    device: String,

    /// N x C x H x W, whatever the layout: 32x64x56x56.
    #[arg(long, value_parser = dimensions)]
    shape: [usize; 4],

    /// What the tensors hold.
    #[arg(long, default_value = "f32", value_parser = named::<Dtype>(Dtype::ALL.map(Dtype::name)))]
    element: Dtype,

    /// The order of the elements in memory.
    #[arg(long, default_value = "nchw", value_parser = named::<Layout>([Layout::Nchw, Layout::Nhwc].map(Layout::name)))]
    layout: Layout,

    /// What is computed.
    #[arg(long, default_value = "train", value_parser = named::<Operation>(Operation::ALL.map(Operation::name)))]
    op: Operation,

    /// What is fused behind the normalisation.
    #[arg(long, default_value = "none", value_parser = named::<Epilogue>(Epilogue::ALL.map(Epilogue::name)))]
    epilogue: Epilogue,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let [batch, channels, height, width] = arguments.shape;
    let shape = Shape {
        layout: arguments.layout,
        ..Shape::nchw(batch, channels, height, width)
    };
    let limits = DeviceLimits::named(&arguments.device).expect("the parser lets only known names pass");
    let problem = Problem::new(arguments.op, shape, arguments.element).epilogue(arguments.epilogue);
    match Plan::new(&problem, &limits) {
        Ok(plan) if arguments.json => println!("{:#}", to_json(&plan)),
        Ok(plan) => println!("{plan}"),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn to_json(plan: &Plan) -> Value {
    let Problem {
        operation,
        shape,
        dtype,
        epilogue,
        ..
    } = plan.problem;
    json!({
        "device": plan.device,
        "op": operation.name(),
        "shape": [shape.batch, shape.channels, shape.height, shape.width],
        "layout": shape.layout.name(),
        "element": dtype.name(),
        "epilogue": epilogue.name(),
        "kernels": plan.kernels.iter().map(launch_to_json).collect::<Vec<_>>(),
        "bytes": plan.traffic().bytes(),
        "minimum_bytes": plan.minimum_bytes(),
        "traffic_ratio": plan.traffic_ratio(),
    })
}

fn launch_to_json(launch: &KernelLaunch) -> Value {
    let instantiation = &launch.instantiation;
    json!({
        "name": instantiation.kernel.name(),
        "grid": launch.grid,
        "block": launch.block(),
        "shared_bytes": launch.shared_bytes,
        "walk": instantiation.walk.name(),
        "vector": instantiation.vector,
        "unroll": instantiation.unroll,
        "bytes": launch.traffic.bytes(),
    })
}

/// A parser of the library's own names for a type, so that `--help` lists them.
fn named<T>(names: impl IntoIterator<Item = &'static str>) -> impl TypedValueParser<Value = T>
where
    T: std::str::FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}

fn dimensions(text: &str) -> Result<[usize; 4], String> {
    let numbers: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
    numbers
        .ok()
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| "expected four numbers with x between them, as in 32x64x56x56".into())
}
