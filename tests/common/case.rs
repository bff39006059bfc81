//! One step of a module, from tensors on the host to tensors on the host.

use std::ops::Range;

use batchnorm_cuda::{
    BatchNorm2d, BatchNorm2dConfig, Element, Epilogue, Gradients, Layout, Plain, Real, Result, Shape, StateDict,
};

use super::reference::Values;
use super::{Device, Random};

/// The inputs of one step. Tensors are in the memory order of `shape`.
#[derive(Clone, Debug)]
pub struct Case<T: Element> {
    pub shape: Shape,
    pub config: BatchNorm2dConfig,
    pub training: bool,
    pub epilogue: Epilogue,
    pub state: StateDict<T::Param>,
    pub x: Vec<T>,
    /// The residual: exactly where the epilogue is add + relu.
    pub z: Option<Vec<T>>,
    /// Absent where no gradients are wanted.
    pub dy: Option<Vec<T>>,
}

/// What a step gives: as [`Case`], with what was not asked for left out.
#[derive(Clone, Debug)]
pub struct Outcome<T: Element> {
    pub y: Vec<T>,
    pub dx: Option<Vec<T>>,
    pub dz: Option<Vec<T>>,
    pub dweight: Option<Vec<T::Param>>,
    pub dbias: Option<Vec<T::Param>>,
    pub save_mean: Option<Vec<T::Param>>,
    pub save_invstd: Option<Vec<T::Param>>,
    pub state: StateDict<T::Param>,
}

/// In which of its forms a step is asked for.
#[derive(Clone, Debug, Default)]
pub struct Form {
    /// Elements before x, y, z, dy, dx, dz in their buffers.
    pub offsets: [usize; 6],
    /// Evaluation: y over x.
    pub forward_in_place: bool,
    /// dx over dy.
    pub backward_in_place: bool,
    /// What the parameter gradients are added to; written if absent.
    pub accumulate_to: Option<Vec<f64>>,
    /// The gradients that are not asked for.
    pub without: Vec<Gradient>,
}

/// A gradient that may be asked for or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradient {
    X,
    Z,
    Parameters,
}

impl<T: Element> Case<T> {
    /// A training step in which nothing is special: random numbers of size 1 everywhere.
    pub fn random(random: &mut Random, shape: Shape, epilogue: Epilogue) -> Self {
        let channels = shape.channels;
        let len = shape.len().unwrap();
        let spread: Vec<(f64, f64)> = (0..channels)
            .map(|_| (0.5 + random.uniform(), 2.0 * random.uniform() - 1.0))
            .collect();
        let x = by_channel(shape, |channel| {
            let (deviation, mean) = spread[channel];
            mean + deviation * random.normal()
        });
        let mut params = |centre: f64, deviation: f64| -> Vec<T::Param> {
            (0..channels)
                .map(|_| T::Param::from_f64(centre + deviation * random.normal()))
                .collect()
        };
        let state = StateDict {
            weight: Some(params(1.0, 0.5)),
            bias: Some(params(0.0, 0.5)),
            running_mean: Some(params(0.0, 1.0)),
            running_var: Some(
                (0..channels)
                    .map(|c| T::Param::from_f64(0.5 + c as f64 % 7.0))
                    .collect(),
            ),
            num_batches_tracked: Some(7),
        };
        let mut tensor = || (0..len).map(|_| element(random.normal())).collect();
        Self {
            shape,
            config: BatchNorm2dConfig::new(channels),
            training: true,
            epilogue,
            state,
            x,
            z: (epilogue == Epilogue::AddRelu).then(&mut tensor),
            dy: Some(tensor()),
        }
    }

    /// The same step in evaluation.
    pub fn evaluation(self) -> Self {
        Self {
            training: false,
            ..self
        }
    }

    /// The same step without gradients.
    pub fn forward_only(self) -> Self {
        Self { dy: None, ..self }
    }

    /// The same step of a module with or without weight and bias.
    pub fn affine(mut self, affine: bool) -> Self {
        self.config = self.config.affine(affine);
        if !affine {
            (self.state.weight, self.state.bias) = (None, None);
        }
        self
    }

