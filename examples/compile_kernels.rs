//! Compiles the kernels with the NVRTC of this machine, for devices that need not be there.
//!
//!     cargo run --release --example compile_kernels -- --architectures 75,80,86,89,90,100,120 --thorough 90
//!
//! What a plan can ask for is more than one compiles every day, and most of it differs by constants alone. So `--select`
//! takes the instantiations of `scripts/kernel-report`'s table (`table`), these and the same in bf16 and f64 (`usual`), or all of them
//! (`all`); and for the architectures named by `--thorough` there are also every vector width, block size and index width of
//! the general kernels, and every team and way of copying of the resident ones; `--one-in 8` takes every eighth of those.
//! Prints, for each architecture, how many instantiations were compiled, their bytes and the time. Ends with an error if one
//! of them does not compile.
//!
//! `--save FOLDER` keeps the machine code, and beside it `index.json`, which says what each file is and how long NVRTC took:
//! `scripts/kernel-report` reads them. Of a small sample, which is to be looked at by more tools, it keeps PTX too.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Team};
use batchnorm_cuda::cuda::{COMPILE_OPTIONS, DeviceLimits, DiskCache, Instantiation, Walk, compile_ahead};
use batchnorm_cuda::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use batchnorm_cuda::{Dtype, Epilogue, Shape};
use clap::{Parser, ValueEnum};
use rayon::prelude::*;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Compiles every kernel instantiation with NVRTC.
#[derive(Parser)]
struct Arguments {
    /// Compute capabilities, times ten.
    #[arg(long, value_delimiter = ',', default_value = "75,80,86,89,90,100,120")]
    architectures: Vec<u32>,
    /// Which instantiations.
    #[arg(long, value_enum, default_value_t = Selection::Usual)]
    select: Selection,
    /// Those of the architectures that every block size and index width is compiled for.
    #[arg(long, value_delimiter = ',')]
    thorough: Vec<u32>,
    /// How many of what a thorough architecture has beside the others: all, or every N-th.
    #[arg(long, default_value = "1")]
    one_in: NonZeroUsize,
    /// Where to keep what was compiled.
    #[arg(long)]
    save: Option<PathBuf>,
}

/// Which instantiations are compiled for an architecture that is not thorough.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Selection {
    /// Those of the table: the widest vectors of f16 and f32, one block size, 32-bit indices.
    Table,
    /// The same of all element types.
    Usual,
    /// Every instantiation that a plan can ask for.
    All,
}

impl Selection {
    fn takes(self, one: &Instantiation) -> bool {
        match self {
            Selection::Table => is_usual(one) && matches!(one.dtype, Dtype::F16 | Dtype::F32),
            Selection::Usual => is_usual(one),
            Selection::All => true,
        }
    }
}

/// One block size and index width, the widest vectors; of the resident kernels three teams and two ways of copying.
fn is_usual(one: &Instantiation) -> bool {
    let typical = !one.wide_index && is_widest(one);
    match &one.resident {
        None => one.kernel.per_channel() || (typical && one.threads == 256),
        Some(resident) => {
            let copies = match one.walk {
                Walk::PlanesWithEdges => [(1, false), (2, false)],
                Walk::Planes | Walk::Columns => [(1, false), (2, true)],
            };
            typical
                && one.threads == 512
                && one.epilogue == Epilogue::AddRelu
                && [Team::Block, Team::Cluster(8), Team::Grid].contains(&resident.team)
                && copies.contains(&(resident.stages, resident.bulk))
        }
    }
}

