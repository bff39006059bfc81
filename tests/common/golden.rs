//! Reads the golden files: format in the README of `tests/golden`.
//!
//! A file may come from a stranger. Whatever it says is read, and what does not fit together is an error, never a guess.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{BatchNorm2dConfig, Dtype, Element, Epilogue, Layout, Momentum, Real, Shape, StateDict};
use safetensors::SafeTensors;

use super::case::Case;
use super::reference::Values;

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// `f16`, `bf16`, `f32`, `f64` or `i64`.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// What a file holds.
#[derive(Clone, Debug)]
pub struct File {
    pub path: PathBuf,
    pub metadata: HashMap<String, String>,
    pub tensors: BTreeMap<String, Tensor>,
}

/// What a file of a step says beside its tensors.
#[derive(Clone, Debug)]
pub struct Description {
    pub shape: Shape,
    pub dtype: Dtype,
    pub config: BatchNorm2dConfig,
    pub training: bool,
    pub epilogue: Epilogue,
    pub part: Part,
}

/// What a step's file is limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    Forward,
    Backward,
}

type Result<T> = std::result::Result<T, String>;

/// The folder of the golden data: that of the sources, unless a binary that was carried elsewhere is told another.
pub fn folder() -> PathBuf {
    match std::env::var_os("BATCHNORM_TEST_DATA") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

/// Every golden file of the project, and those of the folder (and its subfolders) that `BATCHNORM_GOLDEN_DIR` names.
pub fn files() -> Vec<PathBuf> {
    let mut files = safetensors_under(&folder());
    if let Some(more) = std::env::var_os("BATCHNORM_GOLDEN_DIR") {
        files.extend(safetensors_under(Path::new(&more)));
    }
    files
}

fn safetensors_under(folder: &Path) -> Vec<PathBuf> {
    let unreadable = |error: std::io::Error| -> ! { panic!("golden data: {}: {error}", folder.display()) };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap_or_else(|error| unreadable(error)) {
        let path = entry.unwrap_or_else(|error| unreadable(error)).path();
        if path.is_dir() {
            files.extend(safetensors_under(&path));
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    files
}

impl File {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| error.to_string())?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| error.to_string())?
            .iter()
            .map(|(name, view)| {
                let tensor = Tensor {
                    dtype: format!("{:?}", view.dtype()).to_lowercase(),
                    shape: view.shape().into(),
                    bytes: view.data().into(),
                };
                (name.to_owned(), tensor)
            })
            .collect();
        Ok(Self {
            path: path.into(),
            metadata: header.metadata().clone().unwrap_or_default(),
            tensors,
        })
    }

    /// A file of the project by its name without the ending.
    pub fn named(name: &str) -> Self {
        let path = folder().join(format!("{name}.safetensors"));
        Self::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into()
    }

    /// Whether it holds a state dict and not a step: PyTorch's names and no others.
    pub fn is_state_dict(&self) -> bool {
        const NAMES: [&str; 5] = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"];
        !self.tensors.is_empty() && self.tensors.keys().all(|name| NAMES.contains(&name.as_str()))
    }

    fn key<T>(&self, key: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let text = self
            .metadata
            .get(key)
            .ok_or_else(|| format!("metadata: no key {key}"))?;
        parse(text).ok_or_else(|| format!("metadata: {key} is {text:?}"))
    }

    pub fn describe(&self) -> Result<Description> {
        let truth = |text: &str| text.parse::<bool>().ok();
        let number = |text: &str| text.parse::<f64>().ok();
        let dtype: Dtype = self.key("dtype", |text| text.parse().ok())?;
        self.key("param_dtype", |text| (text == dtype.param().name()).then_some(()))?;
        self.key("reference", |text| {
            ["torch", "f64_rounded"].contains(&text).then_some(())
        })?;
        let [batch, channels, height, width] = self.key("shape", |text| serde_json::from_str(text).ok())?;
        let layout: Layout = self.key("layout", |text| text.parse().ok())?;
        let momentum = self.key("momentum", |text| match text {
            "none" => Some(Momentum::CumulativeAverage),
            factor => number(factor).map(Momentum::Factor),
        })?;
        Ok(Description {
            shape: Shape {
                batch,
                channels,
                height,
                width,
                layout,
            },
            dtype,
            config: BatchNorm2dConfig::new(channels)
                .eps(self.key("eps", number)?)
                .momentum(momentum)
                .affine(self.key("affine", truth)?)
                .track_running_stats(self.key("track_running_stats", truth)?),
            training: self.key("training", truth)?,
            epilogue: self.key("activation", |text| text.parse().ok())?,
            part: self.key("part", |text| match text {
                "all" => Some(Part::All),
                "forward" => Some(Part::Forward),
                "backward" => Some(Part::Backward),
                _ => None,
            })?,
        })
    }

    fn tensor(&self, name: &str, dtype: &str, shape: &[usize]) -> Result<&[u8]> {
        let tensor = self.tensors.get(name).ok_or_else(|| format!("no tensor {name}"))?;
        if (tensor.dtype.as_str(), tensor.shape.as_slice()) != (dtype, shape) {
            return Err(format!(
                "{name}: {} {:?}, not {dtype} {shape:?}",
                tensor.dtype, tensor.shape
            ));
        }
        Ok(&tensor.bytes)
    }

    /// The step's inputs.
    pub fn case<T: Element>(&self, about: &Description) -> Result<Case<T>> {
        let (full, vector) = (full_shape(about.shape), [about.shape.channels]);
        let (dtype, param) = (T::DTYPE.name(), T::Param::DTYPE.name());
        let tensor = |name: &str| self.tensor(name, dtype, &full).map(decode::<T>);
        let params = |name: &str| self.tensor(name, param, &vector).map(decode::<T::Param>);
        let when = |there, read: &dyn Fn() -> Result<Vec<T>>| if there { read().map(Some) } else { Ok(None) };
        let params_when = |there, name: &str| if there { params(name).map(Some) } else { Ok(None) };
        let (affine, track) = (about.config.affine, about.config.track_running_stats);
        Ok(Case {
            shape: about.shape,
            config: about.config.clone(),
            training: about.training,
            epilogue: about.epilogue,
            state: StateDict {
                weight: params_when(affine, "weight")?,
                bias: params_when(affine, "bias")?,
                running_mean: params_when(track, "running_mean_in")?,
                running_var: params_when(track, "running_var_in")?,
                num_batches_tracked: if track {
                    Some(self.count("num_batches_tracked_in")?)
                } else {
                    None
                },
            },
            x: tensor("x")?,
            z: when(about.epilogue == Epilogue::AddRelu, &|| tensor("z"))?,
            dy: when(about.part != Part::Forward, &|| tensor("dy"))?,
        })
    }

    /// The truth about what the step must give, and nothing of which the file says nothing.
    pub fn truth<T: Element>(&self, about: &Description) -> Result<Values> {
        let (full, vector) = (full_shape(about.shape), vec![about.shape.channels]);
        let read = |there: bool, name: &str, stored: Dtype, shape: &[usize]| {
            if !there {
                return match self.tensors.contains_key(name) {
                    true => Err(format!("{name} should not be there")),
                    false => Ok(None),
                };
            }
            // PyTorch's own result is not what we are held against; that it is there in its type tells our limit.
            self.tensor(name, stored.name(), shape)?;
            self.tensor(&format!("{name}64"), "f64", shape)
                .map(|bytes| Some(decode::<f64>(bytes)))
        };
        let forward = about.part != Part::Backward;
        let backward = about.part != Part::Forward;
        let (affine, track) = (about.config.affine, about.config.track_running_stats);
        let by_batch = about.training || !track;
        let (element, param) = (T::DTYPE, T::Param::DTYPE);
        let dz = if backward && about.epilogue == Epilogue::AddRelu {
            let exact = decode::<T>(self.tensor("dz", element.name(), &full)?);
            Some(exact.iter().map(|value| value.to_param().to_f64()).collect())
        } else {
            None
        };
        Ok(Values {
            y: read(forward, "y", element, &full)?,
            dx: read(backward, "dx", element, &full)?,
            dz,
            dweight: read(backward && affine, "dweight", param, &vector)?,
            dbias: read(backward && affine, "dbias", param, &vector)?,
            running_mean: read(track, "running_mean_out", param, &vector)?,
            running_var: read(track, "running_var_out", param, &vector)?,
            save_mean: read(by_batch, "save_mean", param, &vector)?,
            save_invstd: read(by_batch, "save_invstd", param, &vector)?,
            num_batches_tracked: if track {
                Some(self.count("num_batches_tracked_out")?)
            } else {
                None
            },
        })
    }

    fn count(&self, name: &str) -> Result<i64> {
        let bytes = self.tensor(name, "i64", &[])?;
        Ok(i64::from_le_bytes(
            bytes.try_into().map_err(|_| format!("{name}: {} bytes", bytes.len()))?,
        ))
    }
}

/// The shape in which a tensor is stored.
fn full_shape(shape: Shape) -> [usize; 4] {
    let Shape {
        batch,
        channels,
        height,
        width,
        layout,
    } = shape;
    match layout {
        Layout::Nchw => [batch, channels, height, width],
        Layout::Nhwc => [batch, height, width, channels],
    }
}

/// Little-endian bytes of elements of `T`.
fn decode<T: Element>(bytes: &[u8]) -> Vec<T> {
    // Every stored value passes exactly through f64, and back by one rounding that has nothing to round.
    let exact = |value: f64| T::from_param(T::Param::from_f64(value));
    let pieces = bytes.chunks_exact(T::DTYPE.size());
    pieces
        .map(|piece| {
            exact(match T::DTYPE {
                Dtype::F16 => f16::from_le_bytes([piece[0], piece[1]]).to_f64(),
                Dtype::Bf16 => bf16::from_le_bytes([piece[0], piece[1]]).to_f64(),
                Dtype::F32 => f32::from_le_bytes(piece.try_into().unwrap()).into(),
                Dtype::F64 => f64::from_le_bytes(piece.try_into().unwrap()),
            })
        })
        .collect()
}
