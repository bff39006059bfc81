//! The module for candle: the bits of the CPU backend, the numbers of candle-nn, the slopes of finite differences, and
//! what a model of candle's expects of its layers.

mod common;

use std::collections::HashMap;
use std::env;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use batchnorm_cuda::candle::{BatchNorm2d, batch_norm, batch_norm2d};
use batchnorm_cuda::{BatchNorm2dConfig, Epilogue, Layout, Shape, StateDict};
use candle_core::{DType, Device, Error, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{BatchNormConfig, Optimizer, SGD, VarBuilder, VarMap};
use common::candle::{assert_every_form_as_in, assert_golden_files_as_in};
use common::golden::{File, folder};
use common::{Case, Random, cpu, run};
use rayon::prelude::*;

const CPU: &Device = &Device::Cpu;

#[test]
fn golden_files_give_the_numbers_of_the_cpu_backend() {
    assert_golden_files_as_in(&cpu(), CPU);
}

#[test]
fn every_form_gives_the_numbers_of_the_cpu_backend() {
    assert_every_form_as_in(&cpu(), CPU);
}

/// Random numbers about a mean of their own for each channel.
fn random_tensor(random: &mut Random, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let values: Vec<f64> = (0..dims.iter().product()).map(|_| random.normal()).collect();
    let means: Vec<f64> = (0..dims[1]).map(|_| 3.0 * random.normal()).collect();
    let mut broadcast = vec![1; dims.len()];
    broadcast[1] = dims[1];
    Tensor::from_vec(values, dims, CPU)?
        .broadcast_add(&Tensor::from_vec(means, broadcast, CPU)?)?
        .to_dtype(dtype)
}

/// The largest difference, over the largest of what is wanted.
fn difference(got: &Tensor, want: &Tensor) -> Result<f64> {
    let greatest = |tensor: Tensor| {
        tensor
            .to_dtype(DType::F64)?
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_scalar::<f64>()
    };
    assert_eq!(got.shape(), want.shape());
    assert_eq!(got.dtype(), want.dtype());
    let scale = greatest(want.clone())?;
    Ok(greatest((got.to_dtype(DType::F64)? - want.to_dtype(DType::F64)?)?)? / scale.max(f64::MIN_POSITIVE))
}

/// Both modules from the same start, over three steps of training with an optimiser, and evaluated after each.
#[test]
fn trains_as_candle_nn_does() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        // Both round: candle-nn some ten times on the way, and small gradients are differences of large ones.
        let limit = if dtype == DType::F32 { 2e-5 } else { 1e-13 };
        for dims in [&[4, 3, 5, 7][..], &[8, 5], &[6, 4, 9], &[2, 3, 2, 3, 4]] {
            for affine in [true, false] {
                let config = BatchNormConfig {
                    eps: 1e-3,
                    affine,
                    momentum: 0.3,
                    ..BatchNormConfig::default()
                };
                let (own, theirs) = (VarMap::new(), VarMap::new());
                let builder = |map| VarBuilder::from_varmap(map, dtype, CPU).pp("layer.bn");
                let bn = batch_norm(dims[1], config, builder(&own))?;
                let candle = candle_nn::batch_norm(dims[1], config, builder(&theirs))?;
                assert_eq!(names(&own), names(&theirs));
                let mut optimizers = (SGD::new(own.all_vars(), 0.1)?, SGD::new(theirs.all_vars(), 0.1)?);
                let mut random = Random::new(7);
                for step in 0..3 {
                    let what = |name| format!("{dtype:?} {dims:?} affine {affine} step {step}: {name}");
                    let x = Var::from_tensor(&random_tensor(&mut random, dims, dtype)?)?;
                    let dy = random_tensor(&mut random, dims, dtype)?;
                    let y = (bn.forward_t(&x, true)?, candle.forward_t(&x, true)?);
                    assert!(difference(&y.0, &y.1)? < limit, "{}", what("y"));
                    let gradients = (
                        (&y.0 * &dy)?.sum_all()?.backward()?,
                        (&y.1 * &dy)?.sum_all()?.backward()?,
                    );
                    let dx = (gradients.0.get(&x).unwrap(), gradients.1.get(&x).unwrap());
                    assert!(difference(dx.0, dx.1)? < limit, "{}", what("dx"));
                    optimizers.0.step(&gradients.0)?;
                    optimizers.1.step(&gradients.1)?;
                    let evaluated = (bn.forward_t(&x, false)?, candle.forward_t(&x, false)?);
                    assert!(difference(&evaluated.0, &evaluated.1)? < limit, "{}", what("evaluated"));
                    for (name, own, theirs) in [
                        ("running_mean", bn.running_mean(), candle.running_mean()),
                        ("running_var", bn.running_var(), candle.running_var()),
                    ] {
                        assert!(difference(own, theirs)? < limit, "{}", what(name));
                    }
                    if let (Some(own), Some(theirs)) = (bn.weight_and_bias(), candle.weight_and_bias()) {
                        assert!(difference(own.0, theirs.0)? < limit, "{}", what("weight"));
                        assert!(difference(own.1, theirs.1)? < limit, "{}", what("bias"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The gradient in a random direction is the slope that two forward passes show.
#[test]
fn gradients_are_slopes() -> Result<()> {
    let dims = [3, 4, 3, 5];
    let mut random = Random::new(23);
    for train in [true, false] {
        for epilogue in Epilogue::ALL {
            let mut tensor = |dims: &[usize]| {
                Tensor::from_vec(
                    (0..dims.iter().product())
                        .map(|_| random.normal())
                        .collect::<Vec<f64>>(),
                    dims,
                    CPU,
                )
            };
            // In this order: x, residual, weight, bias.
            let at = [tensor(&dims)?, tensor(&dims)?, tensor(&[4])?, tensor(&[4])?];
            let direction = [tensor(&dims)?, tensor(&dims)?, tensor(&[4])?, tensor(&[4])?];
            let dy = tensor(&dims)?;
            let loss = |variables: &[Var]| {
                let [x, residual, weight, bias] = variables else {
                    panic!("four variables")
                };
                let (mean, variance) = (Tensor::full(0.3, 4, CPU)?, Tensor::full(1.7, 4, CPU)?);
                let bn = BatchNorm2d::new(
                    4,
                    mean,
                    variance,
                    weight.as_tensor().clone(),
                    bias.as_tensor().clone(),
                    1e-5,
                )?;
                let y = match epilogue {
                    Epilogue::Identity => bn.forward_t(x, train)?,
                    Epilogue::Relu => bn.forward_relu_t(x, train)?,
                    Epilogue::AddRelu => bn.forward_add_relu_t(x, residual, train)?,
                };
                (y * &dy)?.sum_all()
            };
            let moved = |by: f64| -> Result<Vec<Var>> {
                at.iter()
                    .zip(&direction)
                    .map(|(at, direction)| Var::from_tensor(&(at + (direction * by)?)?))
                    .collect()
            };
            // The step moves some value over the edge of the relu, with a chance of about the step.
            const STEP: f64 = 1e-6;
            let slope =
                (loss(&moved(STEP)?)?.to_scalar::<f64>()? - loss(&moved(-STEP)?)?.to_scalar::<f64>()?) / (2.0 * STEP);
            let variables = moved(0.0)?;
            let gradients = loss(&variables)?.backward()?;
            let mut along = 0.0;
            for (number, (variable, direction)) in variables.iter().zip(&direction).enumerate() {
                match gradients.get(variable) {
                    Some(gradient) => along += (gradient * direction)?.sum_all()?.to_scalar::<f64>()?,
                    None => assert!(
                        number == 1 && epilogue != Epilogue::AddRelu,
                        "no gradient at variable {number}"
                    ),
                }
            }
            approx::assert_relative_eq!(along, slope, max_relative = 1e-7);
        }
    }
    Ok(())
}

/// A tensor of some memory order: what lies in memory, and the view of it that is given to a module.
struct InMemory {
    what: &'static str,
    base: Tensor,
    view: fn(&Tensor) -> Result<Tensor>,
    /// The order of y that comes of it.
    layout: Layout,
}

/// The same numbers in many memory orders, [4, 6, 5, 3] each.
fn memory_orders(plain: &Tensor) -> Result<Vec<InMemory>> {
    fn framed(tensor: &Tensor, dim: usize) -> Result<Tensor> {
        let mut size = tensor.dims().to_vec();
        size[dim] = 2;
        let frame = Tensor::full(9f32, size, CPU)?;
        Tensor::cat(&[&frame, tensor, &frame], dim)
    }
    fn logical(nhwc: &Tensor) -> Result<Tensor> {
        nhwc.permute((0, 3, 1, 2))
    }
    let nhwc = plain.permute((0, 2, 3, 1))?.contiguous()?;
    let in_memory = |what, base, view, layout| InMemory {
        what,
        base,
        view,
        layout,
    };
    let (nchw_out, nhwc_out) = (Layout::Nchw, Layout::Nhwc);
    Ok(vec![
        in_memory("contiguous", plain.copy()?, |base| Ok(base.clone()), nchw_out),
        in_memory("some images", framed(plain, 0)?, |base| base.narrow(0, 2, 4), nchw_out),
        in_memory(
            "some channels",
            framed(plain, 1)?,
            |base| base.narrow(1, 2, 6),
            nchw_out,
        ),
        in_memory("some rows", framed(plain, 2)?, |base| base.narrow(2, 2, 5), nchw_out),
        in_memory("some columns", framed(plain, 3)?, |base| base.narrow(3, 2, 3), nchw_out),
        in_memory(
            "rows innermost",
            plain.transpose(2, 3)?.contiguous()?,
            |base| base.transpose(2, 3),
            nchw_out,
        ),
        in_memory(
            "images innermost",
            plain.transpose(0, 3)?.contiguous()?,
            |base| base.transpose(0, 3),
            nchw_out,
        ),
        in_memory("channels last", nhwc.clone(), logical, nhwc_out),
        in_memory(
            "channels last, some images",
            framed(&nhwc, 0)?,
            |base| logical(&base.narrow(0, 2, 4)?),
            nhwc_out,
        ),
        in_memory(
            "channels last, some columns",
            framed(&nhwc, 2)?,
            |base| logical(&base.narrow(2, 2, 3)?),
            nchw_out,
        ),
    ])
}

#[test]
fn any_memory_order_gives_the_same_numbers() -> Result<()> {
    let mut random = Random::new(3);
    let mut tensor = || random_tensor(&mut random, &[4, 6, 5, 3], DType::F32);
    let (xs, residuals) = (memory_orders(&tensor()?)?, memory_orders(&tensor()?)?);
    // y, the running variance, and the gradients at x, residual and weight.
    let step = |x: &InMemory, residual: &InMemory, train: bool| -> Result<[Tensor; 5]> {
        let variables = VarMap::new();
        let bn = batch_norm(6, 1e-5, VarBuilder::from_varmap(&variables, DType::F32, CPU))?;
        let (weight, _) = bn.weight_and_bias().expect("affine");
        let bases = (Var::from_tensor(&x.base)?, Var::from_tensor(&residual.base)?);
        let y = bn.forward_add_relu_t(&(x.view)(&bases.0)?, &(residual.view)(&bases.1)?, train)?;
        let contiguous = match x.layout {
            Layout::Nchw => y.is_contiguous(),
            Layout::Nhwc => y.permute((0, 2, 3, 1))?.is_contiguous(),
        };
        assert!(contiguous, "{}: y is not {}", x.what, x.layout);
        let gradients = y.sqr()?.sum_all()?.backward()?;
        let gradient = |of: &Tensor| gradients.get(of).expect("a gradient").clone();
        Ok([
            y.clone(),
            bn.running_var().copy()?,
            (x.view)(&gradient(&bases.0))?,
            (residual.view)(&gradient(&bases.1))?,
            gradient(weight),
        ])
    };
    let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    for train in [true, false] {
        let plain = step(&xs[0], &residuals[0], train)?;
        let last = step(&xs[7], &residuals[0], train)?;
        for (plain, last) in plain.iter().zip(&last) {
            assert!(difference(last, plain)? < 1e-6);
        }
        for x in &xs {
            // Sums over another memory order have another order.
            let want = if x.layout == Layout::Nchw { &plain } else { &last };
            for residual in &residuals {
                for (number, (got, want)) in step(x, residual, train)?.iter().zip(want).enumerate() {
                    assert_eq!(
                        numbers(got)?,
                        numbers(want)?,
                        "x {}, residual {}, train {train}: result {number}",
                        x.what,
                        residual.what
                    );
                }
            }
        }
    }
    Ok(())
}

/// Views of less memory than they have elements, and a matrix on its side: bits as of contiguous tensors.
#[test]
fn views_that_repeat_or_turn_give_the_same_numbers() -> Result<()> {
    type View = fn(&Tensor) -> Result<Tensor>;
    let views: [(&str, &[usize], View); 6] = [
        ("one image", &[1, 6, 5, 3], |base| base.broadcast_as((4, 6, 5, 3))),
        ("one value per channel", &[1, 6, 1, 1], |base| {
            base.broadcast_as((4, 6, 5, 3))
        }),
        ("one channel", &[4, 1, 5, 3], |base| base.broadcast_as((4, 6, 5, 3))),
        ("one row, channels last", &[4, 1, 3, 6], |base| {
            base.broadcast_as((4, 5, 3, 6))?.permute((0, 3, 1, 2))
        }),
        ("a matrix on its side", &[6, 8], Tensor::t),
        ("one column", &[1, 6], |base| base.broadcast_as((8, 6))),
    ];
    let mut random = Random::new(43);
    for (what, dims, view) in views {
        let mut tensor = |dims: &[usize]| {
            let values: Vec<f32> = (0..dims.iter().product()).map(|_| random.normal() as f32).collect();
            Tensor::from_vec(values, dims, CPU)
        };
        let base = tensor(dims)?;
        let other = tensor(view(&base)?.dims())?;
        for train in [true, false] {
            // The view as x and as residual; y, the running variance, and the gradients at both.
            let step = |contiguous: bool, as_x: bool| -> Result<[Tensor; 4]> {
                let (_, bn) = fresh(6)?;
                let (base, other) = (Var::from_tensor(&base)?, Var::from_tensor(&other)?);
                let mut viewed = view(&base)?;
                assert!(!viewed.is_contiguous(), "{what}");
                if contiguous {
                    viewed = viewed.contiguous()?;
                }
                let (x, residual) = if as_x {
                    (&viewed, other.as_tensor())
                } else {
                    (other.as_tensor(), &viewed)
                };
                let y = bn.forward_add_relu_t(x, residual, train)?;
                let gradients = y.powf(3.0)?.sum_all()?.backward()?;
                let gradient = |of: &Tensor| gradients.get(of).expect("a gradient").clone();
                Ok([y, bn.running_var().copy()?, gradient(&base), gradient(&other)])
            };
            for as_x in [true, false] {
                for (number, (got, want)) in step(false, as_x)?.iter().zip(&step(true, as_x)?).enumerate() {
                    let what = format!("{what}, as x {as_x}, train {train}: result {number}");
                    assert_eq!(values(got), values(want), "{what}");
                }
            }
        }
    }
    Ok(())
}

/// Nothing but the residual is a variable: its gradient alone is asked for.
#[test]
fn a_residual_may_be_all_that_is_differentiated() -> Result<()> {
    let mut random = Random::new(47);
    let x = random_tensor(&mut random, &[4, 3, 2, 5], DType::F64)?;
    let residual = Var::from_tensor(&random_tensor(&mut random, &[4, 3, 2, 5], DType::F64)?)?;
    for frozen_affine in [true, false] {
        for train in [true, false] {
            let module = || -> Result<BatchNorm2d> {
                let tensor = |value: f64| Tensor::full(value, 3, CPU);
                let (mean, variance) = (tensor(0.5)?, tensor(2.0)?);
                if frozen_affine {
                    BatchNorm2d::new(3, mean, variance, tensor(-1.5)?, tensor(0.25)?, 1e-5)
                } else {
                    BatchNorm2d::new_no_bias(3, mean, variance, 1e-5)
                }
            };
            let fused = module()?.forward_add_relu_t(&x, &residual, train)?;
            let apart = (module()?.forward_t(&x, train)? + residual.as_tensor())?.relu()?;
            assert!(difference(&fused, &apart)? < 1e-14);
            let gradients = fused.powf(3.0)?.sum_all()?.backward()?;
            let want = apart.powf(3.0)?.sum_all()?.backward()?;
            let gradient = gradients.get(&residual).expect("a gradient");
            assert!(difference(gradient, want.get(&residual).expect("a gradient"))? < 1e-13);
            assert!(gradients.get(&x).is_none());
        }
    }
    Ok(())
}

/// Gradients by the running statistics, which are constants.
#[test]
fn evaluation_is_differentiated_as_in_candle_nn() -> Result<()> {
    let mut random = Random::new(53);
    for (dtype, limit) in [(DType::F32, 1e-5), (DType::F64, 1e-13)] {
        let dims = [4, 3, 5, 2];
        let mut var = |dims: &[usize]| {
            let values: Vec<f64> = (0..dims.iter().product()).map(|_| random.normal()).collect();
            Var::from_tensor(&Tensor::from_vec(values, dims, CPU)?.to_dtype(dtype)?)
        };
        let (x, weight, bias, mean) = (var(&dims)?, var(&[3])?, var(&[3])?, var(&[3])?);
        let variance = (var(&[3])?.sqr()? + 0.5)?.detach();
        let dy = var(&dims)?.as_detached_tensor();
        let tensors = || {
            [
                mean.as_detached_tensor(),
                variance.clone(),
                weight.as_tensor().clone(),
                bias.as_tensor().clone(),
            ]
        };
        let [m, v, w, b] = tensors();
        let own = BatchNorm2d::new(3, m, v, w, b, 1e-3)?;
        let [m, v, w, b] = tensors();
        let theirs = candle_nn::BatchNorm::new(3, m, v, w, b, 1e-3)?;
        let gradients = |y: Tensor| (y.sqr()? * &dy)?.sum_all()?.backward();
        let (own, theirs) = (
            gradients(own.forward_t(&x, false)?)?,
            gradients(theirs.forward_t(&x, false)?)?,
        );
        for variable in [&x, &weight, &bias] {
            let (own, theirs) = (
                own.get(variable).expect("a gradient"),
                theirs.get(variable).expect("a gradient"),
            );
            assert!(difference(own, theirs)? < limit, "{dtype:?}");
        }
    }
    Ok(())
}

fn names(variables: &VarMap) -> Vec<String> {
    let mut names: Vec<_> = variables.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    names
}

/// A module over variables of its own.
fn fresh(channels: usize) -> Result<(VarMap, BatchNorm2d)> {
    let variables = VarMap::new();
    let bn = batch_norm(channels, 1e-5, VarBuilder::from_varmap(&variables, DType::F32, CPU))?;
    Ok((variables, bn))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn checkpoints_go_both_ways() -> Result<()> {
    let mut random = Random::new(5);
    let x = random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?;
    let folder = tempfile::tempdir()?;
    let (theirs_file, own_file) = (folder.path().join("candle-nn"), folder.path().join("own"));

    let variables = VarMap::new();
    let candle = candle_nn::batch_norm(3, 1e-5, VarBuilder::from_varmap(&variables, DType::F32, CPU).pp("bn1"))?;
    candle.forward_t(&x, true)?;
    variables.save(&theirs_file)?;

    // What candle-nn has saved is loaded, trained further, saved, and loaded by candle-nn.
    let mut own = VarMap::new();
    let bn = batch_norm(3, 1e-5, VarBuilder::from_varmap(&own, DType::F32, CPU).pp("bn1"))?;
    own.load(&theirs_file)?;
    assert_eq!(values(bn.running_var()), values(candle.running_var()));
    bn.forward_t(&x, true)?;
    own.save(&own_file)?;
    let mut back = VarMap::new();
    let candle = candle_nn::batch_norm(3, 1e-5, VarBuilder::from_varmap(&back, DType::F32, CPU).pp("bn1"))?;
    back.load(&own_file)?;
    assert_eq!(values(candle.running_mean()), values(bn.running_mean()));
    assert_eq!(
        names(&own),
        ["bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.weight"]
    );

    // All of PyTorch's names, with the count.
    let all = VarMap::new();
    let bn = batch_norm2d(
        BatchNorm2dConfig::new(3).momentum(None),
        VarBuilder::from_varmap(&all, DType::F32, CPU),
    )?;
    bn.forward_t(&x, true)?;
    bn.forward_t(&x, true)?;
    assert_eq!(
        names(&all),
        ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    );
    all.save(&own_file)?;
    let bytes = std::fs::read(&own_file)?;
    let state = StateDict::<f32>::from_safetensors(&bytes, "").map_err(Error::wrap)?;
    assert_eq!(state.num_batches_tracked, Some(2));
    assert_eq!(state.running_var, Some(values(bn.running_var())));
    Ok(())
}

#[test]
fn a_file_of_pytorch_is_loaded_and_evaluated() -> Result<()> {
    let path = folder().join("state_dict_bn8.safetensors");
    let bytes = std::fs::read(path)?;
    let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, CPU)?;
    let bn = batch_norm(8, 1e-5, vb)?;
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 3);
    let file = File::named("state_dict_bn8_eval");
    let about = file.describe().unwrap();
    let case: Case<f32> = file.case(&about).unwrap();
    let Shape {
        batch,
        channels,
        height,
        width,
        ..
    } = case.shape;
    let x = Tensor::from_vec(case.x.clone(), (batch, channels, height, width), CPU)?;
    assert_eq!(values(&bn.forward_t(&x, false)?), run(&cpu(), &case).y);
    Ok(())
}

/// A builder of half precision makes a module that takes half-precision tensors and keeps its own numbers in `f32`.
#[test]
fn half_precision_has_variables_of_f32() -> Result<()> {
    let variables = VarMap::new();
    let bn = batch_norm(2, 1e-5, VarBuilder::from_varmap(&variables, DType::F16, CPU))?;
    assert!(
        variables
            .all_vars()
            .iter()
            .all(|variable| variable.dtype() == DType::F32)
    );
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let x = Tensor::new(&[[1f32, 10.], [3., 30.]], CPU)?.to_dtype(dtype)?;
        let y = bn.forward_t(&x, true)?;
        assert_eq!(y.dtype(), dtype);
        let rounded: Vec<f32> = values(&y.to_dtype(DType::F32)?).iter().map(|y| y.round()).collect();
        assert_eq!(rounded, [-1.0, -1.0, 1.0, 1.0]);
    }
    Ok(())
}

/// A module of half-precision tensors, which candle-nn makes too: parameters that are variables are trained, running
/// statistics are copies.
#[test]
fn modules_are_made_of_half_precision() -> Result<()> {
    let mut random = Random::new(37);
    for dtype in [DType::F16, DType::BF16] {
        let ulp = if dtype == DType::F16 { 1e-3 } else { 1e-2 };
        let var = |values: [f32; 3]| Var::from_tensor(&Tensor::new(&values, CPU)?.to_dtype(dtype)?);
        let (mean, variance) = (var([0.5, -1.0, 2.0])?, var([1.5, 0.25, 4.0])?);
        let (weight, bias) = (var([1.0, -2.0, 0.5])?, var([0.0, 0.25, 1.0])?);
        let tensors = || [&mean, &variance, &weight, &bias].map(|of| of.as_tensor().clone());
        let [m, v, w, b] = tensors();
        let bn = BatchNorm2d::new(3, m, v, w, b, 1e-5)?;
        let [m, v, w, b] = tensors();
        let candle = candle_nn::BatchNorm::new(3, m, v, w, b, 1e-5)?;

        let x = random_tensor(&mut random, &[4, 3, 2, 2], dtype)?;
        let evaluated = (bn.forward_t(&x, false)?, candle.forward_t(&x, false)?);
        // candle-nn rounds on the way.
        assert!(difference(&evaluated.0, &evaluated.1)? < 4.0 * ulp, "{dtype:?}");

        assert_eq!(bn.running_mean().dtype(), DType::F32);
        let mut optimizer = SGD::new(vec![weight.clone(), bias.clone()], 0.5)?;
        let before = [
            values(&weight.to_dtype(DType::F32)?),
            values(&bias.to_dtype(DType::F32)?),
        ];
        let y = bn.forward_t(&x, true)?;
        optimizer.backward_step(&y.to_dtype(DType::F32)?.powf(3.0)?.sum_all()?)?;
        let after = [
            values(&weight.to_dtype(DType::F32)?),
            values(&bias.to_dtype(DType::F32)?),
        ];
        assert_ne!(before, after, "{dtype:?}: the variables move");
        assert_eq!(bn.weight_and_bias().expect("affine").0.id(), weight.id());
        assert!(
            difference(&bn.forward_t(&x, true)?, &y)? > 0.1,
            "{dtype:?}: y is by the moved ones"
        );
        // The running statistics moved are the module's own.
        assert_ne!(values(bn.running_mean()), [0.5, -1.0, 2.0]);
        assert_eq!(values(&mean.to_dtype(DType::F32)?), [0.5, -1.0, 2.0]);
    }

    // Mixed with single precision, but not with double.
    let ones = |dtype| Tensor::ones(3, dtype, CPU).unwrap();
    let new = |mean, weight| BatchNorm2d::new(3, ones(mean), ones(DType::F32), ones(weight), ones(DType::BF16), 1e-5);
    new(DType::F16, DType::F32)?;
    new(DType::F32, DType::F16)?;
    let (error, text) = failure(new(DType::F64, DType::F16));
    assert!(matches!(error, Error::UnexpectedDType { .. }), "{error}");
    assert_says(&text, &["running_var", "[3]", "F64", "F32"]);
    Ok(())
}

#[test]
fn an_optimiser_moves_the_parameters() -> Result<()> {
    let (variables, bn) = fresh(2)?;
    let mut optimizer = SGD::new(variables.all_vars(), 0.5)?;
    let x = Tensor::new(&[[1f32, 10.], [3., 30.]], CPU)?;
    let before = bn.forward_t(&x, true)?;
    optimizer.backward_step(&before.sum_all()?)?;
    let (weight, bias) = bn.weight_and_bias().unwrap();
    assert_eq!(values(bias), [-1.0, -1.0]); // 0 less 0.5 for each of two values
    assert_eq!(values(weight), [1.0, 1.0]); // the values are symmetric
    let after = bn.forward_t(&x, true)?;
    assert!(difference(&after, &(before - 1.0)?)? < 1e-6);
    Ok(())
}

/// A step that is differentiated late uses what its own forward pass left, whatever happened since.
#[test]
fn steps_do_not_disturb_each_other() -> Result<()> {
    let mut random = Random::new(9);
    let inputs: Vec<Var> = (0..3)
        .map(|_| Var::from_tensor(&random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?))
        .collect::<Result<_>>()?;
    for train in [true, false] {
        let gradient = |y: &Tensor, x: &Var| -> Result<Vec<f32>> {
            Ok(values(y.powf(3.0)?.sum_all()?.backward()?.get(x).expect("a gradient")))
        };
        let alone: Vec<_> = inputs
            .iter()
            .map(|x| gradient(&fresh(3)?.1.forward_relu_t(x, train)?, x))
            .collect::<Result<_>>()?;
        let (_, bn) = fresh(3)?;
        let outputs: Vec<_> = inputs
            .iter()
            .map(|x| bn.forward_relu_t(x, train))
            .collect::<Result<_>>()?;
        // In evaluation the running statistics at the time of the call count.
        bn.forward_t(&inputs[0].affine(5.0, 300.0)?, true)?;
        for at in [1, 2, 0, 1] {
            assert_eq!(
                gradient(&outputs[at], &inputs[at])?,
                alone[at],
                "train {train}, input {at}"
            );
        }
        // What the finished steps left is used again.
        drop(outputs);
        if !train {
            continue;
        }
        for (x, alone) in inputs.iter().zip(&alone) {
            assert_eq!(gradient(&bn.forward_relu_t(x, train)?, x)?, *alone);
        }
    }
    Ok(())
}

/// `relu(bn(x) + x)`: both gradients arrive at x.
#[test]
fn a_tensor_may_be_its_own_residual() -> Result<()> {
    let mut random = Random::new(13);
    let x = Var::from_tensor(&random_tensor(&mut random, &[4, 3, 2, 2], DType::F64)?)?;
    let vb = || VarBuilder::zeros(DType::F64, CPU);
    let fused = batch_norm(3, 1e-5, vb())?.forward_add_relu_t(&x, &x, true)?;
    let apart = (candle_nn::batch_norm(3, 1e-5, vb())?.forward_t(&x, true)? + x.as_tensor())?.relu()?;
    assert!(difference(&fused, &apart)? < 1e-14);
    let gradient =
        |y: Tensor| -> Result<Tensor> { Ok(y.sqr()?.sum_all()?.backward()?.get(&x).expect("a gradient").clone()) };
    assert!(difference(&gradient(fused)?, &gradient(apart)?)? < 1e-13);
    Ok(())
}

#[test]
fn clones_share_and_threads_may_evaluate() -> Result<()> {
    fn is_shared_between_threads<T: Send + Sync + Clone>(_: &T) {}
    let (_, bn) = fresh(2)?;
    is_shared_between_threads(&bn);
    is_shared_between_threads(&bn.inference());
    let x = Tensor::new(&[[1f32, 10.], [3., 30.]], CPU)?;
    bn.clone().forward_t(&x, true)?;
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 1);
    let want = values(&bn.forward_t(&x, false)?);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(values(&bn.forward_t(&x, false).unwrap()), want);
                }
            });
        }
    });
    Ok(())
}