/// What a thorough architecture has beside the usual.
fn is_thorough(one: &Instantiation) -> bool {
    match &one.resident {
        None => is_widest(one) || (one.threads == 256 && !one.wide_index),
        // Every team and way of copying once, every block size and index width once.
        Some(resident) => {
            let one_way = resident.team == Team::Grid && !resident.bulk && resident.stages == 1;
            let one_size = one.threads == 512 && !one.wide_index && one.dtype == Dtype::F16;
            is_widest(one) && one.epilogue == Epilogue::AddRelu && (one_way || one_size)
        }
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut failures = 0;
    let mut index = Vec::new();
    for &architecture in &arguments.architectures {
        let thorough = arguments.thorough.contains(&architecture);
        let (mut instantiations, others): (Vec<Instantiation>, Vec<Instantiation>) = Instantiation::all()
            .into_iter()
            .filter(|one| one.runs_on(architecture))
            .partition(|one| arguments.select.takes(one));
        if thorough {
            let others = others.into_iter().filter(is_thorough);
            instantiations.extend(others.step_by(arguments.one_in.get()));
        }
        let folder = arguments
            .save
            .as_ref()
            .map(|save| save.join(format!("sm_{architecture}")));
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder)?;
        }
        let start = Instant::now();
        let results: Vec<_> = instantiations
            .par_iter()
            .enumerate()
            .map(|(number, one)| {
                let start = Instant::now();
                let code = compile_ahead(one, architecture, &DiskCache::Off)?;
                let time = start.elapsed();
                let entry = folder.as_ref().map(|folder| {
                    let name = folder.join(format!("{number}.cubin"));
                    std::fs::write(&name, &code)?;
                    if is_sample(one) {
                        std::fs::write(name.with_extension("ptx"), ptx(one, architecture)?)?;
                    }
                    Ok::<Value, Box<dyn std::error::Error + Send + Sync>>(describe(one, architecture, &name, time))
                });
                Ok((code.len(), entry.transpose()?))
            })
            .collect::<Vec<Result<(usize, Option<Value>)>>>();
        let bytes: usize = results.iter().flatten().map(|(bytes, _)| bytes).sum();
        println!(
            "sm_{architecture}: {} of {} instantiations compiled, {bytes} bytes, {:.1} s",
            results.iter().flatten().count(),
            results.len(),
            start.elapsed().as_secs_f64()
        );
        for result in results {
            match result {
                Ok((_, entry)) => index.extend(entry),
                Err(error) => {
                    failures += 1;
                    eprintln!("{error}");
                }
            }
        }
    }
    if let Some(save) = &arguments.save {
        std::fs::write(save.join("index.json"), serde_json::to_vec_pretty(&index)?)?;
    }
    Ok(if failures == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn is_widest(instantiation: &Instantiation) -> bool {
    instantiation.vector as usize * instantiation.dtype.size() == 16
}

/// A few of every kernel: enough to see whether two tools agree.
fn is_sample(one: &Instantiation) -> bool {
    Selection::Table.takes(one)
        && one.walk == Walk::Planes
        && (one.epilogue == Epilogue::Identity || one.resident.is_some())
}

/// Limits of a device of this compute capability.
fn limits(architecture: u32) -> Option<DeviceLimits> {
    let name = match architecture {
        75 => "t4",
        80 => "a100",
        90 => "h200",
        100 => "b200",
        // As far as shared memory goes, the GPUs without the large memory are alike.
        _ => "rtx4090",
    };
    let limits = DeviceLimits::named(name)?;
    Some(DeviceLimits {
        architecture,
        largest_cluster: if architecture >= 90 { 8 } else { 1 },
        ..limits
    })
}

/// Shared memory that the instantiation is launched with on such a device, on a layer of ResNet-50 and shapes beside it, if
/// one of them asks for it.
fn shared_bytes(one: &Instantiation, architecture: u32) -> Option<u32> {
    let limits = limits(architecture)?;
    let choice = match &one.resident {
        None => Choice::GENERAL,
        Some(resident) => Choice {
            threads: Some(one.threads),
            stages: Some(resident.stages),
            bulk: Some(resident.bulk),
            ..Choice::resident(Some(resident.team))
        },
    };
    let shapes = [
        Shape::nchw(32, 64, 56, 56),
        Shape::nchw(32, 64, 55, 55),
        Shape::nchw(32, 64, 56, 56).channels_last(),
    ];
    let problems = shapes.into_iter().flat_map(|shape| {
        let operations = Operation::ALL.into_iter();
        operations.flat_map(move |operation| {
            [true, false].map(|input_gradient| Problem {
                input_gradient,
                ..Problem::new(operation, shape, one.dtype).epilogue(one.epilogue)
            })
        })
    });
    problems
        .flat_map(|problem| {
            Plan::chosen(&problem, &limits, &choice)
                .map(|plan| plan.kernels)
                .unwrap_or_default()
        })
        .find(|launch| launch.instantiation == *one)
        .map(|launch| launch.shared_bytes)
}

/// What a file holds.
fn describe(one: &Instantiation, architecture: u32, file: &Path, time: Duration) -> Value {
    json!({
        "architecture": architecture,
        "file": file,
        "kernel": one.kernel.name(),
        "element": one.dtype.to_string(),
        "walk": one.walk.name(),
        "vector": one.vector,
        "unroll": one.unroll,
        "threads": one.threads,
        "wide_index": one.wide_index,
        "epilogue": one.epilogue.to_string(),
        "stores_gradient": one.stores_gradient,
        "batch_statistics": one.batch_statistics,
        "resident": one.resident.map(|resident| resident.to_string()),
        "shared_bytes": shared_bytes(one, architecture),
        "sample": is_sample(one),
        "definitions": one.definitions(),
        "table": Selection::Table.takes(one),
        "compile_ms": time.as_secs_f64() * 1e3,
    })
}

/// The same instantiation as PTX.
fn ptx(one: &Instantiation, architecture: u32) -> Result<String> {
    let mut options: Vec<String> = COMPILE_OPTIONS.iter().map(|&option| option.to_owned()).collect();
    options.extend(one.definitions());
    options.push(format!("--gpu-architecture=compute_{architecture}"));
    let options = CompileOptions {
        options,
        ..CompileOptions::default()
    };
    // The library has found an NVRTC before, or cudarc would panic here.
    let ptx = compile_ptx_with_opts(one.source(), options).map_err(|error| format!("{one}: {error:?}"))?;
    Ok(ptx.to_src())
}