    /// The same step of a module with or without running statistics.
    pub fn track_running_stats(mut self, track: bool) -> Self {
        self.config = self.config.track_running_stats(track);
        if !track {
            (self.state.running_mean, self.state.running_var) = (None, None);
            self.state.num_batches_tracked = None;
        }
        self
    }

    /// Whether the step normalises by the statistics of its own batch.
    pub fn by_batch(&self) -> bool {
        self.training || !self.config.track_running_stats
    }

    /// The same step on the same numbers in the other memory order.
    pub fn in_layout(&self, layout: Layout) -> Self {
        let to = Shape { layout, ..self.shape };
        let permuted = |tensor: &Option<Vec<T>>| tensor.as_ref().map(|tensor| permute(tensor, self.shape, to));
        Self {
            shape: to,
            x: permute(&self.x, self.shape, to),
            z: permuted(&self.z),
            dy: permuted(&self.dy),
            ..self.clone()
        }
    }
}

impl<T: Element> Outcome<T> {
    /// Everything in float64.
    pub fn values(&self) -> Values {
        let wide = |values: &Option<Vec<T::Param>>| values.as_deref().map(wide);
        Values {
            y: Some(self::wide(&self.y)),
            dx: self.dx.as_deref().map(self::wide),
            dz: self.dz.as_deref().map(self::wide),
            dweight: wide(&self.dweight),
            dbias: wide(&self.dbias),
            save_mean: wide(&self.save_mean),
            save_invstd: wide(&self.save_invstd),
            running_mean: wide(&self.state.running_mean),
            running_var: wide(&self.state.running_var),
            num_batches_tracked: self.state.num_batches_tracked,
        }
    }

    /// The same numbers in another memory order.
    pub fn permuted(mut self, from: Shape, to: Shape) -> Self {
        self.y = permute(&self.y, from, to);
        self.dx = self.dx.map(|dx| permute(&dx, from, to));
        self.dz = self.dz.map(|dz| permute(&dz, from, to));
        self
    }
}

/// The address of an element in elements.
pub fn index(shape: Shape, n: usize, c: usize, h: usize, w: usize) -> usize {
    let Shape {
        channels,
        height,
        width,
        ..
    } = shape;
    match shape.layout {
        Layout::Nchw => ((n * channels + c) * height + h) * width + w,
        Layout::Nhwc => ((n * height + h) * width + w) * channels + c,
    }
}

/// Addresses of the elements of one channel, in the order n, h, w.
pub fn channel_indices(shape: Shape, c: usize) -> impl Iterator<Item = usize> {
    (0..shape.batch)
        .flat_map(move |n| (0..shape.height).flat_map(move |h| (0..shape.width).map(move |w| index(shape, n, c, h, w))))
}

/// A tensor whose elements are drawn channel by channel, so that both layouts get the same numbers.
pub fn by_channel<T: Element>(shape: Shape, mut value: impl FnMut(usize) -> f64) -> Vec<T> {
    let mut tensor = vec![T::default(); shape.len().unwrap()];
    for c in 0..shape.channels {
        for i in channel_indices(shape, c) {
            tensor[i] = element(value(c));
        }
    }
    tensor
}

fn permute<T: Element>(tensor: &[T], from: Shape, to: Shape) -> Vec<T> {
    let mut permuted = tensor.to_vec();
    for c in 0..from.channels {
        for (source, target) in channel_indices(from, c).zip(channel_indices(to, c)) {
            permuted[target] = tensor[source];
        }
    }
    permuted
}

/// Rounds to an element.
pub fn element<T: Element>(value: f64) -> T {
    T::from_param(T::Param::from_f64(value))
}

/// Converts exactly to float64.
pub fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_param().to_f64()).collect()
}

/// Runs a step in its plainest form.
pub fn run<B: Device, T: Element>(device: &B, case: &Case<T>) -> Outcome<T> {
    run_as(device, case, &Form::default()).unwrap_or_else(|error| panic!("{}: {error}", B::NAME))
}

