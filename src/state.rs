//! State dicts under PyTorch's names, and safetensors files of them.
//!
//! Loading comes in three steps, so that nothing of a module changes unless all of it can: the file is read into a
//! [`StateDict`], the dict is held against the module, and its values are brought to the device beside the module's own
//! buffers. Only then are they copied over those, in place, because captured graphs and optimisers hold the addresses; and if
//! such a copy fails, those before it are undone.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredDtype, TensorView, View};

use crate::backend::{AsTensor, Backend};
use crate::batch_norm::BatchNorm2d;
use crate::config::BatchNorm2dConfig;
use crate::element::{Dtype, Real};
use crate::error::{Result, StateError};
use crate::overwrite::{Change, overwrite};

const WEIGHT: &str = "weight";
const BIAS: &str = "bias";
const RUNNING_MEAN: &str = "running_mean";
const RUNNING_VAR: &str = "running_var";
const NUM_BATCHES_TRACKED: &str = "num_batches_tracked";

/// A module's parameters and statistics on the host, under PyTorch's names.
///
/// In safetensors `weight`, `bias`, `running_mean` and `running_var` are vectors of C values in the parameter type (F32
/// or F64), and `num_batches_tracked` is an I64 scalar (shape `[]`). Each name is preceded by a prefix, which is empty
/// for a file of one module and the module's path with its last dot, such as `layer1.0.bn1.`, in a file of a network.
///
/// ```
/// use batchnorm_cuda::StateDict;
///
/// # fn main() -> batchnorm_cuda::Result<()> {
/// let state = StateDict {
///     running_mean: Some(vec![0.5f32, -0.5]),
///     running_var: Some(vec![1.0, 2.0]),
///     num_batches_tracked: Some(3),
///     ..StateDict::default()
/// };
/// let bytes = state.to_safetensors("bn1.")?;
/// assert_eq!(StateDict::from_safetensors(&bytes, "bn1.")?, state);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict<P: Real> {
    /// Scale per channel, if affine.
    pub weight: Option<Vec<P>>,
    /// Shift per channel, if affine.
    pub bias: Option<Vec<P>>,
    /// Running mean per channel, if tracked.
    pub running_mean: Option<Vec<P>>,
    /// Running (unbiased) variance per channel, if tracked.
    pub running_var: Option<Vec<P>>,
    /// Batches counted, if tracked.
    pub num_batches_tracked: Option<i64>,
}

impl<P: Real> StateDict<P> {
    /// Reads the entries under `prefix` from the bytes of a safetensors file; the file's other entries are left alone.
    ///
    /// Whether the entries are those a module needs is found when it loads them: a dict read from an old file without
    /// `num_batches_tracked` can be given one first.
    ///
    /// # Errors
    /// [`StateError::Malformed`] for bytes that are cut short or no safetensors; [`StateError::UnexpectedKey`] for
    /// another name under `prefix`; [`StateError::Dtype`] where a vector is not of type `P` or the count not I64, so
    /// that no precision is lost or invented; [`StateError::Shape`] where a vector has not one dimension or the count
    /// has any.
    pub fn from_safetensors(bytes: &[u8], prefix: &str) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
        let mut names = file.names();
        // The file's order is that of its writer: sorted, the same file gives the same error every time.
        names.sort_unstable();
        let mut state = Self::default();
        for key in names {
            let Some(name) = key.strip_prefix(prefix) else {
                continue;
            };
            let tensor = file.tensor(key).map_err(malformed)?;
            match name {
                WEIGHT => state.weight = Some(read_vector(key, &tensor)?),
                BIAS => state.bias = Some(read_vector(key, &tensor)?),
                RUNNING_MEAN => state.running_mean = Some(read_vector(key, &tensor)?),
                RUNNING_VAR => state.running_var = Some(read_vector(key, &tensor)?),
                NUM_BATCHES_TRACKED => state.num_batches_tracked = Some(read_count(key, &tensor)?),
                _ => return Err(StateError::UnexpectedKey { key: key.into() }.into()),
            }
        }
        Ok(state)
    }

    /// The bytes of a safetensors file with these entries under `prefix`. The same dict gives the same bytes.
    ///
    /// # Errors
    /// [`StateError::Malformed`] if `prefix` is longer than a header may be (100 MB).
    pub fn to_safetensors(&self, prefix: &str) -> Result<Vec<u8>> {
        let count = self.num_batches_tracked.map(|batches| Stored {
            dtype: StoredDtype::I64,
            shape: vec![],
            bytes: batches.to_le_bytes().into(),
        });
        let entries = self
            .vectors()
            .into_iter()
            .map(|(name, values)| (name, values.map(|values| stored_vector(values))))
            .chain([(NUM_BATCHES_TRACKED, count)])
            .filter_map(|(name, stored)| Some((format!("{prefix}{name}"), stored?)));
        // PyTorch's own tools ask for this entry before they take a file for theirs.
        let metadata = HashMap::from([("format".into(), "pt".into())]);
        safetensors::serialize(entries, Some(metadata)).map_err(|error| malformed(error).into())
    }

    /// The vectors with their names, in PyTorch's order.
    fn vectors(&self) -> [(&'static str, Option<&[P]>); 4] {
        [
            (WEIGHT, self.weight.as_deref()),
            (BIAS, self.bias.as_deref()),
            (RUNNING_MEAN, self.running_mean.as_deref()),
            (RUNNING_VAR, self.running_var.as_deref()),
        ]
    }

    /// Refuses a dict that has not exactly the entries of a module of this configuration.
    fn check(&self, config: &BatchNorm2dConfig, prefix: &str) -> std::result::Result<(), StateError> {
        let [weight, bias, mean, variance] = self.vectors().map(|(name, values)| (name, values.map(<[P]>::len)));
        let count = (
            NUM_BATCHES_TRACKED,
            self.num_batches_tracked.map(|_| config.num_features),
        );
        let entries = [
            (config.affine, weight),
            (config.affine, bias),
            (config.track_running_stats, mean),
            (config.track_running_stats, variance),
            (config.track_running_stats, count),
        ];
        for (wanted, (name, len)) in entries {
            let key = || format!("{prefix}{name}");
            match (wanted, len) {
                (true, None) => return Err(StateError::MissingKey { key: key() }),
                (false, Some(_)) => return Err(StateError::UnexpectedKey { key: key() }),
                (true, Some(len)) if len != config.num_features => {
                    return Err(StateError::Shape {
                        key: key(),
                        expected: vec![config.num_features],
                        got: vec![len],
                    });
                }
                (true, Some(_)) | (false, None) => {}
            }
        }
        Ok(())
    }
}

