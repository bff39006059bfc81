//! The module for candle on a GPU: the bits of the CUDA backend, in candle's memory and on candle's stream.
//!
//! Needs a real device: candle's own kernels run on no stand-in.

mod common;

use batchnorm_cuda::Cuda;
use batchnorm_cuda::candle::{BatchNorm2d, batch_norm};
use batchnorm_cuda::cudarc::driver::CudaContext;
use candle_core::{DType, Device, Error, ModuleT, Result, Tensor, Var};
use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
use common::candle::{assert_every_form_as_in, assert_golden_files_as_in};
use common::{Driver, driver, on_own_stream};

fn gpu() -> Device {
    Device::new_cuda(0).expect("a GPU")
}

/// The crate's own backend on the same GPU.
fn cuda() -> Cuda {
    assert_eq!(driver(), Driver::Real);
    on_own_stream(&CudaContext::new(0).expect("a GPU"))
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

fn module(channels: usize, device: &Device) -> Result<(VarMap, BatchNorm2d)> {
    let variables = VarMap::new();
    let bn = batch_norm(channels, 1e-5, VarBuilder::from_varmap(&variables, DType::F32, device))?;
    Ok((variables, bn))
}

#[test]
fn golden_files_give_the_numbers_of_the_cuda_backend() {
    assert_golden_files_as_in(&cuda(), &gpu());
}

#[test]
fn every_form_gives_the_numbers_of_the_cuda_backend() {
    assert_every_form_as_in(&cuda(), &gpu());
}

/// Ten steps with an optimiser: candle's kernels and this crate's take turns on one stream.
#[test]
fn trains_as_on_the_cpu() -> Result<()> {
    let train = |device: &Device| -> Result<Vec<f32>> {
        let (variables, bn) = module(8, device)?;
        let mut optimizer = SGD::new(variables.all_vars(), 0.05)?;
        let x = Tensor::arange(0f32, 4.0 * 8.0 * 6.0 * 5.0, device)?
            .sin()?
            .reshape((4, 8, 6, 5))?;
        for _ in 0..10 {
            let y = bn.forward_add_relu_t(&x, &x, true)?;
            optimizer.backward_step(&(y - &x)?.sqr()?.mean_all()?)?;
        }
        let (weight, bias) = bn.weight_and_bias().expect("affine");
        values(&Tensor::cat(&[weight, bias, bn.running_mean(), bn.running_var()], 0)?)
    };
    for (gpu, cpu) in train(&gpu())?.iter().zip(&train(&Device::Cpu)?) {
        approx::assert_abs_diff_eq!(gpu, cpu, epsilon = 1e-4);
    }
    Ok(())
}

/// A view at an odd offset, and a permuted tensor, without a copy; and one that must be copied.
#[test]
fn views_are_taken() -> Result<()> {
    let device = gpu();
    let (_, bn) = module(4, &device)?;
    let plain = Tensor::arange(0f32, 240.0, &device)?.cos()?.reshape((4, 4, 5, 3))?;
    let want = values(&bn.forward_t(&plain, true)?)?;
    let framed = Tensor::cat(&[&plain.narrow(0, 0, 1)?, &plain], 0)?;
    let views = [
        framed.narrow(0, 1, 4)?,
        plain.transpose(2, 3)?.contiguous()?.transpose(2, 3)?,
        plain.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2))?,
    ];
    for view in views {
        for (got, want) in values(&bn.forward_t(&view, true)?)?.iter().zip(&want) {
            approx::assert_abs_diff_eq!(got, want, epsilon = 1e-5);
        }
    }
    Ok(())
}

#[test]
fn a_tensor_of_another_device_is_refused() -> Result<()> {
    let device = gpu();
    let (_, bn) = module(3, &device)?;
    let (_, on_cpu) = module(3, &Device::Cpu)?;
    let host = Tensor::zeros((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
    let here = host.to_device(&device)?;
    // Another context of the same GPU is another device too: its stream is not ordered with this one's.
    let elsewhere = host.to_device(&gpu())?;
    for result in [
        bn.forward_t(&host, true),
        bn.forward_t(&elsewhere, true),
        on_cpu.forward_t(&here, true),
        bn.forward_add_relu_t(&here, &host, true),
    ] {
        let Err(Error::Context { inner, context }) = result else {
            panic!("{result:?}")
        };
        assert!(context.to_string().contains("[2, 3, 4, 4]"), "{context}");
        assert!(inner.to_string().contains("device mismatch"), "{inner}");
    }
    assert_eq!(bn.num_batches_tracked().to_scalar::<i64>()?, 0);
    Ok(())
}

/// Scratch memory goes from step to step, and from a thread's steps to those of no other.
#[test]
fn threads_train_modules_of_their_own() -> Result<()> {
    let step = |device: &Device| -> Result<Vec<f32>> {
        let (_, bn) = module(4, device)?;
        let x = Var::from_tensor(&Tensor::arange(0f32, 240.0, device)?.cos()?.reshape((4, 4, 5, 3))?)?;
        let mut gradient = Vec::new();
        for _ in 0..20 {
            let y = bn.forward_relu_t(&x, true)?;
            gradient = values(y.powf(3.0)?.sum_all()?.backward()?.get(&x).expect("a gradient"))?;
        }
        Ok(gradient)
    };
    let want = step(&gpu())?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| step(&gpu()).expect("a step"))).collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic"), want);
        }
    });
    Ok(())
}
