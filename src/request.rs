//! What a caller asks of one pass beyond the plain form: fused epilogues, in-place forms, which gradients are wanted.

use crate::backend::{
    AsTensor, AsTensorMut, Backend, BackwardEpilogue, ForwardEpilogue, GradientFlow, InputOutput, ParameterGradients,
};
use crate::element::{Element, Real};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::shape::Shape;

/// A forward pass: `y = bn(x)`, unless a fused or in-place form is asked for.
///
/// ```
/// use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Forward, Shape};
///
/// # fn main() -> batchnorm_cuda::Result<()> {
/// let bn: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(2))?;
/// let mut x = [-1.0f32, 1.0, -2.0, 2.0];
/// bn.forward_eval_with(Shape::nchw(1, 2, 1, 2), Forward::in_place(&mut x).relu())?;
/// assert_eq!(x[0], 0.0);
/// # Ok(())
/// # }
/// ```
#[must_use]
pub struct Forward<'a, B: Backend, T: Element> {
    pub(crate) tensors: InputOutput<'a, B, T>,
    pub(crate) epilogue: ForwardEpilogue<'a, B, T>,
}

impl<'a, B: Backend, T: Element> Forward<'a, B, T> {
    /// `y = bn(x)`; both have the elements of the call's shape.
    pub fn new<X, Y>(x: &'a X, y: &'a mut Y) -> Self
    where
        X: AsTensor<B, T> + ?Sized,
        Y: AsTensorMut<B, T> + ?Sized,
    {
        Self {
            tensors: InputOutput::Separate {
                x: x.view(),
                y: y.view_mut(),
            },
            epilogue: ForwardEpilogue::Identity,
        }
    }

    /// `x = bn(x)`: evaluation only, since a backward pass needs x.
    pub fn in_place<X>(x: &'a mut X) -> Self
    where
        X: AsTensorMut<B, T> + ?Sized,
    {
        Self {
            tensors: InputOutput::InPlace { x: x.view_mut() },
            epilogue: ForwardEpilogue::Identity,
        }
    }

    /// `y = relu(bn(x))`. NaN stays NaN.
    pub fn relu(self) -> Self {
        Self {
            epilogue: ForwardEpilogue::Relu,
            ..self
        }
    }

    /// `y = relu(bn(x) + z)`, rounded once. NaN stays NaN.
    pub fn add_relu<Z>(self, z: &'a Z) -> Self
    where
        Z: AsTensor<B, T> + ?Sized,
    {
        Self {
            epilogue: ForwardEpilogue::AddRelu { z: z.view() },
            ..self
        }
    }

    /// The fused form asked for.
    pub(crate) fn epilogue(&self) -> Epilogue {
        match self.epilogue {
            ForwardEpilogue::Identity => Epilogue::Identity,
            ForwardEpilogue::Relu => Epilogue::Relu,
            ForwardEpilogue::AddRelu { .. } => Epilogue::AddRelu,
        }
    }

    /// Refuses operands of another length or device.
    pub(crate) fn validate(&self, backend: &B, shape: Shape) -> Result<()> {
        match &self.tensors {
            InputOutput::Separate { x, y } => {
                check_read(backend, "x", shape, x)?;
                check_written(backend, "y", shape, y)?;
            }
            InputOutput::InPlace { x } => check_written(backend, "x", shape, x)?,
        }
        match &self.epilogue {
            ForwardEpilogue::AddRelu { z } => check_read(backend, "z", shape, z),
            ForwardEpilogue::Identity | ForwardEpilogue::Relu => Ok(()),
        }
    }
}

/// Gradients at weight and bias, one value per channel. Made by [`BatchNorm2d::gradients`](crate::BatchNorm2d::gradients).
#[derive(Debug)]
pub struct Gradients<B: Backend, P: Real> {
    /// Σ dy · x̂ per channel.
    pub weight: B::Buffer<P>,
    /// Σ dy per channel.
    pub bias: B::Buffer<P>,
}

/// A backward pass. Only what is asked for is computed: start with [`Backward::new`] or [`Backward::in_place`] and name
/// the gradients.
#[must_use]
pub struct Backward<'a, B: Backend, T: Element> {
    pub(crate) x: B::View<'a, T>,
    pub(crate) flow: GradientFlow<'a, B, T>,
    pub(crate) epilogue: BackwardEpilogue<'a, B, T>,
    pub(crate) parameters: Option<ParameterGradients<'a, B, T>>,
}

impl<'a, B: Backend, T: Element> Backward<'a, B, T> {
    /// From the forward pass's input `x` and the gradient `dy` at its output.
    pub fn new<X, D>(x: &'a X, dy: &'a D) -> Self
    where
        X: AsTensor<B, T> + ?Sized,
        D: AsTensor<B, T> + ?Sized,
    {
        Self {
            x: x.view(),
            flow: GradientFlow::Stops { dy: dy.view() },
            epilogue: BackwardEpilogue::Identity,
            parameters: None,
        }
    }

    /// As [`Backward::new`], with the gradient at x written over `dy`.
    pub fn in_place<X, D>(x: &'a X, dy: &'a mut D) -> Self
    where
        X: AsTensor<B, T> + ?Sized,
        D: AsTensorMut<B, T> + ?Sized,
    {
        Self {
            x: x.view(),
            flow: GradientFlow::InPlace { dy: dy.view_mut() },
            epilogue: BackwardEpilogue::Identity,
            parameters: None,
        }
    }