/// Runs a step in a given form.
///
/// Every tensor stands in a larger buffer between guards, which the device must leave as they are.
pub fn run_as<B: Device, T: Element>(device: &B, case: &Case<T>, form: &Form) -> Result<Outcome<T>> {
    let mut module = BatchNorm2d::<B, T::Param>::new(device, case.config.clone())?;
    module.load_state_dict(&case.state)?;
    let mut saved = module.prepare_fused::<T>(case.shape, case.epilogue)?;

    let len = case.shape.len()?;
    let [x_at, y_at, z_at, dy_at, dx_at, dz_at] = form.offsets;
    let blank = vec![element::<T>(-77.0); len];
    let mut x = Guarded::new(device, &case.x, x_at)?;
    let mut y = Guarded::new(device, &blank, y_at)?;
    let z = case.z.as_ref().map(|z| Guarded::new(device, z, z_at)).transpose()?;

    {
        let z_view = z.as_ref().map(Guarded::view);
        let (x_view, mut x_mut, mut y_mut);
        let mut forward = if form.forward_in_place {
            x_mut = x.view_mut();
            B::forward_in_place(&mut x_mut)
        } else {
            (x_view, y_mut) = (x.view(), y.view_mut());
            B::new_forward(&x_view, &mut y_mut)
        };
        forward = match case.epilogue {
            Epilogue::Identity => forward,
            Epilogue::Relu => forward.relu(),
            Epilogue::AddRelu => B::forward_add_relu(forward, z_view.as_ref().expect("add_relu has a residual")),
        };
        match (case.training, case.config.track_running_stats) {
            (true, _) => module.forward_train_with(forward, &mut saved)?,
            (false, true) => module.forward_eval_with(case.shape, forward)?,
            (false, false) => module.forward_eval_batch_statistics(forward, &mut saved)?,
        }
    }

    let mut outcome = Outcome {
        y: if form.forward_in_place { &x } else { &y }.download(device)?,
        dx: None,
        dz: None,
        dweight: None,
        dbias: None,
        save_mean: case.by_batch().then(|| saved.mean()).transpose()?,
        save_invstd: case.by_batch().then(|| saved.invstd()).transpose()?,
        state: module.state_dict()?,
    };

    if let Some(dy) = &case.dy {
        // In place, y now stands where x was; the backward pass is about the x before.
        let x = Guarded::new(device, &case.x, x_at)?;
        let y = Guarded::new(device, &outcome.y, y_at)?;
        let mut dy = Guarded::new(device, dy, dy_at)?;
        let mut dx = Guarded::new(device, &blank, dx_at)?;
        let mut dz = Guarded::new(device, &blank, dz_at)?;
        let wanted = |gradient| !form.without.contains(&gradient);
        let mut gradients = if case.config.affine && wanted(Gradient::Parameters) {
            Some(starting_gradients(device, &module, form)?)
        } else {
            None
        };
        {
            let (x_view, y_view) = (x.view(), y.view());
            let (dy_view, mut dy_mut, mut dx_mut, mut dz_mut);
            dx_mut = dx.view_mut();
            let mut backward = if form.backward_in_place {
                dy_mut = dy.view_mut();
                B::backward_in_place(&x_view, &mut dy_mut)
            } else {
                dy_view = dy.view();
                B::new_backward(&x_view, &dy_view)
            };
            if wanted(Gradient::X) && !form.backward_in_place {
                backward = B::backward_dx(backward, &mut dx_mut);
            }
            backward = match case.epilogue {
                Epilogue::Identity => backward,
                Epilogue::Relu => backward.relu(),
                Epilogue::AddRelu => B::backward_add_relu(backward, &y_view),
            };
            if case.epilogue == Epilogue::AddRelu && wanted(Gradient::Z) {
                dz_mut = dz.view_mut();
                backward = B::backward_dz(backward, &mut dz_mut)?;
            }
            if let Some(gradients) = &mut gradients {
                backward = match form.accumulate_to {
                    Some(_) => backward.accumulate_parameters(gradients),
                    None => backward.parameters(gradients),
                };
            }
            if case.by_batch() {
                module.backward_with(backward, &mut saved)?;
            } else {
                module.backward_eval_with(backward, &mut saved)?;
            }
        }
        if wanted(Gradient::X) {
            let dx = if form.backward_in_place { &dy } else { &dx };
            outcome.dx = Some(dx.download(device)?);
        }
        if case.epilogue == Epilogue::AddRelu && wanted(Gradient::Z) {
            outcome.dz = Some(dz.download(device)?);
        }
        if let Some(gradients) = gradients {
            outcome.dweight = Some(B::download(device, &gradients.weight)?);
            outcome.dbias = Some(B::download(device, &gradients.bias)?);
        }
        assert_same_bits("x after the backward pass", &x.download(device)?, &case.x);
    }
    if !form.forward_in_place {
        assert_same_bits("x after the step", &x.download(device)?, &case.x);
    }
    Ok(outcome)
}

