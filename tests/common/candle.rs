//! Steps in candle, and what they are held against: the same steps on a backend of this crate's own.

use std::collections::HashMap;

use batchnorm_cuda::candle::{BatchNorm2d, batch_norm2d};
use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2dConfig, Dtype, Element, Epilogue, Layout, Real, Shape, StateDict};
use candle_core::{ModuleT, Result, Tensor, Var, WithDType};
use candle_nn::VarBuilder;

use super::case::{Case, Outcome, run};
use super::golden::{File, files};
use super::{Device, Random};

/// Fails unless candle's module, on candle's `device`, gives on every golden file what `backend` gives.
pub fn assert_golden_files_as_in<B: Device>(backend: &B, device: &candle_core::Device) {
    let mut steps = 0;
    for path in files() {
        let file = File::read(&path).unwrap();
        if file.is_state_dict() {
            continue;
        }
        let about = file.describe().unwrap();
        let name = file.name();
        match about.dtype {
            Dtype::F16 => assert_as_in::<B, f16>(backend, device, &name, &file.case(&about).unwrap()),
            Dtype::Bf16 => assert_as_in::<B, bf16>(backend, device, &name, &file.case(&about).unwrap()),
            Dtype::F32 => assert_as_in::<B, f32>(backend, device, &name, &file.case(&about).unwrap()),
            Dtype::F64 => assert_as_in::<B, f64>(backend, device, &name, &file.case(&about).unwrap()),
        }
        steps += 1;
    }
    assert!(steps >= 119, "golden data: {steps} steps are not all of them");
}

/// As [`assert_golden_files_as_in`], of random numbers in every element type, memory order, epilogue and kind of module.
pub fn assert_every_form_as_in<B: Device>(backend: &B, device: &candle_core::Device) {
    fn forms<B: Device, T: Element<Param: WithDType> + WithDType>(backend: &B, device: &candle_core::Device) {
        let mut random = Random::new(11);
        for shape in [Shape::nchw(3, 5, 6, 7), Shape::nchw(9, 2, 1, 1)] {
            for layout in [Layout::Nchw, Layout::Nhwc] {
                for epilogue in Epilogue::ALL {
                    let case = Case::<T>::random(&mut random, Shape { layout, ..shape }, epilogue);
                    for affine in [true, false] {
                        for track in [true, false] {
                            let case = case.clone().affine(affine).track_running_stats(track);
                            let what = format!("{shape} {layout} {epilogue} affine {affine} track {track}");
                            assert_as_in(backend, device, &what, &case);
                            assert_as_in(backend, device, &what, &case.evaluation());
                        }
                    }
                }
            }
        }
    }
    forms::<B, f16>(backend, device);
    forms::<B, bf16>(backend, device);
    forms::<B, f32>(backend, device);
    forms::<B, f64>(backend, device);
}

/// Fails unless candle's module gives what the backend gives, number by number.
///
/// Zero has one sign here: candle adds gradients to zeros.
fn assert_as_in<B: Device, T: Element<Param: WithDType> + WithDType>(
    backend: &B,
    device: &candle_core::Device,
    what: &str,
    case: &Case<T>,
) {
    let got = run_in_candle(device, case)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
        .values();
    let mut want = run(backend, case).values();
    (want.save_mean, want.save_invstd) = (None, None);
    for ((name, got), (_, want)) in got.tensors().into_iter().zip(want.tensors()) {
        let (Some(got), Some(want)) = (got, want) else {
            assert_eq!(got, want, "{what}: {name}");
            continue;
        };
        assert_eq!(got.len(), want.len(), "{what}: {name}");
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let same = got == want || got.is_nan() && want.is_nan();
            assert!(same, "{what}: {name}: differs first at {i}: {got}, not {want}");
        }
    }
    assert_eq!(got.num_batches_tracked, want.num_batches_tracked, "{what}");
}