impl<B: Backend, P: Real> BatchNorm2d<B, P> {
    /// Parameters and running statistics as they are now. Copies to the host and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn state_dict(&self) -> Result<StateDict<P>> {
        let backend = self.backend();
        let host = |buffer: Option<&B::Buffer<P>>| buffer.map(|buffer| backend.to_vec(buffer.view())).transpose();
        Ok(StateDict {
            weight: host(self.weight())?,
            bias: host(self.bias())?,
            running_mean: host(self.running_mean())?,
            running_var: host(self.running_var())?,
            num_batches_tracked: self.num_batches_tracked()?,
        })
    }

    /// Takes over parameters and running statistics, in place: addresses stay, so that a captured CUDA graph goes on with
    /// the new values. All or nothing. Allocates.
    ///
    /// As strict as PyTorch's `load_state_dict`: the dict must hold exactly what the module has.
    ///
    /// # Errors
    /// [`StateError::MissingKey`], [`StateError::UnexpectedKey`] and [`StateError::Shape`] as
    /// [`Error::State`](crate::Error::State); [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the driver's.
    pub fn load_state_dict(&mut self, state: &StateDict<P>) -> Result<()> {
        self.load_checked(state, "")
    }

    /// The bytes of a safetensors file of this module, its names preceded by `prefix`: see [`StateDict`]. Copies to the
    /// host and waits.
    ///
    /// # Errors
    /// As [`StateDict::to_safetensors`]; the driver's.
    pub fn to_safetensors(&self, prefix: &str) -> Result<Vec<u8>> {
        self.state_dict()?.to_safetensors(prefix)
    }

    /// [`BatchNorm2d::load_state_dict`] of the entries under `prefix` in the bytes of a safetensors file, such as
    /// PyTorch's `safetensors.torch.save` writes.
    ///
    /// # Errors
    /// As [`StateDict::from_safetensors`] and [`BatchNorm2d::load_state_dict`], with the entries' full names.
    pub fn load_safetensors(&mut self, bytes: &[u8], prefix: &str) -> Result<()> {
        self.load_checked(&StateDict::from_safetensors(bytes, prefix)?, prefix)
    }

    /// Writes [`BatchNorm2d::to_safetensors`] to a file, in the place of one that may be there. At no time is there half
    /// a file under that name.
    ///
    /// # Errors
    /// [`StateError::File`]; as [`BatchNorm2d::to_safetensors`].
    pub fn save_safetensors_file(&self, path: impl AsRef<Path>, prefix: &str) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_safetensors(prefix)?;
        replace_file(path, &bytes).map_err(|error| file_error(path, &error).into())
    }

    /// [`BatchNorm2d::load_safetensors`] from a file.
    ///
    /// # Errors
    /// [`StateError::File`] if it cannot be read; as [`BatchNorm2d::load_safetensors`].
    pub fn load_safetensors_file(&mut self, path: impl AsRef<Path>, prefix: &str) -> Result<()> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| file_error(path, &error))?;
        self.load_safetensors(&bytes, prefix)
    }

    fn load_checked(&mut self, state: &StateDict<P>, prefix: &str) -> Result<()> {
        state.check(self.config(), prefix)?;
        let backend = self.backend().clone();
        let staged = |values: &Option<Vec<P>>| values.as_ref().map(|values| backend.upload(values)).transpose();
        let (weight, bias) = (staged(&state.weight)?, staged(&state.bias)?);
        let (mean, variance) = (staged(&state.running_mean)?, staged(&state.running_var)?);
        let batches = state
            .num_batches_tracked
            .map(|batches| backend.upload(&[batches]))
            .transpose()?;

        let (parameters, running) = (self.parameters.as_mut(), self.running.as_mut());
        let mut changes = Vec::new();
        if let (Some(parameters), Some(weight), Some(bias)) = (parameters, weight, bias) {
            changes.push(Change::boxed(&backend, &mut parameters.weight, weight)?);
            changes.push(Change::boxed(&backend, &mut parameters.bias, bias)?);
        }
        if let (Some(running), Some(mean), Some(variance), Some(batches)) = (running, mean, variance, batches) {
            changes.push(Change::boxed(&backend, &mut running.mean, mean)?);
            changes.push(Change::boxed(&backend, &mut running.variance, variance)?);
            changes.push(Change::boxed(&backend, &mut running.batches, batches)?);
        }
        overwrite(&mut changes)
    }
}

