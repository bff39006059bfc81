//! The checks find bugs: each patch under `tests/bugs/` puts one into the kernels, and the stand-in driver, or the
//! comparison with the float64 reference, must notice it by the check that is named for it here.
//!
//! A patch is a unified diff without line numbers, behind a line of prose. It is applied to the sources in memory, as
//! they are given to NVRTC; one that does not apply any more fails the test.

#![cfg(target_os = "linux")]

mod common;

use std::sync::Arc;

use batchnorm_cuda::cuda::DiskCache;
use batchnorm_cuda::cuda::plan::{Choice, Team};
use batchnorm_cuda::cudarc::driver::CudaContext;
use batchnorm_cuda::half::f16;
use batchnorm_cuda::{Cuda, Element, Epilogue, Result, Shape};
use common::{Case, Form, Outcome, Random, errors, limit, reference, run_as};

/// How a bug is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// The launch fails, and the message has these words.
    Fault(&'static str),
    /// Every launch runs to its end; a result is further from the reference than rounding explains.
    Values,
}
use Check::{Fault, Values};

const RACE: Check = Fault("race: ");
const UNINITIALISED: Check = Fault("uninitialised: ");
const BOUNDS: Check = Fault("out of bounds");
const DEADLOCK: Check = Fault("deadlock in block");
const IN_FLIGHT: Check = Fault("while a copy into it is in flight");

/// On what a bug shows.
#[derive(Clone, Copy, Debug)]
enum Tensor {
    /// Planes of one channel each, one block for a channel.
    Planes,
    /// The same with few values, so that some threads have nothing to do.
    FewValues,
    /// Planes whose vectors stick out.
    Edges,
    /// Several blocks for a channel.
    Splits,
    /// Channels next to each other, several strips, of which the last is shorter.
    Columns,
    /// Channels next to each other, several blocks for a strip.
    ColumnSplits,
    /// Half precision.
    Half,
    /// On chip, more strips than teams: a block for each strip, bulk copies, one stage.
    BlockBulk,
    /// A cluster for each strip, each thread's own copies, one stage.
    ClusterOwn,
    /// The same by bulk copies in two stages.
    ClusterBulk,
    /// A grid team for each strip, bulk copies in two stages.
    GridBulk,
    /// The same with several channels in a strip, and each thread's own copies.
    GridColumns,
}

impl Tensor {
    const ALL: [Tensor; 12] = [
        Tensor::Planes,
        Tensor::FewValues,
        Tensor::Edges,
        Tensor::Splits,
        Tensor::Columns,
        Tensor::ColumnSplits,
        Tensor::Half,
        Tensor::BlockBulk,
        Tensor::ClusterOwn,
        Tensor::ClusterBulk,
        Tensor::GridBulk,
        Tensor::GridColumns,
    ];

    /// The device, and the path that passes take on it.
    fn device(self) -> (&'static str, Choice) {
        let resident = |team, stages, bulk| Choice {
            stages: Some(stages),
            bulk: Some(bulk),
            ..Choice::resident(Some(team))
        };
        match self {
            Tensor::BlockBulk => ("small-90", resident(Team::Block, 1, true)),
            Tensor::ClusterOwn => ("small-90", resident(Team::Cluster(2), 1, false)),
            Tensor::ClusterBulk => ("small-90", resident(Team::Cluster(2), 2, true)),
            Tensor::GridBulk => ("small-90", resident(Team::Grid, 2, true)),
            Tensor::GridColumns => ("small-90", resident(Team::Grid, 1, false)),
            _ => ("small-75", Choice::GENERAL),
        }
    }
}

macro_rules! bugs {
    ($($name:ident: $tensor:ident, $check:expr;)+) => {
        /// Name, text, tensor and check.
        const BUGS: &[(&str, &str, Tensor, Check)] = &[$((
            stringify!($name),
            include_str!(concat!("bugs/", stringify!($name), ".patch")),
            Tensor::$tensor,
            $check,
        )),+];

        $(
            #[test]
            fn $name() {
                find(stringify!($name));
            }
        )+
    };
}

