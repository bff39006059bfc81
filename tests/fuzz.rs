//! What comes from outside, at random and for as long as asked: files to load, shapes and devices to plan for, shapes to
//! normalise. Nothing panics, every refusal is a typed error, and what is accepted is right.
//!
//! `BATCHNORM_FUZZ_SECONDS` says how long each test goes on, `BATCHNORM_FUZZ_SEED` where its random numbers begin;
//! `scripts/fuzz` sets both. What fails is shrunk to the smallest input that fails in the same way.
//!
//! By `proptest` and the clock, not by `cargo fuzz`: that needs a nightly compiler for its coverage, and these inputs are
//! made by changing valid ones, which reaches behind the first check of a parser without it.

mod common;

use std::collections::HashSet;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use batchnorm_cuda::cuda::plan::{Alignment, Choice, Operation, Plan, Problem, Team, Tracking};
use batchnorm_cuda::cuda::{DeviceLimits, Instantiation};
use batchnorm_cuda::{
    BatchNorm2d, BatchNorm2dConfig, Cpu, Dtype, Epilogue, Error, Layout, Real, Shape, StateDict, StateError,
};
use common::{Case, Random, assert_near_reference, with_element};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

const SECONDS: &str = "BATCHNORM_FUZZ_SECONDS";
const SEED: &str = "BATCHNORM_FUZZ_SEED";

/// How long each test goes on where nobody says: long enough to fail if something is badly wrong.
const DEFAULT_SECONDS: f64 = 3.0;
/// Inputs between two looks at the clock.
const BATCH: u32 = 32;

fn number<N: std::str::FromStr>(variable: &str, default: N) -> N {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}, no number")),
        Err(_) => default,
    }
}

/// Tries random inputs until the time is over.
fn fuzz<S: Strategy>(name: &str, strategy: S, check: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let end = Instant::now() + Duration::from_secs_f64(number(SECONDS, DEFAULT_SECONDS));
    let first_seed = number(SEED, 1u64);
    let mut batches = 0;
    while batches == 0 || Instant::now() < end {
        let seed = first_seed + batches;
        let mut runner = TestRunner::new(Config {
            cases: BATCH,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            max_shrink_time: 60_000,
            max_shrink_iters: u32::MAX,
            ..Config::default()
        });
        if let Err(error) = runner.run(&strategy, &check) {
            panic!("{name}, {SEED}={seed}: {error}");
        }
        batches += 1;
    }
    common::say(&format!("{name}: {} inputs", batches * u64::from(BATCH)));
}

// ---- safetensors ---------------------------------------------------------------------------------------------------

/// A change to the bytes of a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip {
        at: prop::sample::Index,
        bit: u8,
    },
    Set {
        at: prop::sample::Index,
        byte: u8,
    },
    CutAfter {
        at: prop::sample::Index,
    },
    Remove {
        at: prop::sample::Index,
        count: usize,
    },
    Insert {
        at: prop::sample::Index,
        bytes: Vec<u8>,
    },
    /// The length of the header, which comes first.
    HeaderLength {
        to: u64,
    },
    /// A number of the header becomes another one.
    Number {
        which: prop::sample::Index,
        to: u64,
    },
    /// A word of the header becomes another one of a file's words.
    Word {
        which: prop::sample::Index,
        to: &'static str,
    },
}