fn starting_gradients<B: Device, P: Real>(
    device: &B,
    module: &BatchNorm2d<B, P>,
    form: &Form,
) -> Result<Gradients<B, P>> {
    let mut gradients = module.gradients()?;
    // Written gradients must not depend on what was there: not even on NaN.
    let channels = module.config().num_features;
    let nothing = vec![f64::NAN; channels];
    let start: Vec<P> = form
        .accumulate_to
        .as_ref()
        .unwrap_or(&nothing)
        .iter()
        .map(|&value| P::from_f64(value))
        .collect();
    gradients.weight = device.upload(&start)?;
    gradients.bias = device.upload(&start)?;
    Ok(gradients)
}

/// A tensor of a device in the midst of a larger buffer.
struct Guarded<B: Device, T: Element> {
    buffer: B::Buffer<T>,
    range: Range<usize>,
}

impl<B: Device, T: Element> Guarded<B, T> {
    /// Elements behind the tensor.
    const BEHIND: usize = 5;

    fn new(device: &B, values: &[T], offset: usize) -> Result<Self> {
        let mut all = vec![Self::guard(); offset];
        all.extend_from_slice(values);
        all.extend(std::iter::repeat_n(Self::guard(), Self::BEHIND));
        Ok(Self {
            buffer: device.upload(&all)?,
            range: offset..offset + values.len(),
        })
    }

    fn guard() -> T {
        element(-123.0)
    }

    fn view(&self) -> B::View<'_, T> {
        B::part(&self.buffer, self.range.clone())
    }

    fn view_mut(&mut self) -> B::ViewMut<'_, T> {
        B::part_mut(&mut self.buffer, self.range.clone())
    }

    fn download(&self, device: &B) -> Result<Vec<T>> {
        let all = B::download(device, &self.buffer)?;
        let (front, behind) = (&all[..self.range.start], &all[self.range.end..]);
        assert!(
            front.iter().chain(behind).all(|&value| value == Self::guard()),
            "{}: written outside a tensor: before it {front:?}, behind it {behind:?}",
            B::NAME
        );
        Ok(all[self.range.clone()].to_vec())
    }
}

/// Fails unless two outcomes are the same bit for bit, NaN and the sign of zero included.
pub fn assert_same<T: Element>(got: &Outcome<T>, want: &Outcome<T>) {
    let (got, want) = (got.values(), want.values());
    for ((name, got), (_, want)) in got.tensors().into_iter().zip(want.tensors()) {
        match (got, want) {
            (Some(got), Some(want)) => assert_same_bits(name, got, want),
            _ => assert_eq!(got, want, "{name}"),
        }
    }
    assert_eq!(got.num_batches_tracked, want.num_batches_tracked);
}

/// Fails unless both hold the same numbers, NaN and the sign of zero included.
pub fn assert_same_bits<T: Element>(what: &str, got: &[T], want: &[T]) {
    let bits = |values: &[T]| wide(values).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    let first = bits(got).iter().zip(&bits(want)).position(|(got, want)| got != want);
    if let Some(i) = first {
        panic!("{what}: differs first at {i}: {:?}, not {:?}", got[i], want[i]);
    }
    assert_eq!(got.len(), want.len(), "{what}: length");
}