/// One entry of a file to be written.
struct Stored {
    dtype: StoredDtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Stored {
    fn dtype(&self) -> StoredDtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (&self.bytes).into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// What safetensors calls the parameter type.
fn stored_dtype<P: Real>() -> StoredDtype {
    match P::DTYPE {
        Dtype::F16 => StoredDtype::F16,
        Dtype::Bf16 => StoredDtype::BF16,
        Dtype::F32 => StoredDtype::F32,
        Dtype::F64 => StoredDtype::F64,
    }
}

fn stored_vector<P: Real>(values: &[P]) -> Stored {
    let doubles = values.iter().map(|value| value.to_f64());
    Stored {
        dtype: stored_dtype::<P>(),
        shape: vec![values.len()],
        bytes: match P::DTYPE {
            Dtype::F64 => doubles.flat_map(f64::to_le_bytes).collect(),
            // A parameter type that is not f64 is f32, and the way through the double changes no number.
            _ => doubles.flat_map(|value| (value as f32).to_le_bytes()).collect(),
        },
    }
}

fn read_vector<P: Real>(key: &str, tensor: &TensorView<'_>) -> std::result::Result<Vec<P>, StateError> {
    if tensor.dtype() != stored_dtype::<P>() {
        return Err(StateError::dtype(key.into(), P::DTYPE, tensor.dtype()));
    }
    // How many values there must be is the module's to say; that they stand in one row is the format's.
    if tensor.shape().len() != 1 {
        return Err(StateError::Shape {
            key: key.into(),
            expected: vec![tensor.shape().iter().product()],
            got: tensor.shape().into(),
        });
    }
    let bytes = tensor.data();
    Ok(match P::DTYPE {
        Dtype::F64 => little_endian(bytes)
            .map(|value| P::from_f64(f64::from_le_bytes(value)))
            .collect(),
        _ => little_endian(bytes)
            .map(|value| P::from_f64(f32::from_le_bytes(value).into()))
            .collect(),
    })
}

fn read_count(key: &str, tensor: &TensorView<'_>) -> std::result::Result<i64, StateError> {
    if tensor.dtype() != StoredDtype::I64 {
        return Err(StateError::Dtype {
            key: key.into(),
            expected: "i64".into(),
            got: format!("{:?}", tensor.dtype()).to_lowercase(),
        });
    }
    let mut values = little_endian(tensor.data()).map(i64::from_le_bytes);
    match (tensor.shape(), values.next()) {
        ([], Some(batches)) => Ok(batches),
        (shape, _) => Err(StateError::Shape {
            key: key.into(),
            expected: vec![],
            got: shape.into(),
        }),
    }
}

/// The numbers of `N` bytes that `bytes` consists of.
fn little_endian<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks().0.iter().copied()
}

/// Writes beside `path` and renames: whoever reads `path` finds the old bytes or the new ones.
fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // A temporary file is for its owner's eyes alone; this one becomes an ordinary file, less what the umask forbids.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    // The rename must not reach the disk before the bytes do.
    file.as_file().sync_all()?;
    file.persist(path).map(|_| ()).map_err(|error| error.error)
}

fn malformed(error: safetensors::SafeTensorError) -> StateError {
    StateError::Malformed {
        message: error.to_string(),
    }
}

fn file_error(path: &Path, error: &std::io::Error) -> StateError {
    StateError::File {
        path: path.display().to_string(),
        message: error.to_string(),
    }
}