bugs! {
    missing_barrier_after_staging: Planes, RACE;
    missing_barrier_before_join: Planes, UNINITIALISED;
    scratch_reuse: ColumnSplits, RACE;
    missing_barrier_after_arrival: Splits, RACE;
    counting_without_order: Splits, RACE;
    counter_not_reset: Splits, Values;
    two_blocks_on_one_output: Splits, RACE;
    outputs_of_all_lanes: Planes, RACE;
    wrong_mask: Planes, Fault("is not in its own mask");
    wrong_shuffle_width: Planes, Values;
    missing_step: Planes, Values;
    tail_off_by_one: Planes, BOUNDS;
    dropped_tail: Columns, Values;
    barrier_in_divergent_code: Planes, Fault("barrier in divergent code");
    early_return: FewValues, DEADLOCK;
    running_statistics_of_all_threads: Planes, RACE;
    running_statistics_of_all_splits: Splits, RACE;
    half_product: Half, Values;
    misaligned_plane: Edges, Fault("misaligned");
    plane_begins_too_early: Edges, RACE;
    strip_too_long: Columns, BOUNDS;
    cluster_exits_too_early: ClusterOwn, Fault("exits between cluster_arrive and cluster_wait");
    peers_before_barrier: ClusterOwn, Fault("before any cluster barrier");
    results_overwritten_for_peers: ClusterOwn, Fault("cluster_arrive twice without cluster_wait");
    missing_mbarrier_wait: ClusterBulk, IN_FLIGHT;
    wrong_parity: ClusterBulk, IN_FLIGHT;
    missing_copy_wait: ClusterOwn, IN_FLIGHT;
    copies_of_both_stages_awaited_as_one: ClusterOwn, IN_FLIGHT;
    stage_reused_too_early: BlockBulk, RACE;
    same_stage_for_the_next_strip: ClusterBulk, Fault("more arrivals at the mbarrier");
    missing_bulk_fence: BlockBulk, Fault("without a bulk_fence");
    bulk_bytes_short: BlockBulk, DEADLOCK;
    grid_ready_not_reset: GridBulk, RACE;
    grid_arrivals_not_reset: GridBulk, DEADLOCK;
    grid_total_not_awaited: GridBulk, RACE;
    total_announced_too_early: GridColumns, RACE;
    outputs_of_all_blocks: ClusterOwn, RACE;
    batch_counted_by_every_strip: BlockBulk, RACE;
}

/// The texts that a patch takes out and puts in.
fn parse(patch: &str) -> (String, String) {
    let hunk = patch.split_once("\n@@\n").expect("a patch has one hunk").1;
    let side = |other: char| -> String {
        hunk.lines()
            .filter(|line| !line.starts_with(other))
            .map(|line| format!("{}\n", line.get(1..).unwrap_or("")))
            .collect()
    };
    (side('+'), side('-'))
}

/// A device that shares nothing with other tests: no compiled kernels, no memory.
fn device(tensor: Tensor) -> Cuda {
    emulator::install();
    let (profile, choice) = tensor.device();
    let ordinal = emulator::ordinal(profile);
    let raw = emulator::create_context(ordinal);
    // SAFETY: the context is live, of this device, and owned by nobody else.
    let context: Arc<CudaContext> =
        unsafe { CudaContext::from_raw_context(ordinal, ordinal as i32, raw.cast()) }.expect("a context");
    Cuda::with_cache(context.new_stream().expect("a stream"), DiskCache::Off)
        .expect("a device and NVRTC")
        .with_choice(choice)
}