const WORDS: [&str; 14] = [
    "F16",
    "BF16",
    "F32",
    "F64",
    "I64",
    "U8",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "dtype",
    "shape",
    "data_offsets",
];

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let size = || {
        prop_oneof![
            0u64..80,
            Just(u64::MAX),
            Just(1 << 63),
            Just(i64::MAX as u64),
            Just(100_000_001),
            any::<u64>()
        ]
    };
    prop_oneof![
        (at(), 0u8..8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        at().prop_map(|at| Damage::CutAfter { at }),
        (at(), 1usize..20).prop_map(|(at, count)| Damage::Remove { at, count }),
        (at(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        size().prop_map(|to| Damage::HeaderLength { to }),
        (at(), size()).prop_map(|(which, to)| Damage::Number { which, to }),
        (at(), prop::sample::select(&WORDS[..])).prop_map(|(which, to)| Damage::Word { which, to }),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Damage::Flip { at, bit } => bytes[at.index(len)] ^= 1 << bit,
            Damage::Set { at, byte } => bytes[at.index(len)] = *byte,
            Damage::CutAfter { at } => bytes.truncate(at.index(len)),
            Damage::Remove { at, count } => {
                let at = at.index(len);
                bytes.drain(at..len.min(at + count));
            }
            Damage::Insert { at, bytes: new } => {
                let at = at.index(len);
                bytes.splice(at..at, new.iter().copied());
            }
            Damage::HeaderLength { to } => bytes.splice(0..len.min(8), to.to_le_bytes()).for_each(drop),
            Damage::Number { which, to } => replace(bytes, which, &to.to_string(), |byte| byte.is_ascii_digit()),
            Damage::Word { which, to } => {
                replace(bytes, which, to, |byte| byte.is_ascii_alphanumeric() || byte == b'_')
            }
        }
    }
}

/// Replaces one run of such bytes of the header by another text, and mends the header's length.
fn replace(bytes: &mut Vec<u8>, which: &prop::sample::Index, to: &str, of: impl Fn(u8) -> bool) {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return;
    };
    let header = usize::try_from(u64::from_le_bytes(*length)).map_or(rest.len(), |length| length.min(rest.len()));
    let mut runs = Vec::new();
    let mut at = 0;
    while at < header {
        let run = rest[at..header].iter().take_while(|&&byte| of(byte)).count();
        if run > 0 {
            runs.push(8 + at..8 + at + run);
        }
        at += run + 1;
    }
    if runs.is_empty() {
        return;
    }
    let run = runs[which.index(runs.len())].clone();
    let length = header + to.len() - run.len();
    bytes.splice(run, to.bytes()).for_each(drop);
    bytes.splice(0..8, (length as u64).to_le_bytes()).for_each(drop);
}

/// A module's configuration and a file that fits it.
fn file() -> impl Strategy<Value = (BatchNorm2dConfig, Vec<u8>)> {
    let counts = prop_oneof![Just(0i64), Just(7), Just(-1), Just(i64::MAX)];
    (1usize..6, any::<bool>(), any::<bool>(), any::<u64>(), counts).prop_map(
        |(channels, affine, track, seed, batches)| {
            let mut random = Random::new(seed);
            let mut vector = |there: bool| there.then(|| (0..channels).map(|_| random.normal() as f32).collect());
            let state = StateDict {
                weight: vector(affine),
                bias: vector(affine),
                running_mean: vector(track),
                running_var: vector(track),
                num_batches_tracked: track.then_some(batches),
            };
            let config = BatchNorm2dConfig::new(channels)
                .affine(affine)
                .track_running_stats(track);
            (config, state.to_safetensors("bn.").expect("a short prefix"))
        },
    )
}

/// Whether two dicts hold the same bits.
fn same<P: Real>(one: &StateDict<P>, other: &StateDict<P>) -> bool {
    // NaN and the sign of zero print.
    format!("{one:?}") == format!("{other:?}")
}

#[test]
fn files() {
    let damages = prop::collection::vec(damage(), 0..4);
    fuzz("files", (file(), damages), |((config, mut bytes), damages)| {
        for damage in &damages {
            damage.apply(&mut bytes);
        }
        let mut module: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), config).expect("a module");
        let before = module.state_dict().expect("a dict");
        match module.load_safetensors(&bytes, "bn.") {
            Ok(()) => {
                let file = StateDict::<f32>::from_safetensors(&bytes, "bn.").expect("it was loaded");
                let after = module.state_dict().expect("a dict");
                prop_assert!(same(&after, &file), "{after:?} is loaded, the file holds {file:?}");
                let again = module.to_safetensors("bn.").expect("a file");
                let again = StateDict::from_safetensors(&again, "bn.").expect("our own file");
                prop_assert!(same(&after, &again), "{after:?} is saved as {again:?}");
            }
            Err(Error::State(error)) => {
                prop_assert!(!damages.is_empty(), "a whole file is refused: {error}");
                prop_assert!(!matches!(error, StateError::File { .. }), "{error}");
                let after = module.state_dict().expect("a dict");
                prop_assert!(
                    same(&after, &before),
                    "refused ({error}), and yet {before:?} became {after:?}"
                );
            }
            Err(error) => return Err(TestCaseError::fail(format!("not an error of a state dict: {error:?}"))),
        }
        // Another parameter type than the file's: refused, or a file in which nothing tells the type.
        let mut module: BatchNorm2d<Cpu, f64> =
            BatchNorm2d::new(&Cpu::new(), module.config().clone()).expect("a module");
        let refused = module.load_safetensors(&bytes, "bn.");
        prop_assert!(matches!(refused, Ok(()) | Err(Error::State(_))), "{refused:?}");
        Ok(())
    });
}

// ---- plans ---------------------------------------------------------------------------------------------------------

