//! A network from PyTorch: its state dict is read from a safetensors file, each of its ten norm layers by its prefix
//! (`bn1.`, `layer1.0.bn2.`, `layer2.0.downsample.1.` and so on), and what comes out is held against PyTorch's own output,
//! which is in the file too: in evaluation, in training, and with the norms folded into the convolutions.
//!
//!     cargo run --release --example resnet
//!
//! `examples/data/make_resnet.py` made the file. The norms run on the GPU if there is one, else on the CPU. The convolutions
//! are a few plain loops on the host, since this crate has none.

use std::collections::BTreeMap;
use std::process::ExitCode;

use batchnorm_cuda::{
    Backend, BatchNorm2d, BatchNorm2dConfig, Cpu, Cuda, Epilogue, Error, Forward, Result, Shape, StateError,
};
use safetensors::SafeTensors;

const FILE: &[u8] = include_bytes!("data/resnet.safetensors");

/// Largest difference from PyTorch's numbers, which are of size 1: two networks of `f32` sum in different orders.
const LIMIT: f32 = 3e-6;

fn main() -> ExitCode {
    let verified = match Cuda::new(0) {
        Ok(cuda) => {
            println!("Norms run on the GPU: {}.", cuda.limits().name);
            verify(&cuda)
        }
        Err(Error::Unavailable(reason)) => {
            println!("Norms run on the CPU, because CUDA cannot be used here:\n{reason}");
            verify(&Cpu::new())
        }
        Err(error) => Err(error),
    };
    match verified {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("resnet: differs from PyTorch by more than {LIMIT:e}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("resnet: {error}");
            ExitCode::FAILURE
        }
    }
}

fn verify<B: Backend>(backend: &B) -> Result<bool> {
    let file = File::open(FILE)?;
    let input = file.tensor("example.input");
    let mut network = Network::load(backend, &file)?;
    println!("{} norm layers: {}", network.norms.len(), network.prefixes().join(", "));

    let difference = |what: &str, got: &[f32], name: &str| {
        let expected = file.tensor(name).values;
        let difference = got
            .iter()
            .zip(&expected)
            .map(|(got, expected)| (got - expected).abs())
            .fold(0.0, f32::max);
        println!("{what}: off by {difference:.1e} at most");
        got.len() == expected.len() && difference <= LIMIT
    };
    let output = network.run(&input, Mode::Evaluation)?;
    let mut same = difference("evaluation, against PyTorch", &output.values, "example.eval");
    let folded = network.run(&input, Mode::Folded)?;
    same &= difference(
        "evaluation, norms folded into convolutions",
        &folded.values,
        "example.eval",
    );
    let trained = network.run(&input, Mode::Training)?;
    same &= difference("training, against PyTorch", &trained.values, "example.train");
    let state = network.norms["bn1."].state_dict()?;
    for (statistic, values) in [("running_mean", state.running_mean), ("running_var", state.running_var)] {
        let name = format!("example.bn1.{statistic}");
        same &= difference(&format!("bn1.{statistic} after it"), &values.unwrap_or_default(), &name);
    }
    println!("bn1.num_batches_tracked: {:?}", state.num_batches_tracked);
    Ok(same)
}

/// How the norms run.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Evaluation,
    Training,
    /// Not at all: the convolutions do their work.
    Folded,
}

/// A tensor on the host, in PyTorch's order.
#[derive(Clone)]
struct Tensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Tensor {
    /// N, C, H and W.
    fn dimensions(&self) -> [usize; 4] {
        self.shape[..].try_into().expect("a tensor of four dimensions")
    }
}

struct File {
    tensors: BTreeMap<String, Tensor>,
}

impl File {
    /// Everything in the file that is f32.
    fn open(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| {
            Error::State(StateError::Malformed {
                message: error.to_string(),
            })
        })?;
        let f32s = file.iter().filter(|(_, view)| view.dtype() == safetensors::Dtype::F32);
        let tensor = |bytes: &[u8], shape: &[usize]| Tensor {
            shape: shape.to_vec(),
            values: bytes
                .as_chunks()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect(),
        };
        Ok(Self {
            tensors: f32s
                .map(|(name, view)| (name.to_owned(), tensor(view.data(), view.shape())))
                .collect(),
        })
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("the file has no {name}"))
            .clone()
    }
}

struct Network<B: Backend> {
    norms: BTreeMap<String, BatchNorm2d<B>>,
    convolutions: BTreeMap<String, Tensor>,
    fc: (Tensor, Tensor),
}

impl<B: Backend> Network<B> {
    /// Every module whose statistics are in the file is a norm layer; its prefix is all that it takes to load it.
    fn load(backend: &B, file: &File) -> Result<Self> {
        let mut norms = BTreeMap::new();
        for (name, mean) in &file.tensors {
            let Some(prefix) = name.strip_suffix("running_mean") else {
                continue;
            };
            if prefix.starts_with("example.") {
                continue;
            }
            let mut norm = BatchNorm2d::new(backend, BatchNorm2dConfig::new(mean.values.len()))?;
            norm.load_safetensors(FILE, prefix)?;
            norms.insert(prefix.to_owned(), norm);
        }
        let weights = file.tensors.iter().filter(|(_, tensor)| tensor.shape.len() == 4);
        Ok(Self {
            norms,
            convolutions: weights
                .filter_map(|(name, weight)| Some((name.strip_suffix("weight")?.to_owned(), weight.clone())))
                .collect(),
            fc: (file.tensor("fc.weight"), file.tensor("fc.bias")),
        })
    }

    fn prefixes(&self) -> Vec<&str> {
        self.norms.keys().map(|prefix| prefix.trim_end_matches('.')).collect()
    }

