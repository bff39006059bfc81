//! PyTorch's results: every golden file, on every device, against the float64 truth.

mod common;

use std::collections::BTreeMap;

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Dtype, Element, Real};
use common::golden::{Description, File, Part, files};
use common::{Case, Device, errors, limit, on_every_device, reference, run, say};

on_every_device!(
    every_file,
    successive_steps_of_one_module,
    large_mean_is_off_by_less_than_a_millionth,
);

/// Every file by teams of every size, with both ways of copying.
#[cfg(target_os = "linux")]
mod on_cuda_resident {
    use batchnorm_cuda::Cuda;
    use batchnorm_cuda::cuda::plan::{Choice, Operation, Problem, Team};

    use super::common::{Driver, say};
    use super::{Dtype, File, files};

    /// On the stand-in a device with few blocks where all of them take part: each of their threads costs the host something.
    fn device(team: Team) -> Cuda {
        match (super::common::driver(), team) {
            (Driver::StandIn, Team::Grid) => super::common::cuda_device(emulator::ordinal("small-100")),
            _ => super::common::cuda(),
        }
    }

    /// How many training steps are planned for the resident path, and how many there are. Where only bulk copies are allowed,
    /// which move 16 bytes or a multiple, many take the general one.
    fn resident_steps(device: &Cuda) -> (usize, usize) {
        let files = files().into_iter().map(|path| File::read(&path).unwrap());
        let steps = files
            .filter(|file| !file.is_state_dict())
            .map(|file| file.describe().unwrap());
        let plans: Vec<_> = steps
            .filter(|about| about.training && about.dtype != Dtype::F64)
            .map(|about| {
                device
                    .plan(&Problem::new(Operation::Train, about.shape, about.dtype))
                    .unwrap()
            })
            .collect();
        let resident = plans
            .iter()
            .filter(|plan| plan.kernels[0].instantiation.resident.is_some());
        (resident.count(), plans.len())
    }

    fn every_file(team: Team, stages: u32, bulk: bool) {
        let choice = Choice {
            stages: Some(stages),
            // Devices without bulk copies take the general path where only these are allowed.
            bulk: Some(bulk),
            ..Choice::resident(Some(team))
        };
        let device = device(team).with_choice(choice);
        if super::common::driver() == Driver::StandIn {
            let (resident, steps) = resident_steps(&device);
            say(&format!(
                "golden, {}: {resident} of {steps} training steps by resident kernels",
                device.choice()
            ));
            // Of those in the repository; what else is in `BATCHNORM_GOLDEN_DIR` may be larger than a chip.
            assert!(resident >= if bulk { 8 } else { 70 }, "{resident} of {steps}");
        }
        super::every_file(&device);
    }

    #[test]
    fn block() {
        every_file(Team::Block, 2, false);
    }

    #[test]
    fn cluster() {
        every_file(Team::Cluster(4), 1, true);
    }

    #[test]
    fn grid() {
        every_file(Team::Grid, 1, false);
    }
}

/// Greatest scaled error found, per stored type.
type Worst = BTreeMap<&'static str, f64>;

fn every_file<B: Device>(device: &B) {
    let files = files();
    let mut worst = Worst::new();
    let mut problems = Vec::new();
    for path in &files {
        let found = File::read(path).and_then(|file| check_file(device, &file, &mut worst));
        match found {
            Ok(found) => problems.extend(
                found
                    .into_iter()
                    .map(|problem| format!("{}: {problem}", path.display())),
            ),
            Err(unreadable) => problems.push(format!("{}: {unreadable}", path.display())),
        }
    }
    let errors: Vec<String> = worst
        .iter()
        .map(|(dtype, error)| format!("{dtype} {error:.1e}"))
        .collect();
    let (device, count) = (B::NAME, files.len());
    say(&format!(
        "golden, {device}: {count} files, worst scaled errors {}",
        errors.join(", ")
    ));
    assert!(
        files.len() >= 120,
        "golden data: {} files are not all of them",
        files.len()
    );
    assert!(
        problems.is_empty(),
        "{} on {}:\n{}",
        problems.len(),
        B::NAME,
        problems.join("\n")
    );
}

fn check_file<B: Device>(device: &B, file: &File, worst: &mut Worst) -> Result<Vec<String>, String> {
    if file.is_state_dict() {
        let double = file.tensors.values().any(|tensor| tensor.dtype == "f64");
        return match double {
            false => check_state_dict::<B, f32>(device, file),
            true => check_state_dict::<B, f64>(device, file),
        };
    }
    let about = file.describe()?;
    match about.dtype {
        Dtype::F16 => check_step::<B, f16>(device, file, &about, worst),
        Dtype::Bf16 => check_step::<B, bf16>(device, file, &about, worst),
        Dtype::F32 => check_step::<B, f32>(device, file, &about, worst),
        Dtype::F64 => check_step::<B, f64>(device, file, &about, worst),
    }
}