/// Sizes of every magnitude, small ones and powers of two more often.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0usize..70,
        2 => (0u32..usize::BITS).prop_map(|bit| 1 << bit),
        1 => (0u32..usize::BITS).prop_map(|bit| (1 << bit) - 1),
        1 => (0u32..40, any::<usize>()).prop_map(|(bits, value)| value % (1 << bits).max(1)),
        1 => any::<usize>(),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    (size(), size(), size(), size(), any::<bool>()).prop_map(|(n, c, h, w, nhwc)| {
        let shape = Shape::nchw(n, c, h, w);
        if nhwc { shape.channels_last() } else { shape }
    })
}

fn limits() -> impl Strategy<Value = DeviceLimits> {
    let named = prop::sample::select(&DeviceLimits::NAMES[..]);
    (named, 1u32..300, 0u32..3, 6u32..9, 0u32..31, any::<bool>()).prop_map(
        |(name, multiprocessors, shared, threads, grid, cooperative)| {
            let limits = DeviceLimits::named(name).expect("a known name");
            DeviceLimits {
                multiprocessors,
                // All of it, or next to nothing.
                shared_memory_per_block: [limits.shared_memory_per_block, 48 << 10, 8 << 10][shared as usize],
                threads_per_multiprocessor: limits.threads_per_multiprocessor.min(1 << (threads + 2)),
                cooperative_launch: cooperative,
                grid: (1u32 << grid).max(3),
                ..limits
            }
        },
    )
}

fn choice() -> impl Strategy<Value = Choice> {
    let team = prop::option::of(prop::sample::select(vec![
        Team::Block,
        Team::Cluster(2),
        Team::Cluster(4),
        Team::Cluster(8),
        Team::Cluster(16),
        Team::Grid,
    ]));
    let stages = prop::option::of(1u32..3);
    (0u32..3, team, stages, prop::option::of(any::<bool>())).prop_map(|(kind, team, stages, bulk)| match kind {
        0 => Choice::default(),
        1 => Choice::GENERAL,
        _ => Choice {
            stages,
            bulk,
            ..Choice::resident(team)
        },
    })
}

fn problem() -> impl Strategy<Value = Problem> {
    (
        shape(),
        prop::sample::select(&Operation::ALL[..]),
        prop::sample::select(&Dtype::ALL[..]),
        prop::sample::select(&Epilogue::ALL[..]),
        [0u64..16, 0..16, 0..16],
        prop::array::uniform5(any::<bool>()),
        prop::sample::select(&[Tracking::None, Tracking::Momentum, Tracking::CumulativeAverage][..]),
    )
        .prop_map(|(shape, operation, dtype, epilogue, at, wanted, tracking)| Problem {
            alignment: Alignment::of(at.map(|at| at * dtype.size() as u64)),
            affine: wanted[0],
            tracking,
            input_gradient: wanted[1],
            residual_gradient: wanted[2],
            parameter_gradients: wanted[3],
            accumulate: wanted[4],
            ..Problem::new(operation, shape, dtype).epilogue(epilogue)
        })
}

/// The product of the dimensions, without a limit.
fn elements(shape: Shape) -> Option<u128> {
    [shape.batch, shape.channels, shape.height, shape.width]
        .iter()
        .try_fold(1u128, |product, &size| product.checked_mul(size as u128))
}

/// Whether a shape is larger than any memory, were its dimensions of zero not there.
fn overflows(shape: Shape) -> bool {
    let Shape {
        batch,
        channels,
        height,
        width,
        layout,
    } = shape;
    let [batch, channels, height, width] = [batch, channels, height, width].map(|size| size.max(1));
    elements(Shape {
        batch,
        channels,
        height,
        width,
        layout,
    })
    .is_none_or(|elements| elements >= 1 << 52)
}