/// Batches that are trained at the same time all move the statistics, and each gets its own gradient.
#[test]
fn threads_may_train_one_module() -> Result<()> {
    let (_, bn) = fresh(3)?;
    let mut random = Random::new(17);
    let x = Var::from_tensor(&random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?)?;
    let gradient = |bn: &BatchNorm2d| -> Vec<f32> {
        let y = bn.forward_t(&x, true).unwrap();
        let gradients = y.powf(3.0).unwrap().sum_all().unwrap().backward().unwrap();
        values(gradients.get(&x).expect("a gradient"))
    };
    let want = gradient(&fresh(3)?.1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    assert_eq!(gradient(&bn), want);
                }
            });
        }
    });
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 100);
    Ok(())
}

/// Runs a scenario in a process of its own with these variables of the environment, and fails if it takes longer than
/// `limit`. `test` is the full name of the test that calls.
fn in_own_process(test: &str, variables: &[(&str, &str)], limit: Duration, scenario: impl FnOnce() -> Result<()>) {
    /// Ends the process also where the test fails.
    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            // It may have ended by itself.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    const INSIDE: &str = "BATCHNORM_CANDLE_TEST_INSIDE";
    if env::var_os(INSIDE).is_some_and(|name| name == test) {
        return scenario().unwrap();
    }
    let mut process = Ended(
        Command::new(env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(INSIDE, test)
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let start = Instant::now();
    loop {
        if let Some(status) = process.0.try_wait().unwrap() {
            assert!(status.success(), "{test}: {status}");
            return;
        }
        assert!(start.elapsed() < limit, "{test}: not done after {limit:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A thread of rayon's pool that waits for the others takes up another task, here another call of the same module. It must
/// hold no lock then that the call wants.
#[test]
fn tasks_of_one_pool_may_share_a_module() {
    const TEST: &str = "tasks_of_one_pool_may_share_a_module";
    const ROUNDS: usize = 15;
    const TASKS: usize = 10;
    let variables = [("RAYON_NUM_THREADS", "3")];
    in_own_process(TEST, &variables, Duration::from_secs(240), || {
        let mut random = Random::new(31);
        // More than the 1 MiB below which a pass keeps to its thread.
        let small = Var::from_tensor(&random_tensor(&mut random, &[8, 16, 64, 64], DType::F32)?)?;
        let big = Tensor::ones((32, 16, 128, 128), DType::F32, CPU)?;
        let differentiated = |y: &Tensor| -> Vec<f32> {
            let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            values(gradients.get(&small).expect("a gradient"))
        };
        let step = |bn: &BatchNorm2d, train: bool| differentiated(&bn.forward_relu_t(&small, train).unwrap());
        let alone = step(&fresh(16)?.1, true);
        // One step that several tasks differentiate at once.
        let (_, other) = fresh(16)?;
        let y = other.forward_relu_t(&small, true)?;
        let (variables, bn) = fresh(16)?;
        let (weight, bias) = bn.weight_and_bias().expect("affine");
        let parameters: Vec<Var> = variables
            .all_vars()
            .into_iter()
            .filter(|variable| [weight.id(), bias.id()].contains(&variable.id()))
            .collect();
        for train in [true, false] {
            for round in 0..ROUNDS {
                // One thread sleeps and comes to help, one gives others work to take up, and one is in a long pass.
                rayon::scope(|scope| {
                    scope.spawn(|_| thread::sleep(Duration::from_millis(8)));
                    scope.spawn(|_| {
                        thread::sleep(Duration::from_millis(3));
                        (0..TASKS).into_par_iter().for_each(|task| match task % 5 {
                            0 => drop(bn.forward_t(&small, true).unwrap()),
                            1 => assert_eq!(step(&bn, true), alone, "round {round}"),
                            2 => drop(step(&bn, false)),
                            3 => assert_eq!(differentiated(&y), alone, "round {round}"),
                            // As an optimiser moves the parameters, though not far.
                            _ => {
                                for parameter in &parameters {
                                    parameter.set(&parameter.as_tensor().copy().unwrap()).unwrap();
                                }
                            }
                        });
                    });
                    scope.spawn(|_| drop(bn.forward_t(&big, train).unwrap()));
                });
            }
        }
        let trained = 2 * ROUNDS * (2 * TASKS / 5) + ROUNDS;
        assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, trained as i64);
        Ok(())
    });
}

/// The numbers that a pass moves may be what it is of: it does not wait for itself.
#[test]
fn running_statistics_may_be_arguments() {
    const TEST: &str = "running_statistics_may_be_arguments";
    in_own_process(TEST, &[], Duration::from_secs(60), || {
        let mut random = Random::new(59);
        let x = random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?;
        let (_, bn) = fresh(3)?;
        bn.forward_t(&x, true)?;
        let repeated = bn.running_mean().reshape((1, 3, 1, 1))?.broadcast_as((4, 3, 2, 2))?;
        let copy = repeated.detach().force_contiguous()?;
        for train in [false, true] {
            let (_, twin) = fresh(3)?;
            twin.forward_t(&x, true)?;
            let (y, want) = (
                bn.forward_add_relu_t(&x, &repeated, train)?,
                twin.forward_add_relu_t(&x, &copy, train)?,
            );
            assert_eq!(values(&y), values(&want));
            assert_eq!(values(bn.running_mean()), values(twin.running_mean()));
        }
        bn.forward_t(&repeated, true)?;
        Ok(())
    });
}

#[test]
fn inference_is_a_module() -> Result<()> {
    let (_, bn) = fresh(2)?;
    let x = Tensor::new(&[[1f32, 10.], [3., 30.]], CPU)?;
    bn.forward_t(&x, true)?;
    let model = candle_nn::seq().add(bn.inference()).add(candle_nn::Activation::Relu);
    assert_eq!(values(&model.forward(&x)?), values(&bn.forward_relu_t(&x, false)?));
    Ok(())
}

/// What this crate has no kernels for is candle-nn's.
#[test]
fn without_removing_the_mean_it_is_candle_nn() -> Result<()> {
    let config = BatchNormConfig {
        remove_mean: false,
        ..BatchNormConfig::default()
    };
    let mut random = Random::new(19);
    let (x, residual) = (
        random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?,
        random_tensor(&mut random, &[4, 3, 2, 2], DType::F32)?,
    );
    // A builder whose tensors are no variables: each module makes its own.
    let vb = || VarBuilder::zeros(DType::F32, CPU);
    let (own, theirs) = (batch_norm(3, config, vb())?, candle_nn::batch_norm(3, config, vb())?);
    for train in [true, false] {
        let want = theirs.forward_t(&x, train)?;
        assert_eq!(values(&own.forward_t(&x, train)?), values(&want));
        assert_eq!(values(own.running_var()), values(theirs.running_var()));
    }
    let want = theirs.forward_t(&x, false)?;
    assert_eq!(values(&own.forward_relu_t(&x, false)?), values(&want.relu()?));
    let want = (want + &residual)?.relu()?;
    assert_eq!(values(&own.forward_add_relu_t(&x, &residual, false)?), values(&want));

    assert_eq!(own.num_batches_tracked().to_scalar::<i64>()?, 0, "no batch is counted");
    assert_eq!(values(own.running_mean()), [0.0; 3], "the mean does not move");
    for dtype in [DType::F16, DType::BF16] {
        let vb = || VarBuilder::from_varmap(&VarMap::new(), dtype, CPU);
        let (own, in_single) = (
            batch_norm(3, config, vb())?,
            candle_nn::batch_norm(3, config, vb().to_dtype(DType::F32))?,
        );
        let (x, residual) = (x.to_dtype(dtype)?, residual.to_dtype(dtype)?);
        let single = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        for train in [true, false] {
            let want = (in_single.forward_t(&single(&x)?, train)? + single(&residual)?)?
                .relu()?
                .to_dtype(dtype)?;
            let got = own.forward_add_relu_t(&x, &residual, train)?;
            assert_eq!(got.dtype(), dtype);
            assert_eq!(values(&single(&got)?), values(&single(&want)?));
            assert_eq!(values(own.running_var()), values(in_single.running_var()));
        }
        assert!(candle_nn::batch_norm(3, config, vb())?.forward_t(&x, true).is_err());
    }
    Ok(())
}

#[test]
fn an_empty_batch_changes_nothing() -> Result<()> {
    let (_, bn) = fresh(2)?;
    let x = Var::zeros((0, 2, 3, 3), DType::F32, CPU)?;
    let y = bn.forward_t(&x, true)?;
    assert_eq!(y.dims(), [0, 2, 3, 3]);
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 0);
    let gradients = y.sum_all()?.backward()?;
    let (weight, bias) = bn.weight_and_bias().unwrap();
    for parameter in [weight, bias] {
        assert_eq!(values(gradients.get(parameter).expect("a gradient")), [0.0, 0.0]);
    }
    Ok(())
}

/// Nothing is computed for what no variable asks.
#[test]
fn gradients_are_those_of_variables() -> Result<()> {
    let tensor = |values: [f32; 2]| Tensor::new(&values, CPU);
    let weight = Var::from_tensor(&tensor([1.0, 2.0])?)?;
    let bias = tensor([0.0, 0.0])?;
    let bn = BatchNorm2d::new(
        2,
        tensor([0.0, 0.0])?,
        tensor([1.0, 1.0])?,
        weight.as_tensor().clone(),
        bias.clone(),
        1e-5,
    )?;
    let x = Tensor::new(&[[1f32, 10.], [4., 30.]], CPU)?;
    let gradients = bn.forward_t(&x, true)?.sqr()?.sum_all()?.backward()?;
    assert!(gradients.get(&weight).is_some());
    assert!(gradients.get(&bias).is_none() && gradients.get(&x).is_none());
    Ok(())
}

/// The innermost error, and all that is said about it.
fn failure<T>(result: Result<T>) -> (Error, String) {
    let Err(mut error) = result else { panic!("no error") };
    let text = error.to_string();
    loop {
        error = match error {
            Error::Context { inner, .. } | Error::WithBacktrace { inner, .. } => *inner,
            innermost => return (innermost, text),
        };
    }
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[test]
fn errors_are_candles_and_say_what_came() -> Result<()> {
    let (_, bn) = fresh(3)?;
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, CPU).unwrap();
    let x = zeros(&[2, 3, 4, 4], DType::F32);

    let (error, text) = failure(bn.forward_t(&zeros(&[3], DType::F32), true));
    assert!(matches!(error, Error::UnexpectedNumberOfDims { got: 1, .. }), "{error}");
    assert_says(&text, &["batch-norm", "[3]", "F32"]);

    for dims in [&[2, 4, 4, 4][..], &[1, 4, 1, 1], &[1, 4], &[2, 1, 5]] {
        for train in [true, false] {
            let (error, text) = failure(bn.forward_t(&zeros(dims, DType::F32), train));
            let Error::UnexpectedShape { expected, got, .. } = error else {
                panic!("{error}")
            };
            let mut wanted = dims.to_vec();
            wanted[1] = 3;
            assert_eq!((expected.dims(), got.dims()), (&wanted[..], dims));
            let got = format!("{} channels", wanted[1]);
            assert_says(&text, &[&got, &format!("{dims:?}"), &format!("{wanted:?}"), "F32"]);
        }
    }

    for train in [true, false] {
        for (dtype, name) in [(DType::F64, "F64"), (DType::U8, "U8"), (DType::I64, "I64")] {
            let (error, text) = failure(bn.forward_t(&zeros(&[2, 3, 4, 4], dtype), train));
            assert!(
                matches!(
                    error,
                    Error::UnexpectedDType {
                        expected: DType::F32,
                        ..
                    }
                ),
                "{error}"
            );
            assert_says(&text, &["[2, 3, 4, 4]", name, "F32"]);
        }
    }

    for dims in [&[1, 3, 1, 1][..], &[1, 3]] {
        let (_, text) = failure(bn.forward_t(&zeros(dims, DType::F32), true));
        assert_says(
            &text,
            &[
                "expected more than 1 value per channel when training",
                "[1, 3, 1, 1]",
                "F32",
            ],
        );
        bn.forward_t(&zeros(dims, DType::F32), false)?;
    }

    let (_, text) = failure(bn.forward_t(&zeros(&[2, 3, 0, 4], DType::F32), true));
    assert_says(&text, &["[2, 3, 0, 4]", "at least 1"]);

    let (error, text) = failure(bn.forward_add_relu_t(&x, &zeros(&[2, 3, 4, 5], DType::F32), true));
    assert!(matches!(error, Error::ShapeMismatchBinaryOp { .. }), "{error}");
    assert_says(&text, &["[2, 3, 4, 4]", "[2, 3, 4, 5]", "F32"]);
    let (error, text) = failure(bn.forward_add_relu_t(&x, &zeros(&[2, 3, 4, 4], DType::F16), true));
    assert!(matches!(error, Error::DTypeMismatchBinaryOp { .. }), "{error}");
    assert_says(&text, &["[2, 3, 4, 4]", "F32", "F16"]);

    // After all these errors the module is as it was.
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 0);
    assert_eq!(values(bn.running_var()), [1.0; 3]);
    Ok(())
}

/// Where candle keeps the graph of gradients, in its own environment variable, a second derivative is refused, not wrong.
#[test]
fn a_second_derivative_is_refused() {
    const TEST: &str = "a_second_derivative_is_refused";
    let variables = [("CANDLE_GRAD_DO_NOT_DETACH", "1")];
    in_own_process(TEST, &variables, Duration::from_secs(60), || {
        let (_, bn) = fresh(3)?;
        let x = Var::from_tensor(&random_tensor(&mut Random::new(41), &[4, 3, 2, 2], DType::F32)?)?;
        for train in [true, false] {
            let y = bn.forward_t(&x, train)?;
            let (error, text) = failure(y.sqr()?.sum_all()?.backward());
            assert!(matches!(error, Error::BackwardNotSupported { .. }), "{error}");
            assert_says(
                &text,
                &["batch-norm", "twice", "backward", "[4, 3, 2, 2]", "F32", "Cpu"],
            );
            let gradients = y.sum_all()?.backward()?;
            assert!(!gradients.get(&x).expect("a gradient").track_op());
        }
        Ok(())
    });
}

#[test]
fn a_module_is_not_made_of_what_does_not_fit() -> Result<()> {
    let ones = |len: usize, dtype| Tensor::ones(len, dtype, CPU).unwrap();
    let vector = || ones(3, DType::F32);
    let new = |mean, variance, weight, bias, eps| BatchNorm2d::new(3, mean, variance, weight, bias, eps);

    let (error, text) = failure(new(vector(), ones(4, DType::F32), vector(), vector(), 1e-5));
    assert!(matches!(error, Error::UnexpectedShape { .. }), "{error}");
    assert_says(&text, &["batch-norm", "running_var", "[3]", "[4]", "F32", "Cpu"]);
    let (error, text) = failure(new(vector(), vector(), ones(3, DType::F64), vector(), 1e-5));
    assert!(matches!(error, Error::UnexpectedDType { .. }), "{error}");
    assert_says(&text, &["weight", "[3]", "F32", "F64", "Cpu"]);
    let (error, text) = failure(new(ones(3, DType::U32), vector(), vector(), vector(), 1e-5));
    assert!(
        matches!(error, Error::UnexpectedDType { got: DType::U32, .. }),
        "{error}"
    );
    assert_says(&text, &["running_mean", "[3]", "U32"]);
    let (_, text) = failure(new(vector(), vector(), vector(), vector(), -1.0));
    assert_says(&text, &["eps", "-1", "[3]", "F32"]);
    let momentum = f64::INFINITY;
    let (_, text) = failure(BatchNorm2d::new_no_bias_with_momentum(
        3,
        vector(),
        vector(),
        1e-5,
        momentum,
    ));
    assert_says(&text, &["momentum", "inf"]);

    // A pass would wait for itself.
    let both = Var::ones(3, DType::F32, CPU)?.into_inner();
    let (_, text) = failure(new(both.clone(), both.clone(), vector(), vector(), 1e-5));
    assert_says(&text, &["must not share memory"]);
    let (_, text) = failure(new(both.clone(), vector(), vector(), both.narrow(0, 0, 3)?, 1e-5));
    assert_says(&text, &["must not share memory"]);

    let vb = |dtype| VarBuilder::zeros(dtype, CPU);
    for result in [
        batch_norm(3, 1e-5, vb(DType::U32).pp("bn7")),
        batch_norm2d(BatchNorm2dConfig::new(3), vb(DType::U32).pp("bn7")),
    ] {
        let (error, text) = failure(result);
        assert!(
            matches!(error, Error::UnexpectedDType { got: DType::U32, .. }),
            "{error}"
        );
        assert_says(&text, &["batch-norm", "[3]", "U32", "bn7", "Cpu"]);
    }
    let (_, text) = failure(batch_norm(0, 1e-5, vb(DType::F32)));
    assert_says(&text, &["num_features", "[0]", "F32"]);
    let (_, text) = failure(batch_norm(3, -1.0, vb(DType::F32)));
    assert_says(&text, &["eps", "[3]", "F32"]);
    let missing = VarBuilder::from_tensors(HashMap::new(), DType::F32, CPU).pp("layer1.bn1");
    let (error, text) = failure(batch_norm(3, 1e-5, missing));
    assert!(matches!(error, Error::CannotFindTensor { .. }), "{error}");
    assert_says(&text, &["layer1.bn1.running_mean", "[3]", "F32"]);
    Ok(())
}

#[test]
fn the_configuration_can_be_asked() -> Result<()> {
    let config = BatchNormConfig {
        eps: 1e-3,
        momentum: 0.25,
        affine: false,
        remove_mean: true,
    };
    let bn = batch_norm(5, config, VarBuilder::zeros(DType::F32, CPU))?;
    assert_eq!(
        (bn.eps(), bn.momentum(), bn.weight_and_bias().is_none()),
        (1e-3, 0.25, true)
    );
    assert_eq!(
        *bn.config(),
        BatchNorm2dConfig::new(5).eps(1e-3).momentum(0.25).affine(false)
    );
    let average = batch_norm2d(
        BatchNorm2dConfig::new(5).momentum(None),
        VarBuilder::zeros(DType::F32, CPU),
    )?;
    assert!(average.momentum().is_nan());
    Ok(())
}