/// A training step with gradients on a tensor.
fn step(device: &Cuda, tensor: Tensor) -> Result<f64> {
    fn run<T: Element>(device: &Cuda, shape: Shape) -> Result<f64> {
        let case = Case::<T>::random(&mut Random::new(7), shape, Epilogue::AddRelu);
        let outcome = run_as(device, &case, &Form::default())?;
        Ok(worst(&case, &outcome))
    }
    match tensor {
        Tensor::Planes => run::<f32>(device, Shape::nchw(6, 5, 8, 16)),
        Tensor::FewValues => run::<f32>(device, Shape::nchw(2, 3, 4, 4)),
        Tensor::Edges => run::<f32>(device, Shape::nchw(4, 3, 9, 13)),
        Tensor::Splits => run::<f32>(device, Shape::nchw(40, 2, 16, 16)),
        Tensor::Columns => run::<f32>(device, Shape::nchw(5, 76, 5, 3).channels_last()),
        Tensor::ColumnSplits => run::<f32>(device, Shape::nchw(16, 24, 12, 12).channels_last()),
        Tensor::Half => run::<f16>(device, Shape::nchw(4, 3, 8, 16)),
        Tensor::GridColumns => run::<f32>(device, Shape::nchw(8, 40, 3, 3)),
        Tensor::BlockBulk | Tensor::ClusterOwn | Tensor::ClusterBulk | Tensor::GridBulk => {
            run::<f32>(device, Shape::nchw(4, 40, 4, 8))
        }
    }
}

/// The largest error of a result, in units of what rounding explains.
fn worst<T: Element>(case: &Case<T>, outcome: &Outcome<T>) -> f64 {
    let (want, scales) = reference(case);
    errors(case.shape, &outcome.values(), &want, &scales)
        .into_iter()
        .map(|(name, error)| {
            let dtype = match name {
                "y" | "dx" | "dz" => T::DTYPE,
                _ => <T::Param as Element>::DTYPE,
            };
            if error.is_nan() {
                f64::INFINITY
            } else {
                error / limit(dtype)
            }
        })
        .fold(0.0, f64::max)
}

fn find(name: &str) {
    let (_, patch, tensor, check) = BUGS.iter().find(|bug| bug.0 == name).expect("a bug of that name");
    let (taken_out, put_in) = parse(patch);
    let device = device(*tensor);
    let patches = emulator::patch_sources(&[(&taken_out, &put_in)]);
    let result = step(&device, *tensor);
    let applied = patches.finish();
    assert!(applied > 0, "{name}: the patch applies to no kernel any more");
    let fault = emulator::last_fault();
    match (check, result) {
        (Fault(words), Err(_)) => {
            let text = fault.expect("a message");
            assert!(text.contains(words), "{name}: found, but not by {words:?}: {text}");
        }
        (Values, Ok(worst)) => assert!(
            worst > 1.0,
            "{name}: not found; the worst error is {worst:.2} of the limit"
        ),
        (_, result) => panic!("{name}: not found as {check:?}, but {result:?}: {fault:?}"),
    }
}

#[test]
fn kernels_without_bugs_raise_nothing() {
    for tensor in Tensor::ALL {
        let device = device(tensor);
        let worst = step(&device, tensor).unwrap_or_else(|error| panic!("{tensor:?}: {error}"));
        assert!(worst <= 1.0, "{tensor:?}: the worst error is {worst:.2} of the limit");
        let launches = emulator::launches(device.stream().cu_stream());
        let resident = launches
            .iter()
            .filter(|launch| launch.kernel.starts_with("resident"))
            .count();
        let expected = if device.choice().resident { 2 } else { 0 };
        assert_eq!(resident, expected, "{tensor:?}: {launches:?}");
    }
}

#[test]
fn every_patch_is_tried() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bugs");
    for entry in std::fs::read_dir(folder).expect("the folder of patches") {
        let name = entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("a plain name");
        let tried = BUGS.iter().any(|bug| name == format!("{}.patch", bug.0));
        assert!(tried, "{name} is not in the list");
    }
}

#[test]
fn a_patch_that_does_not_apply_is_noticed() {
    let device = device(Tensor::FewValues);
    let patches = emulator::patch_sources(&[("no kernel says this", "")]);
    step(&device, Tensor::FewValues).unwrap();
    assert_eq!(patches.finish(), 0);
}