#[test]
fn plans() {
    static KNOWN: OnceLock<HashSet<Instantiation>> = OnceLock::new();
    let known = KNOWN.get_or_init(|| Instantiation::all().into_iter().collect());
    fuzz("plans", (problem(), limits(), choice()), |(problem, limits, choice)| {
        let shape = problem.shape;
        let plan = match Plan::chosen(&problem, &limits, &choice) {
            Ok(plan) => plan,
            Err(Error::EmptyDimension { .. }) => {
                prop_assert!(shape.channels == 0 || shape.height == 0 || shape.width == 0);
                return Ok(());
            }
            Err(Error::ShapeOverflow { .. }) => {
                prop_assert!(overflows(shape), "{shape} fits");
                return Ok(());
            }
            Err(Error::OneValuePerChannel { .. }) => {
                prop_assert_eq!(shape.batch * shape.height * shape.width, 1);
                return Ok(());
            }
            Err(error) => return Err(TestCaseError::fail(format!("{error:?}"))),
        };
        prop_assert!(!overflows(shape));
        prop_assert_eq!(plan.kernels.is_empty(), shape.is_empty() || nothing_asked(&problem));
        for launch in &plan.kernels {
            let what = format!("{launch:?}");
            prop_assert!(known.contains(&launch.instantiation), "compiled by no test: {what}");
            prop_assert!(launch.instantiation.runs_on(limits.architecture), "{what}");
            prop_assert!((1..=limits.grid).contains(&launch.grid), "{what}");
            prop_assert!(
                launch.block().is_multiple_of(32) && (32..=1024).contains(&launch.block()),
                "{what}"
            );
            prop_assert!(launch.shared_bytes <= limits.shared_memory_per_block, "{what}");
            prop_assert!(launch.tiling.splits >= 1 && launch.tiling.strips >= 1, "{what}");
            prop_assert!(
                launch.tiling.strips * launch.tiling.strip_channels >= shape.channels as u64,
                "channels are left out: {what}"
            );
            prop_assert!(
                launch.instantiation.wide_index || elements(shape).unwrap() < 1 << 31,
                "{what}"
            );
        }
        prop_assert!(plan.traffic_ratio() >= 1.0 && plan.traffic_ratio() < 4.0, "{plan}");
        prop_assert!(!plan.to_string().is_empty());
        Ok(())
    });
}

/// Whether a backward pass is asked for nothing.
fn nothing_asked(problem: &Problem) -> bool {
    let problem = problem.canonical();
    matches!(problem.operation, Operation::Backward | Operation::BackwardEval)
        && !problem.input_gradient
        && !problem.residual_gradient
        && !problem.parameter_gradients
}

// ---- shapes --------------------------------------------------------------------------------------------------------

#[test]
fn shapes_that_are_extreme() {
    fuzz(
        "extreme shapes",
        (shape(), size(), any::<bool>()),
        |(shape, len, eval)| {
            match shape.len() {
                Ok(len) => {
                    prop_assert_eq!(Some(len as u128), elements(shape));
                    prop_assert_eq!(shape.is_empty(), len == 0);
                    prop_assert_eq!(shape.plane().unwrap(), shape.height * shape.width);
                    prop_assert_eq!(
                        shape.values_per_channel().unwrap(),
                        shape.batch * shape.height * shape.width
                    );
                }
                Err(Error::ShapeOverflow { .. }) => prop_assert!(overflows(shape), "{shape} fits"),
                Err(error) => return Err(TestCaseError::fail(format!("{error:?}"))),
            }
            // A module is asked to take it, with tensors that are nearly always too short: an error, and nothing is allocated
            // for it but the module.
            let module: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(3)).unwrap();
            let x = vec![1.0f32; len.min(100)];
            let mut y = x.clone();
            if eval {
                let result = module.forward_eval(shape, &x[..], &mut y[..]);
                prop_assert_eq!(
                    result.is_ok(),
                    shape.channels == 3
                        && shape
                            .len()
                            .is_ok_and(|len| len == x.len() && shape.height * shape.width > 0)
                );
            } else if shape.channels != 3 {
                prop_assert!(module.prepare::<f32>(shape).is_err());
            }
            Ok(())
        },
    );
}

/// Small tensors of any shape, on the CPU and on the stand-in's devices, by any path, against the float64 reference.
#[cfg(target_os = "linux")]
#[test]
fn shapes_that_are_small() {
    emulator::install();
    let devices = ["small-90", "small-75", "small-grid"].map(|name| common::cuda_device(emulator::ordinal(name)));
    let dimensions = (1usize..6, 1usize..9, 1usize..12, 1usize..12, any::<bool>());
    let kinds = (
        prop::sample::select(&Dtype::ALL[..]),
        prop::sample::select(&Epilogue::ALL[..]),
        any::<bool>(),
    );
    let strategy = (dimensions, kinds, choice(), 0usize..3, any::<u64>());
    fuzz(
        "small shapes",
        strategy,
        |((n, c, h, w, nhwc), (dtype, epilogue, training), choice, device, seed)| {
            prop_assume!(n * h * w > 1);
            let layout = if nhwc { Layout::Nhwc } else { Layout::Nchw };
            let shape = Shape {
                layout,
                ..Shape::nchw(n, c, h, w)
            };
            let device = devices[device].with_choice(choice);
            with_element!(dtype, E => {
                let case = Case::<E>::random(&mut Random::new(seed), shape, epilogue);
                let case = if training { case } else { case.evaluation() };
                assert_near_reference("cpu", &case, &common::run(&common::cpu(), &case));
                assert_near_reference("stand-in", &case, &common::run(&device, &case));
            });
            Ok(())
        },
    );
}
