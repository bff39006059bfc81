//! Turns the report of a sweep (`examples/sweep.rs`) into the costs by which plans choose: prints them as the constant of
//! `src/cuda/tuning.rs`, with what they gain.
//!
//! ```text
//! cargo run --release --example tune -- sweep.json
//! ```
//!
//! For every pass of the sweep the model chooses a way; its regret is how much longer that way took than the fastest one.
//! The costs are changed one at a time, as long as the mean regret of all passes becomes smaller.

use std::path::PathBuf;
use std::process::ExitCode;

use batchnorm_cuda::cuda::DeviceLimits;
use batchnorm_cuda::cuda::plan::{Costs, Operation, Plan, Problem};
use batchnorm_cuda::{Dtype, Layout, Shape};
use clap::Parser;
use serde_json::Value;

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// Finds the costs by which plans would have chosen best in a sweep.
#[derive(Parser)]
struct Arguments {
    /// The report of a sweep, or that of `scripts/gpu-bundle` which holds one.
    sweep: PathBuf,
}

/// Changes of one cost that are tried.
const FACTORS: [f64; 6] = [0.5, 0.75, 0.9, 1.1, 1.33, 2.0];

fn main() -> ExitCode {
    match tune(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tune: {error}");
            ExitCode::FAILURE
        }
    }
}

fn tune(arguments: &Arguments) -> Answer<()> {
    let mut report: Value = serde_json::from_str(&std::fs::read_to_string(&arguments.sweep)?)?;
    if let Some(steps) = report["steps"].as_array() {
        let sweep = steps.iter().find(|step| step["step"] == "sweep");
        let sweep = sweep.ok_or("a report without a sweep")?;
        if sweep["report"].is_null() {
            return Err(format!(
                "the sweep of this report has no pass: {}, {}",
                sweep["status"], sweep["detail"]
            )
            .into());
        }
        report = sweep["report"].clone();
    }
    if report["stand_in"] != Value::Bool(false) {
        return Err("this report is of the stand-in driver, whose times say nothing about a GPU".into());
    }
    let limits = limits(&report["limits"])?;
    let passes = report["passes"].as_array().ok_or("a report without passes")?;
    let passes = passes
        .iter()
        .map(|pass| measured(pass, &limits))
        .collect::<Answer<Vec<_>>>()?;
    let before = Costs::default();
    let after = descend(before, |costs| mean_regret(&passes, costs));
    println!(
        "// Measured on {}: {} passes; mean regret {:.1} % before, {:.1} % after.",
        limits.name,
        passes.len(),
        100.0 * mean_regret(&passes, &before),
        100.0 * mean_regret(&passes, &after)
    );
    println!("{after:#?}");
    Ok(())
}

/// A way that was timed: its plan, and microseconds.
struct Timed {
    plan: Plan,
    time: f64,
}

fn measured(pass: &Value, limits: &DeviceLimits) -> Answer<Vec<Timed>> {
    let problem = problem(pass)?;
    let plans = Plan::candidates(&problem, limits)?;
    let ways = pass["ways"].as_array().ok_or("a pass without ways")?;
    let timed: Vec<Timed> = ways
        .iter()
        .filter_map(|way| {
            let (name, time) = (way["way"].as_str()?, way["us"].as_f64()?);
            let plan = plans.iter().find(|plan| plan.choice().to_string() == name)?.clone();
            Some(Timed { plan, time })
        })
        .collect();
    if timed.is_empty() {
        return Err(format!("{problem:?}: no way that this version of the library knows was timed").into());
    }
    Ok(timed)
}

fn problem(pass: &Value) -> Answer<Problem> {
    let text = |key: &str| pass[key].as_str().ok_or(format!("a pass without {key}"));
    let sizes: Vec<usize> = serde_json::from_value(pass["shape"].clone())?;
    let &[batch, channels, height, width] = sizes.as_slice() else {
        return Err("a shape has four sizes".into());
    };
    let (operation, dtype, layout): (Operation, Dtype, Layout) = (
        text("op")?.parse()?,
        text("element")?.parse()?,
        text("layout")?.parse()?,
    );
    let shape = Shape {
        layout,
        ..Shape::nchw(batch, channels, height, width)
    };
    Ok(Problem::new(operation, shape, dtype))
}

fn limits(report: &Value) -> Answer<DeviceLimits> {
    let number = |key: &str| report[key].as_u64().ok_or(format!("limits without {key}"));
    let small = |key: &str| Ok::<_, Box<dyn std::error::Error>>(u32::try_from(number(key)?)?);
    Ok(DeviceLimits {
        name: report["name"].as_str().ok_or("limits without a name")?.to_owned(),
        architecture: small("architecture")?,
        multiprocessors: small("multiprocessors")?,
        threads_per_multiprocessor: small("threads_per_multiprocessor")?,
        shared_memory_per_block: small("shared_memory_per_block")?,
        shared_memory_per_multiprocessor: small("shared_memory_per_multiprocessor")?,
        shared_memory_reserved_per_block: small("shared_memory_reserved_per_block")?,
        blocks_per_multiprocessor: small("blocks_per_multiprocessor")?,
        largest_cluster: small("largest_cluster")?,
        cooperative_launch: report["cooperative_launch"] == Value::Bool(true),
        memory_bandwidth: number("memory_bandwidth")?,
        l2_cache: number("l2_cache")?,
        grid: small("grid")?,
    })
}

/// How much longer than the fastest ways those took that the model chooses, in the mean.
fn mean_regret(passes: &[Vec<Timed>], costs: &Costs) -> f64 {
    let regret = |pass: &Vec<Timed>| {
        let by_model = |one: &&Timed, other: &&Timed| {
            let time = |timed: &Timed| timed.plan.modelled_time_at(costs);
            time(one).total_cmp(&time(other))
        };
        let chosen = pass.iter().min_by(by_model).map_or(f64::NAN, |timed| timed.time);
        let best = pass.iter().map(|timed| timed.time).fold(f64::INFINITY, f64::min);
        chosen / best - 1.0
    };
    passes.iter().map(regret).sum::<f64>() / passes.len() as f64
}

/// Changes one cost at a time, as long as that helps.
fn descend(start: Costs, regret: impl Fn(&Costs) -> f64) -> Costs {
    let mut best = (regret(&start), start);
    loop {
        let before = best.0;
        for cost in 0..Costs::COUNT {
            for factor in FACTORS {
                let mut changed = best.1;
                *changed.values_mut()[cost] *= factor;
                let regret = regret(&changed);
                if regret < best.0 {
                    best = (regret, changed);
                }
            }
        }
        if best.0 >= before {
            return best.1;
        }
    }
}
