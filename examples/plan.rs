//! Prints what will run for a shape on a device: which kernels, with which launch shapes, moving how many bytes. No GPU is
//! needed. Times are modelled, not measured.
//!
//! ```text
//! cargo run --example plan                              # every shape of ResNet-50, forward and backward
//! cargo run --example plan -- --device h200 --shape 32x64x56x56 --element f16 --layout nchw --op train
//! cargo run --example plan -- --shape 32x64x56x56 --candidates     # all legal ways, the fastest by the model first
//! cargo run --example plan -- --shape 32x64x56x56 --team cluster4 --threads 512
//! ```

#[path = "../benches/shapes/mod.rs"]
mod shapes;

use std::process::ExitCode;

use batchnorm_cuda::cuda::DeviceLimits;
use batchnorm_cuda::cuda::plan::{Choice, KernelLaunch, Operation, Plan, Problem, Team};
use batchnorm_cuda::{Dtype, Epilogue, Layout, Result, Shape};
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

    /// N x C x H x W, whatever the layout: 32x64x56x56. Without it, a table of ResNet-50's shapes.
    #[arg(long, value_parser = dimensions)]
    shape: Option<[usize; 4]>,

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

    /// Take the general path, which reads its operands twice.
    #[arg(long, conflicts_with_all = ["team", "threads", "stages", "bulk"])]
    general: bool,

    /// Take this team, where it can hold a strip: block, cluster2, cluster4, cluster8, cluster16 or grid.
    #[arg(long)]
    team: Option<Team>,

    /// Take blocks of so many threads on the resident path.
    #[arg(long)]
    threads: Option<u32>,

    /// Take so many buffers per block on the resident path.
    #[arg(long)]
    stages: Option<u32>,

    /// Take bulk copies, or none, on the resident path.
    #[arg(long)]
    bulk: Option<bool>,

    /// List every legal way to run the pass, the fastest by the model first.
    #[arg(long, requires = "shape", conflicts_with = "json")]
    candidates: bool,

    /// Print JSON.
    #[arg(long, requires = "shape")]
    json: bool,
}

impl Arguments {
    fn choice(&self) -> Choice {
        if self.general {
            return Choice::GENERAL;
        }
        let Self {
            team,
            threads,
            stages,
            bulk,
            ..
        } = *self;
        Choice {
            resident: team.is_some() || threads.is_some() || stages.is_some() || bulk.is_some(),
            threads,
            stages,
            bulk,
            ..Choice::resident(team)
        }
    }

    fn problem(&self, operation: Operation, shape: Shape) -> Problem {
        let shape = Shape {
            layout: self.layout,
            ..shape
        };
        Problem::new(operation, shape, self.element).epilogue(self.epilogue)
    }
}

fn main() -> ExitCode {
    match print(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(arguments: &Arguments) -> Result<()> {
    let limits = DeviceLimits::named(&arguments.device).expect("the parser lets only known names pass");
    let Some([batch, channels, height, width]) = arguments.shape else {
        return print_table(arguments, &limits);
    };
    let problem = arguments.problem(arguments.op, Shape::nchw(batch, channels, height, width));
    if arguments.candidates {
        let mut plans = Plan::candidates(&problem, &limits)?;
        plans.sort_by(|one, other| one.modelled_time().total_cmp(&other.modelled_time()));
        println!(
            "{} legal ways; modelled time, ratio to the fewest bytes, way",
            plans.len()
        );
        for plan in plans {
            println!("{}", line(&plan));
        }
        return Ok(());
    }
    let plan = Plan::chosen(&problem, &limits, &arguments.choice())?;
    if arguments.json {
        println!("{:#}", to_json(&plan));
    } else {
        println!("{plan}");
    }
    Ok(())
}

/// Every shape of ResNet-50, forward and backward: what crosses memory, over the least that must.
fn print_table(arguments: &Arguments, limits: &DeviceLimits) -> Result<()> {
    println!(
        "{}, {}, {}, epilogue {}; modelled time, ratio to the fewest bytes, way",
        limits.name,
        arguments.element,
        arguments.layout.name(),
        arguments.epilogue
    );
    for batch in [32, 256] {
        for shape in shapes::resnet_50().filter(|shape| shape.layout == Layout::Nchw) {
            let shape = Shape { batch, ..shape };
            for operation in [Operation::Train, Operation::Backward] {
                let plan = Plan::chosen(&arguments.problem(operation, shape), limits, &arguments.choice())?;
                println!("{:9} {:20} {}", operation.name(), shape.to_string(), line(&plan));
            }
        }
    }
    Ok(())
}

fn line(plan: &Plan) -> String {
    let (time, ratio) = (plan.modelled_time() * 1e-3, plan.traffic_ratio());
    format!("{time:9.1} us  {ratio:.2}  {}", plan.choice())
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
        "device": plan.limits.name,
        "op": operation.name(),
        "shape": [shape.batch, shape.channels, shape.height, shape.width],
        "layout": shape.layout.name(),
        "element": dtype.name(),
        "epilogue": epilogue.name(),
        "kernels": plan.kernels.iter().map(launch_to_json).collect::<Vec<_>>(),
        "bytes": plan.traffic().bytes(),
        "minimum_bytes": plan.minimum_bytes(),
        "traffic_ratio": plan.traffic_ratio(),
        "modelled_time_ns": plan.modelled_time(),
        "choice": plan.choice().to_string(),
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

fn dimensions(text: &str) -> std::result::Result<[usize; 4], String> {
    let numbers: std::result::Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
    numbers
        .ok()
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| "expected four numbers with x between them, as in 32x64x56x56".into())
}