    /// Asks for the gradient at x. In the in-place form it has its place already, and this moves it to `dx`.
    pub fn dx<D>(self, dx: &'a mut D) -> Self
    where
        D: AsTensorMut<B, T> + ?Sized,
    {
        let dy = match self.flow {
            GradientFlow::Stops { dy } | GradientFlow::Separate { dy, .. } => dy,
            GradientFlow::InPlace { dy } => B::read_only(dy),
        };
        Self {
            flow: GradientFlow::Separate { dy, dx: dx.view_mut() },
            ..self
        }
    }

    /// Asks for the gradients at weight and bias, written over what `gradients` holds.
    pub fn parameters(self, gradients: &'a mut Gradients<B, T::Param>) -> Self {
        self.with_parameters(gradients, false)
    }

    /// Asks for the gradients at weight and bias, added to what `gradients` holds.
    pub fn accumulate_parameters(self, gradients: &'a mut Gradients<B, T::Param>) -> Self {
        self.with_parameters(gradients, true)
    }

    /// The forward pass was `relu(bn(x))`. Where its result was 0 or less, no gradient passes; a NaN lets it pass, as in
    /// PyTorch. Weight and bias must be those of the forward pass.
    pub fn relu(self) -> Self {
        Self {
            epilogue: BackwardEpilogue::Relu,
            ..self
        }
    }

    /// The forward pass was `relu(bn(x) + z)` and gave `y`. The gradient at z is dy where it passes the relu: ask for it
    /// with [`Backward::dz`].
    pub fn add_relu<Y>(self, y: &'a Y) -> Self
    where
        Y: AsTensor<B, T> + ?Sized,
    {
        Self {
            epilogue: BackwardEpilogue::AddRelu { y: y.view(), dz: None },
            ..self
        }
    }

    /// Asks for the gradient at the residual z; after [`Backward::add_relu`].
    ///
    /// # Errors
    /// [`Error::Argument`] if the pass has no residual.
    pub fn dz<D>(self, dz: &'a mut D) -> Result<Self>
    where
        D: AsTensorMut<B, T> + ?Sized,
    {
        match self.epilogue {
            BackwardEpilogue::AddRelu { y, .. } => Ok(Self {
                epilogue: BackwardEpilogue::AddRelu {
                    y,
                    dz: Some(dz.view_mut()),
                },
                ..self
            }),
            BackwardEpilogue::Identity | BackwardEpilogue::Relu => Err(Error::Argument {
                argument: "dz",
                expected: "a pass with add_relu(y)".into(),
                got: format!("the epilogue {}", self.epilogue()),
            }),
        }
    }

    fn with_parameters(self, gradients: &'a mut Gradients<B, T::Param>, accumulate: bool) -> Self {
        let Gradients { weight, bias } = gradients;
        Self {
            parameters: Some(ParameterGradients {
                weight: weight.view_mut(),
                bias: bias.view_mut(),
                accumulate,
            }),
            ..self
        }
    }

    /// The fused form of the forward pass.
    pub(crate) fn epilogue(&self) -> Epilogue {
        match self.epilogue {
            BackwardEpilogue::Identity => Epilogue::Identity,
            BackwardEpilogue::Relu => Epilogue::Relu,
            BackwardEpilogue::AddRelu { .. } => Epilogue::AddRelu,
        }
    }

    /// Refuses operands of another length or device.
    pub(crate) fn validate(&self, backend: &B, shape: Shape) -> Result<()> {
        check_read(backend, "x", shape, &self.x)?;
        match &self.flow {
            GradientFlow::Stops { dy } => check_read(backend, "dy", shape, dy)?,
            GradientFlow::Separate { dy, dx } => {
                check_read(backend, "dy", shape, dy)?;
                check_written(backend, "dx", shape, dx)?;
            }
            GradientFlow::InPlace { dy } => check_written(backend, "dy", shape, dy)?,
        }
        if let BackwardEpilogue::AddRelu { y, dz } = &self.epilogue {
            check_read(backend, "y", shape, y)?;
            if let Some(dz) = dz {
                check_written(backend, "dz", shape, dz)?;
            }
        }
        if let Some(ParameterGradients { weight, bias, .. }) = &self.parameters {
            check_vector(backend, "gradients.weight", shape.channels, weight)?;
            check_vector(backend, "gradients.bias", shape.channels, bias)?;
        }
        Ok(())
    }
}

fn check_read<B: Backend, T: Element>(
    backend: &B,
    argument: &'static str,
    shape: Shape,
    view: &B::View<'_, T>,
) -> Result<()> {
    Error::check_length(argument, shape, B::view_len(view))?;
    backend.check_view(argument, view)
}

fn check_written<B: Backend, T: Element>(
    backend: &B,
    argument: &'static str,
    shape: Shape,
    view: &B::ViewMut<'_, T>,
) -> Result<()> {
    Error::check_length(argument, shape, B::view_mut_len(view))?;
    backend.check_view_mut(argument, view)
}

fn check_vector<B: Backend, P: Element>(
    backend: &B,
    argument: &'static str,
    channels: usize,
    view: &B::ViewMut<'_, P>,
) -> Result<()> {
    let got = B::view_mut_len(view);
    if got != channels {
        return Err(Error::VectorLength {
            argument,
            expected: channels,
            got,
        });
    }
    backend.check_view_mut(argument, view)
}
