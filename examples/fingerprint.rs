//! Runs every kernel on fixed inputs and prints a hash of each result, so that two machines can be compared bit for bit:
//! above all a GPU with the stand-in driver.
//!
//!     cargo run --release --example fingerprint -- --stand-in h200 > stand-in.json
//!     cargo run --release --example fingerprint > gpu.json          # on a machine with an H200
//!
//! Every path that a plan may take is taken: the shapes reach every walk of `kernels/tensor.cuh`, one and several splits, and
//! every element type and epilogue, on the general path and by every resident team. Equal devices make equal plans, so every
//! result must be equal; beside the results there is the plan, for devices that differ.
//!
//! `--small` leaves out what is long under a checking tool: large shapes, and what differs by constants alone.

#[path = "ahead/compile.rs"]
mod ahead;

use std::process::ExitCode;

use batchnorm_cuda::cuda::plan::{Choice, Operation, Plan, Problem, Team};
use batchnorm_cuda::cuda::{DeviceLimits, DiskCache};
use batchnorm_cuda::cudarc::driver::CudaContext;
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{
    AsTensor, Backend, Backward, BatchNorm2d, BatchNorm2dConfig, Cuda, Dtype, Element, Epilogue, Forward, Plain, Real,
    Result, Shape,
};
use clap::Parser;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Prints a hash of every result of every kernel on fixed inputs.
#[derive(Parser)]
struct Arguments {
    /// Use the stand-in driver, with this device profile.
    #[arg(long)]
    stand_in: Option<String>,
    /// Only a small case of each kernel.
    #[arg(long)]
    small: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let cache = arguments.cache();
    match arguments
        .device(&cache)
        .and_then(|cuda| fingerprints(&cuda, arguments.small, &cache))
    {
        Ok(fingerprints) => {
            println!("{fingerprints:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("fingerprint: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    /// Kernels of the stand-in have no business among those of the user.
    fn cache(&self) -> DiskCache {
        match self.stand_in {
            Some(_) => DiskCache::Off,
            None => DiskCache::Default,
        }
    }

    fn device(&self, cache: &DiskCache) -> Result<Cuda> {
        let Some(profile) = &self.stand_in else {
            return Cuda::new(0);
        };
        emulator::install();
        let context = CudaContext::new(emulator::ordinal(profile)).expect("the stand-in's device");
        Cuda::with_cache(context.default_stream(), cache.clone())
    }
}

/// Elements of the largest tensor that `--small` takes.
const SMALL: usize = 8192;

const SHAPES: [Shape; 9] = [
    Shape::nchw(4, 3, 8, 16),                    // planes
    Shape::nchw(3, 2, 9, 13),                    // planes with edges
    Shape::nchw(6, 16, 7, 7),                    // columns of planes
    Shape::nchw(4, 40, 6, 5).channels_last(),    // columns of pixels
    Shape::nchw(5, 3, 4, 3).channels_last(),     // one element at a time
    Shape::nchw(40, 2, 32, 32),                  // planes in several splits
    Shape::nchw(24, 24, 16, 16).channels_last(), // columns in several splits
    Shape::nchw(2, 1200, 8, 8),                  // more planes than teams of one block
    Shape::nchw(4, 600, 7, 7),                   // more groups of planes than teams of a cluster
];

/// The general path, and every team, by turns with both ways of copying.
const CHOICES: [Choice; 7] = [
    Choice::GENERAL,
    Choice {
        bulk: Some(false),
        stages: Some(2),
        ..Choice::resident(Some(Team::Block))
    },
    Choice {
        bulk: Some(true),
        stages: Some(2),
        ..Choice::resident(Some(Team::Cluster(2)))
    },
    Choice {
        bulk: Some(false),
        ..Choice::resident(Some(Team::Cluster(4)))
    },
    Choice {
        bulk: Some(true),
        ..Choice::resident(Some(Team::Cluster(8)))
    },
    Choice {
        bulk: Some(false),
        ..Choice::resident(Some(Team::Cluster(16)))
    },
    Choice::resident(Some(Team::Grid)),
];

/// What is run: one line of the result.
struct Case {
    shape: Shape,
    choice: Choice,
    epilogue: Epilogue,
    dtype: Dtype,
    plans: Vec<Plan>,
}

impl Case {
    fn run(&self, cuda: &Cuda) -> Result<Value> {
        let cuda = cuda.with_choice(self.choice);
        match self.dtype {
            Dtype::F16 => hashes::<f16>(&cuda, self.shape, self.epilogue),
            Dtype::Bf16 => hashes::<bf16>(&cuda, self.shape, self.epilogue),
            Dtype::F32 => hashes::<f32>(&cuda, self.shape, self.epilogue),
            Dtype::F64 => hashes::<f64>(&cuda, self.shape, self.epilogue),
        }
    }

    /// What runs: kernels, grids, splits.
    fn launches(&self) -> Vec<String> {
        let launches = self.plans.iter().flat_map(|plan| &plan.kernels);
        let described = launches.map(|launch| {
            let (block, splits) = (launch.block(), launch.tiling.splits);
            let (instantiation, grid) = (&launch.instantiation, launch.grid);
            format!("{instantiation}, {grid} x {block}, {splits} splits")
        });
        described.collect()
    }

    fn is_resident(&self) -> bool {
        self.launches().iter().any(|launch| launch.contains("resident"))
    }
}

fn fingerprints(cuda: &Cuda, small: bool, cache: &DiskCache) -> Result<Value> {
    let cases = cases(cuda.limits(), small)?;
    let plans: Vec<Plan> = cases.iter().flat_map(|case| case.plans.clone()).collect();
    if *cache != DiskCache::Off {
        ahead::compile(&plans, cuda.limits().architecture, cache, || true);
    }
    let mut results = Map::new();
    for case in cases {
        let Case {
            shape,
            choice,
            epilogue,
            dtype,
            ..
        } = case;
        let result = json!({ "plans": case.launches(), "results": case.run(cuda)? });
        results.insert(format!("{shape} {dtype} {epilogue}, {choice}"), result);
    }
    Ok(json!({ "device": cuda.limits().name, "cases": results }))
}

fn cases(limits: &DeviceLimits, small: bool) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (number, shape) in SHAPES.into_iter().enumerate() {
        if small && shape.len()? > SMALL {
            continue;
        }
        for (turn, choice) in CHOICES.into_iter().enumerate() {
            for epilogue in Epilogue::ALL {
                for (place, dtype) in Dtype::ALL.into_iter().enumerate() {
                    // On the resident paths two types with one epilogue, others each time; of a small run each kernel
                    // with one type.
                    let turn = number + turn;
                    let in_turn = epilogue == Epilogue::ALL[(turn + place) % 3] && (turn + place).is_multiple_of(2);
                    if !(choice.general || in_turn) || (small && !(in_turn && place == turn % 4)) {
                        continue;
                    }
                    let plan = |operation| {
                        let problem = Problem::new(operation, shape, dtype).epilogue(epilogue);
                        Plan::chosen(&problem, limits, &choice)
                    };
                    let plans = Operation::ALL.into_iter().map(plan).collect::<Result<_>>()?;
                    let case = Case {
                        shape,
                        choice,
                        epilogue,
                        dtype,
                        plans,
                    };
                    // Where no such team fits, the general path is taken, which was there before.
                    if choice.general || case.is_resident() {
                        cases.push(case);
                    }
                }
            }
        }
    }
    Ok(cases)
}

/// Numbers between -4 and 4 that no two tensors share.
fn values<T: Element>(len: usize, seed: usize) -> Vec<T> {
    (0..len)
        .map(|i| {
            T::from_param(T::Param::from_f64(
                (i * 7919 + seed * 104_729) as f64 * 0.618 % 8.0 - 4.0,
            ))
        })
        .collect()
}

fn hashes<T: Element>(cuda: &Cuda, shape: Shape, epilogue: Epilogue) -> Result<Value> {
    let len = shape.len()?;
    let mut bn: BatchNorm2d<Cuda, T::Param> = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(shape.channels))?;
    let mut saved = bn.prepare_fused::<T>(shape, epilogue)?;
    let mut gradients = bn.gradients()?;
    let [x, z, dy] = [1, 2, 3].map(|seed| cuda.upload(&values::<T>(len, seed)));
    let (x, z, dy) = (x?, z?, dy?);
    let mut buffers = (0..5).map(|_| cuda.zeros::<T>(len)).collect::<Result<Vec<_>>>()?;
    let [y, evaluated, dx, dz, dx_evaluated] = &mut buffers[..] else {
        unreachable!("five buffers were made");
    };

    let forward = Forward::new(&x, y);
    bn.forward_train_with(with_epilogue(forward, &z, epilogue), &mut saved)?;
    bn.forward_eval_with(shape, with_epilogue(Forward::new(&x, evaluated), &z, epilogue))?;
    let backward = Backward::new(&x, &dy).dx(dx).parameters(&mut gradients);
    let backward = match epilogue {
        Epilogue::Identity => backward,
        Epilogue::Relu => backward.relu(),
        Epilogue::AddRelu => backward.add_relu(y).dz(dz)?,
    };
    bn.backward_with(backward, &mut saved)?;
    let backward = Backward::new(&x, &dy)
        .dx(dx_evaluated)
        .accumulate_parameters(&mut gradients);
    let backward = match epilogue {
        Epilogue::Identity => backward,
        Epilogue::Relu => backward.relu(),
        Epilogue::AddRelu => backward.add_relu(evaluated),
    };
    bn.backward_eval_with(backward, &mut saved)?;

    let (mean, variance) = bn.running_mean().zip(bn.running_var()).expect("they are tracked");
    Ok(json!({
        "y": hash(cuda, y)?,
        "evaluated": hash(cuda, evaluated)?,
        "dx": hash(cuda, dx)?,
        "dz": hash(cuda, dz)?,
        "dx_evaluated": hash(cuda, dx_evaluated)?,
        "running_mean": hash(cuda, mean)?,
        "running_var": hash(cuda, variance)?,
        "dweight": hash(cuda, &gradients.weight)?,
        "dbias": hash(cuda, &gradients.bias)?,
    }))
}

fn with_epilogue<'a, T: Element>(
    forward: Forward<'a, Cuda, T>,
    z: &'a impl AsTensor<Cuda, T>,
    epilogue: Epilogue,
) -> Forward<'a, Cuda, T> {
    match epilogue {
        Epilogue::Identity => forward,
        Epilogue::Relu => forward.relu(),
        Epilogue::AddRelu => forward.add_relu(z),
    }
}

/// SHA-256 of the numbers as they print, which tells every bit pattern but those of NaN from every other.
fn hash<T: Plain>(cuda: &Cuda, buffer: &impl AsTensor<Cuda, T>) -> Result<String> {
    let mut hash = Sha256::new();
    for value in cuda.to_vec(buffer.view())? {
        hash.update(format!("{value:?} "));
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