/// Runs a step through candle, its gradients through candle's autograd.
fn run_in_candle<T: Element<Param: WithDType> + WithDType>(
    device: &candle_core::Device,
    case: &Case<T>,
) -> Result<Outcome<T>> {
    let Shape {
        batch,
        channels,
        height,
        width,
        layout,
    } = case.shape;
    let dims = match layout {
        Layout::Nchw => [batch, channels, height, width],
        Layout::Nhwc => [batch, height, width, channels],
    };
    let logical = |tensor: &Tensor| match layout {
        Layout::Nchw => Ok(tensor.clone()),
        Layout::Nhwc => tensor.permute((0, 3, 1, 2)),
    };
    let tensor = |values: &Vec<T>| Var::from_slice(values, &dims, device);
    let bn = module(device, case.config.clone(), &case.state)?;
    let (x, z) = (tensor(&case.x)?, case.z.as_ref().map(tensor).transpose()?);
    let y = match (&z, case.epilogue) {
        (None, Epilogue::Identity) => bn.forward_t(&logical(&x)?, case.training)?,
        (None, Epilogue::Relu) => bn.forward_relu_t(&logical(&x)?, case.training)?,
        (Some(z), Epilogue::AddRelu) => bn.forward_add_relu_t(&logical(&x)?, &logical(z)?, case.training)?,
        (z, epilogue) => panic!("{epilogue} with a residual: {}", z.is_some()),
    };
    assert_eq!(y.dims(), [batch, channels, height, width]);
    let in_memory = |tensor: &Tensor| -> Result<Vec<T>> { tensor.flatten_all()?.to_vec1() };
    let stored = match layout {
        Layout::Nchw => y.clone(),
        Layout::Nhwc => y.permute((0, 2, 3, 1))?,
    };
    assert!(stored.is_contiguous(), "y has the memory order of x");

    let gradients = match &case.dy {
        Some(dy) => Some(
            (stored.clone() * tensor(dy)?.as_detached_tensor())?
                .sum_all()?
                .backward()?,
        ),
        None => None,
    };
    let gradient = |of: Option<&Tensor>| of.and_then(|of| gradients.as_ref()?.get(of));
    let (weight, bias) = bn.weight_and_bias().unzip();
    let vector = |of: Option<&Tensor>| gradient(of).map(Tensor::to_vec1).transpose();
    Ok(Outcome {
        y: in_memory(&stored)?,
        dx: gradient(Some(&x)).map(in_memory).transpose()?,
        dz: gradient(z.as_deref()).map(in_memory).transpose()?,
        dweight: vector(weight)?,
        dbias: vector(bias)?,
        save_mean: None,
        save_invstd: None,
        state: state_of(&bn)?,
    })
}

/// A module in a given state, whose parameters are variables.
fn module<P: WithDType + Real>(
    device: &candle_core::Device,
    config: BatchNorm2dConfig,
    state: &StateDict<P>,
) -> Result<BatchNorm2d> {
    let vectors = [
        ("weight", &state.weight),
        ("bias", &state.bias),
        ("running_mean", &state.running_mean),
        ("running_var", &state.running_var),
    ];
    let mut tensors = HashMap::new();
    for (name, values) in vectors {
        if let Some(values) = values {
            let variable = Var::from_slice(values, values.len(), device)?;
            tensors.insert(format!("bn.{name}"), variable.into_inner());
        }
    }
    if let Some(batches) = state.num_batches_tracked {
        tensors.insert("bn.num_batches_tracked".into(), Tensor::new(batches, device)?);
    }
    batch_norm2d(
        config,
        VarBuilder::from_tensors(tensors, <P as WithDType>::DTYPE, device).pp("bn"),
    )
}

fn state_of<P: WithDType + Real>(bn: &BatchNorm2d) -> Result<StateDict<P>> {
    let (weight, bias) = bn.weight_and_bias().unzip();
    let tracked = bn.config().track_running_stats;
    let vector = |tensor: Option<&Tensor>| tensor.map(Tensor::to_vec1::<P>).transpose();
    Ok(StateDict {
        weight: vector(weight)?,
        bias: vector(bias)?,
        running_mean: vector(tracked.then(|| bn.running_mean()))?,
        running_var: vector(tracked.then(|| bn.running_var()))?,
        num_batches_tracked: if tracked {
            Some(bn.num_batches_tracked().to_scalar()?)
        } else {
            None
        },
    })
}