    /// The network of make_resnet.py.
    fn run(&mut self, input: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.convolve_and_normalise(input, ("conv1.", "bn1."), (1, 1), Then::Relu, mode)?;
        for (block, stride) in [("layer1.0.", 1), ("layer1.1.", 1), ("layer2.0.", 2), ("layer2.1.", 1)] {
            let name = |part: &str| format!("{block}{part}.");
            let residual = if stride == 1 {
                x.clone()
            } else {
                let names = (&*name("downsample.0"), &*name("downsample.1"));
                self.convolve_and_normalise(&x, names, (stride, 0), Then::Nothing, mode)?
            };
            let first = (&*name("conv1"), &*name("bn1"));
            let second = (&*name("conv2"), &*name("bn2"));
            let y = self.convolve_and_normalise(&x, first, (stride, 1), Then::Relu, mode)?;
            x = self.convolve_and_normalise(&y, second, (1, 1), Then::AddRelu(&residual), mode)?;
        }
        Ok(self.classify(&x))
    }

    fn convolve_and_normalise(
        &mut self,
        x: &Tensor,
        (convolution, norm): (&str, &str),
        (stride, padding): (usize, usize),
        then: Then<'_>,
        mode: Mode,
    ) -> Result<Tensor> {
        let weight = &self.convolutions[convolution];
        let norm = self.norms.get_mut(norm).expect("every convolution has its norm");
        if mode == Mode::Folded {
            let folded = norm.fold_into_conv(&weight.values, weight.dimensions(), None)?;
            let weight = Tensor {
                values: folded.weight,
                ..weight.clone()
            };
            return Ok(then.apply(convolve(x, &weight, &folded.bias, stride, padding)));
        }
        let y = convolve(x, weight, &vec![0.0; weight.shape[0]], stride, padding);
        normalise(norm, &y, then, mode)
    }

    fn classify(&self, x: &Tensor) -> Tensor {
        let [batch, channels, height, width] = x.dimensions();
        let plane = height * width;
        let (weight, bias) = &self.fc;
        let mean = |image: usize, channel: usize| {
            let start = (image * channels + channel) * plane;
            x.values[start..start + plane].iter().sum::<f32>() / plane as f32
        };
        let score = |image: usize, class: usize| {
            let weights = &weight.values[class * channels..];
            (0..channels).fold(bias.values[class], |sum, channel| {
                sum + weights[channel] * mean(image, channel)
            })
        };
        let classes = bias.values.len();
        Tensor {
            shape: vec![batch, classes],
            values: (0..batch * classes)
                .map(|at| score(at / classes, at % classes))
                .collect(),
        }
    }
}

/// What follows a norm.
enum Then<'a> {
    Nothing,
    Relu,
    AddRelu(&'a Tensor),
}

impl Then<'_> {
    /// On the host, where there is no norm to be fused with.
    fn apply(&self, mut y: Tensor) -> Tensor {
        for (at, y) in y.values.iter_mut().enumerate() {
            *y = match self {
                Then::Nothing => *y,
                Then::Relu => y.max(0.0),
                Then::AddRelu(z) => (*y + z.values[at]).max(0.0),
            };
        }
        y
    }
}

/// A norm layer with what is fused behind it, on its own device.
fn normalise<B: Backend>(norm: &mut BatchNorm2d<B>, x: &Tensor, then: Then<'_>, mode: Mode) -> Result<Tensor> {
    let [batch, channels, height, width] = x.dimensions();
    let shape = Shape::nchw(batch, channels, height, width);
    let backend = norm.backend().clone();
    let on_device = backend.upload(&x.values)?;
    let residual = match &then {
        Then::AddRelu(z) => backend.upload(&z.values)?,
        _ => backend.zeros(0)?,
    };
    let mut y = backend.zeros(x.values.len())?;
    let forward = Forward::new(&on_device, &mut y);
    let (forward, epilogue) = match then {
        Then::Nothing => (forward, Epilogue::Identity),
        Then::Relu => (forward.relu(), Epilogue::Relu),
        Then::AddRelu(_) => (forward.add_relu(&residual), Epilogue::AddRelu),
    };
    if mode == Mode::Training {
        let mut saved = norm.prepare_fused::<f32>(shape, epilogue)?;
        norm.forward_train_with(forward, &mut saved)?;
    } else {
        norm.forward_eval_with(shape, forward)?;
    }
    Ok(Tensor {
        shape: x.shape.clone(),
        values: backend.read(&y)?,
    })
}

/// A convolution, one output after another.
fn convolve(x: &Tensor, weight: &Tensor, bias: &[f32], stride: usize, padding: usize) -> Tensor {
    let [batch, inputs, height, width] = x.dimensions();
    let [outputs, _, rows, columns] = weight.dimensions();
    let size = |length: usize, kernel: usize| (length + 2 * padding - kernel) / stride + 1;
    let (out_height, out_width) = (size(height, rows), size(width, columns));
    let mut values = Vec::with_capacity(batch * outputs * out_height * out_width);
    for image in 0..batch {
        for (output, &bias) in bias.iter().enumerate() {
            for (row, column) in (0..out_height).flat_map(|row| (0..out_width).map(move |column| (row, column))) {
                let mut sum = bias;
                for input in 0..inputs {
                    for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                        // Rows and columns beyond the edge are zero; before it, the subtraction wraps beyond it.
                        let at = (row * stride + i).wrapping_sub(padding);
                        let to = (column * stride + j).wrapping_sub(padding);
                        if at < height && to < width {
                            sum += weight.values[((output * inputs + input) * rows + i) * columns + j]
                                * x.values[((image * inputs + input) * height + at) * width + to];
                        }
                    }
                }
                values.push(sum);
            }
        }
    }
    Tensor {
        shape: vec![batch, outputs, out_height, out_width],
        values,
    }
}
