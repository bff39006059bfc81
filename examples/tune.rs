//! Turns the report of a sweep (`examples/sweep.rs`) into the costs by which plans choose: prints them as the constant of
//! `src/cuda/tuning.rs`, with what they gain.
//!
//! ```text
//! cargo run --release --example tune -- sweep.json
//! ```
//!
//! For every pass of the sweep the model chooses a way; its regret is how much longer that way took than the fastest one.
//! The costs are changed, one at a time and several at once, as long as the mean regret of all passes and a fifth of the mean
//! error of the modelled times become smaller together: a model that is right about all ways should be right about passes that
//! it has not seen.

use std::path::PathBuf;
use std::process::ExitCode;

use batchnorm_cuda::cuda::DeviceLimits;
use batchnorm_cuda::cuda::plan::{Costs, Operation, Plan, Problem};
use batchnorm_cuda::{Dtype, Layout, Shape};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// Finds the costs by which plans would have chosen best in a sweep.
#[derive(Parser)]
struct Arguments {
    /// The report of a sweep, or that of `scripts/gpu-bundle` which holds one.
    sweep: PathBuf,
}

/// Changes of one cost that are tried.
const FACTORS: [f64; 8] = [0.5, 0.75, 0.9, 0.97, 1.03, 1.1, 1.33, 2.0];
/// Passes that are shown.
const SHOWN: usize = 12;
/// How often several costs are changed at once, at random.
const LEAPS: usize = 3000;
/// What an error of the modelled times counts beside the same regret.
const WEIGHT_OF_ERROR: f64 = 0.2;

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
    let after = search(before, |costs| {
        mean_regret(&passes, costs) + WEIGHT_OF_ERROR * mean_error(&passes, costs)
    });
    println!(
        "// Measured on {}: {} passes; mean regret {:.1} % before, {:.1} % after; modelled times off by {:.0} % in the mean.",
        limits.name,
        passes.len(),
        100.0 * mean_regret(&passes, &before),
        100.0 * mean_regret(&passes, &after),
        100.0 * mean_error(&passes, &after).exp_m1()
    );
    println!("{after:#?}");
    println!("\nWhat passes would take longest beside their fastest ways:");
    let mut regrets: Vec<(f64, String)> = passes
        .iter()
        .map(|pass| {
            let (chosen, best) = (chosen(pass, &after), best(pass));
            let (longer, time) = (chosen.time / best.time - 1.0, chosen.time);
            let problem = &chosen.plan.problem;
            let text = format!(
                "{:5.1} %  {} {} {}: {time:.1} us, {}; best {:.1} us, {}",
                100.0 * longer,
                problem.operation,
                problem.shape,
                problem.dtype,
                chosen.plan.choice(),
                best.time,
                best.plan.choice()
            );
            (longer, text)
        })
        .collect();
    regrets.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    for (_, text) in regrets.iter().take(SHOWN) {
        println!("{text}");
    }
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

/// The way that the model chooses. There is one in every pass.
fn chosen<'a>(pass: &'a [Timed], costs: &Costs) -> &'a Timed {
    let modelled = |timed: &Timed| timed.plan.modelled_time_at(costs);
    pass.iter()
        .min_by(|one, other| modelled(one).total_cmp(&modelled(other)))
        .expect("a pass has ways")
}

/// The way that took the least time.
fn best(pass: &[Timed]) -> &Timed {
    pass.iter()
        .min_by(|one, other| one.time.total_cmp(&other.time))
        .expect("a pass has ways")
}

/// How much longer than the fastest ways those took that the model chooses, in the mean.
fn mean_regret(passes: &[Vec<Timed>], costs: &Costs) -> f64 {
    let regret = |pass: &Vec<Timed>| chosen(pass, costs).time / best(pass).time - 1.0;
    passes.iter().map(regret).sum::<f64>() / passes.len() as f64
}

/// The mean of the logarithms of modelled over measured times, without their signs.
fn mean_error(passes: &[Vec<Timed>], costs: &Costs) -> f64 {
    let error = |timed: &Timed| (timed.plan.modelled_time_at(costs) * 1e-3 / timed.time).ln().abs();
    let of_pass = |pass: &Vec<Timed>| pass.iter().map(error).sum::<f64>() / pass.len() as f64;
    passes.iter().map(of_pass).sum::<f64>() / passes.len() as f64
}

/// Parts of something are at most all of it.
fn possible(costs: Costs) -> Costs {
    Costs {
        cached_part: costs.cached_part.min(1.0),
        overlap: costs.overlap.min(1.0),
        ..costs
    }
}

/// Changes costs one at a time, as long as that helps, and then several at once to leave where that ends.
fn search(start: Costs, objective: impl Fn(&Costs) -> f64) -> Costs {
    let mut best = descend(start, &objective);
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..LEAPS {
        let mut changed = best.1;
        for cost in changed.values_mut() {
            if random.random_bool(0.25) {
                *cost *= random.random_range(0.6..1.6);
            }
        }
        let changed = possible(changed);
        let found = objective(&changed);
        if found < best.0 {
            best = (found, changed);
        }
    }
    descend(best.1, &objective).1
}

/// Changes one cost at a time, as long as that helps.
fn descend(start: Costs, objective: &impl Fn(&Costs) -> f64) -> (f64, Costs) {
    let mut best = (objective(&start), start);
    loop {
        let before = best.0;
        for cost in 0..Costs::COUNT {
            for factor in FACTORS {
                let mut changed = best.1;
                *changed.values_mut()[cost] *= factor;
                let changed = possible(changed);
                let found = objective(&changed);
                if found < best.0 {
                    best = (found, changed);
                }
            }
        }
        if best.0 >= before {
            return best;
        }
    }
}
