//! Runs one training step of every implementation on given inputs and writes its numbers, for `scripts/accuracy`.
//!
//!     accuracy FOLDER
//!
//! Each `*.safetensors` in FOLDER holds x and dy (`f32`, N x C x H x W), weight and bias (`f32`, C). For each of them and each
//! implementation `FOLDER/results/CASE.NAME.safetensors` is written, with y, dx, dweight and dbias, flat.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use batchnorm_cuda::Shape;
use peers::{Inputs, Outputs, Peer, on_cpu};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: accuracy FOLDER")?;
    let results = Path::new(&folder).join("results");
    std::fs::create_dir_all(&results)?;
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let case = path.file_stem().expect("a file with an extension").to_string_lossy();
            let inputs = read(&path)?;
            for mut peer in on_cpu(&inputs).into_iter().chain(on_stand_in(&inputs)) {
                let name = format!("{case}.{}.safetensors", peer.name());
                write(&results.join(name), &peer.outputs())?;
            }
        }
    }
    Ok(())
}

/// This crate's kernels, run by the stand-in driver.
#[cfg(target_os = "linux")]
fn on_stand_in(inputs: &Inputs) -> Option<Box<dyn Peer>> {
    use batchnorm_cuda::Cuda;
    use batchnorm_cuda::cuda::DiskCache;
    use batchnorm_cuda::cudarc::driver::CudaContext;

    emulator::install();
    let context = CudaContext::new(emulator::ordinal("h200")).expect("the stand-in's device");
    // Kernels of the stand-in have no business among those of the user.
    let cuda = Cuda::with_cache(context.default_stream(), DiskCache::Off).expect("the stand-in's NVRTC");
    Some(Box::new(peers::Ours::new("batchnorm-cuda-stand-in", &cuda, inputs)))
}

/// The stand-in driver is for Linux.
#[cfg(not(target_os = "linux"))]
fn on_stand_in(_inputs: &Inputs) -> Option<Box<dyn Peer>> {
    None
}

fn read(path: &Path) -> Result<Inputs, Box<dyn Error>> {
    let bytes = std::fs::read(path)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let values = |name: &str| -> Result<Vec<f32>, Box<dyn Error>> {
        let (numbers, []) = tensors.tensor(name)?.data().as_chunks::<4>() else {
            return Err(format!("{name} is not f32").into());
        };
        Ok(numbers.iter().map(|&number| f32::from_le_bytes(number)).collect())
    };
    let &[batch, channels, height, width] = tensors.tensor("x")?.shape() else {
        return Err("x has not four dimensions".into());
    };
    Ok(Inputs {
        shape: Shape::nchw(batch, channels, height, width),
        x: values("x")?,
        dy: values("dy")?,
        weight: values("weight")?,
        bias: values("bias")?,
    })
}

fn write(path: &Path, outputs: &Outputs) -> Result<(), Box<dyn Error>> {
    let Outputs { y, dx, dweight, dbias } = outputs;
    let bytes: BTreeMap<_, Vec<u8>> = [("y", y), ("dx", dx), ("dweight", dweight), ("dbias", dbias)]
        .into_iter()
        .map(|(name, values)| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, bytes)| Ok((*name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, path)?;
    Ok(())
}