fn check_step<B: Device, T: Element>(
    device: &B,
    file: &File,
    about: &Description,
    worst: &mut Worst,
) -> Result<Vec<String>, String> {
    let case: Case<T> = file.case(about)?;
    let truth = file.truth::<T>(about)?;
    let mut got = run(device, &case).values();
    if about.part == Part::Backward {
        // The forward pass was run for the sake of the other; the file says nothing of what it must give.
        got.y = None;
    }
    let (_, scales) = reference(&case);
    let mut problems = Vec::new();
    for (name, error) in errors(case.shape, &got, &truth, &scales) {
        let dtype = if ["y", "dx", "dz"].contains(&name) {
            T::DTYPE
        } else {
            T::Param::DTYPE
        };
        let so_far = worst.entry(dtype.name()).or_default();
        *so_far = so_far.max(error);
        if error > limit(dtype) {
            problems.push(format!(
                "{name}: scaled error {error:.2e}, limit for {dtype} {:.1e}",
                limit(dtype)
            ));
        }
    }
    if got.num_batches_tracked != truth.num_batches_tracked {
        problems.push(format!(
            "num_batches_tracked: {:?}, not {:?}",
            got.num_batches_tracked, truth.num_batches_tracked
        ));
    }
    Ok(problems)
}

/// A state dict that PyTorch wrote goes into a module and comes out bit for bit.
fn check_state_dict<B: Device, P: Real>(device: &B, file: &File) -> Result<Vec<String>, String> {
    let wrong = |error: batchnorm_cuda::Error| error.to_string();
    let vector = |name| file.tensors.get(name).and_then(|tensor| tensor.shape.first().copied());
    let (affine, track) = (vector("weight"), vector("running_mean"));
    let config = BatchNorm2dConfig::new(affine.or(track).ok_or("a state dict of nothing")?)
        .affine(affine.is_some())
        .track_running_stats(track.is_some());
    let mut module = BatchNorm2d::<B, P>::new(device, config).map_err(wrong)?;
    module.load_safetensors_file(&file.path, "").map_err(wrong)?;

    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let saved = folder.path().join("saved.safetensors");
    module.save_safetensors_file(&saved, "").map_err(wrong)?;
    let saved = File::read(&saved)?;
    Ok(match saved.tensors == file.tensors {
        true => vec![],
        false => vec![format!("saved as {:?}", saved.tensors)],
    })
}

/// The files of a chain each start from PyTorch's statistics; here one module goes all the way by itself.
fn successive_steps_of_one_module<B: Device>(device: &B) {
    let steps = ["momentum_none_step1", "momentum_none_step2", "momentum_none_step3"].map(File::named);
    let mut state = None;
    for (number, file) in steps.iter().enumerate() {
        let about = file.describe().unwrap();
        let mut case: Case<f32> = file.case(&about).unwrap();
        case.state = state.unwrap_or(case.state);
        let outcome = run(device, &case);
        let (got, truth) = (outcome.values(), file.truth::<f32>(&about).unwrap());
        let (_, scales) = reference(&case);
        assert_eq!(got.num_batches_tracked, Some(number as i64 + 1));
        for (name, error) in errors(case.shape, &got, &truth, &scales) {
            // The truth starts from PyTorch's rounded statistics, we from ours: one more rounding for each step before.
            let allowed = limit(Dtype::F32) * (1 + number) as f64;
            assert!(error <= allowed, "{}, {name}: {error:.2e}", file.name());
        }
        state = Some(outcome.state);
    }
}

/// PyTorch is off by 9e-3 here.
fn large_mean_is_off_by_less_than_a_millionth<B: Device>(device: &B) {
    let file = File::named("large_mean_train_f32_nchw");
    let about = file.describe().unwrap();
    let case: Case<f32> = file.case(&about).unwrap();
    let truth = file.truth::<f32>(&about).unwrap().y.unwrap();
    let got = run(device, &case).values().y.unwrap();
    let greatest = truth.iter().fold(0.0f64, |greatest, y| greatest.max(y.abs()));
    for (got, want) in got.iter().zip(&truth) {
        approx::assert_abs_diff_eq!(*got, *want, epsilon = 1e-6 * greatest);
    }
}
