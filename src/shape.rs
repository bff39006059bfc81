//! The shape of a four-dimensional tensor and the order of its elements in memory.

use crate::error::{Error, Result};

/// The order of a tensor's elements in memory. Both are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `((n * C + c) * H + h) * W + w`: PyTorch's default.
    Nchw,
    /// `((n * H + h) * W + w) * C + c`: PyTorch's `channels_last`.
    Nhwc,
}

impl Layout {
    /// `nchw` or `nhwc`.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Nchw => "nchw",
            Layout::Nhwc => "nhwc",
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "nchw" => Ok(Layout::Nchw),
            "nhwc" => Ok(Layout::Nhwc),
            _ => Err(format!("unknown layout {text:?}: expected nchw or nhwc")),
        }
    }
}

/// Batch, channels, height and width of a tensor, and its [`Layout`].
///
/// ```
/// use batchnorm_cuda::Shape;
///
/// let images = Shape::nchw(32, 64, 56, 56);
/// assert_eq!(images.values_per_channel().unwrap(), 32 * 56 * 56);
/// let same_values_other_order = images.channels_last();
/// assert_eq!(same_values_other_order.len().unwrap(), images.len().unwrap());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// N: images in the batch. May be 0.
    pub batch: usize,
    /// C: channels. Each is normalised by itself.
    pub channels: usize,
    /// H: rows of one image.
    pub height: usize,
    /// W: columns of one image.
    pub width: usize,
    /// The order of the elements in memory.
    pub layout: Layout,
}

impl Shape {
    /// A tensor of `batch` images in PyTorch's default order.
    pub const fn nchw(batch: usize, channels: usize, height: usize, width: usize) -> Self {
        Self {
            batch,
            channels,
            height,
            width,
            layout: Layout::Nchw,
        }
    }

    /// The same dimensions, with the channels of one pixel adjacent in memory (NHWC).
    pub const fn channels_last(self) -> Self {
        Self {
            layout: Layout::Nhwc,
            ..self
        }
    }

    /// Number of elements.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if the tensor is larger than any memory: of 2⁵² elements or more.
    pub fn len(&self) -> Result<usize> {
        // No processor addresses that much, and sums of several tensors' bytes stay countable. A dimension of zero, whichever
        // it is, must not hide that the others overflow, so that every partial product can be trusted.
        const ELEMENTS: u64 = 1 << 52;
        [self.batch, self.channels, self.height, self.width]
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size.max(1)))
            .filter(|&elements| (elements as u64) < ELEMENTS && elements <= isize::MAX as usize / 8)
            .map(|_| self.batch * self.channels * self.height * self.width)
            .ok_or(Error::ShapeOverflow { shape: *self })
    }

    /// Whether the tensor has no elements.
    pub const fn is_empty(&self) -> bool {
        self.batch == 0 || self.channels == 0 || self.height == 0 || self.width == 0
    }

    /// H · W: elements of one channel of one image.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`], see [`Shape::len`].
    pub fn plane(&self) -> Result<usize> {
        self.len().map(|_| self.height * self.width)
    }

    /// N · H · W: elements of one channel, over which its statistics are taken.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`], see [`Shape::len`].
    pub fn values_per_channel(&self) -> Result<usize> {
        self.plane().map(|plane| self.batch * plane)
    }
}

impl std::fmt::Display for Shape {
    /// The logical size in PyTorch's notation: `[N, C, H, W]`, and ` channels_last` for NHWC.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shape {
            batch,
            channels,
            height,
            width,
            layout,
        } = self;
        write!(f, "[{batch}, {channels}, {height}, {width}]")?;
        match layout {
            Layout::Nchw => Ok(()),
            Layout::Nhwc => f.write_str(" channels_last"),
        }
    }
}
