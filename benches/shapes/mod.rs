//! What the benchmarks of all devices measure: ResNet-50's shapes at a batch of 32, in both layouts, and how many bytes a
//! pass must move at least.

use batchnorm_cuda::{Element, Shape};

/// Images per batch.
const BATCH: usize = 32;

/// Channels, and height and width, of ResNet-50's batch normalisations.
const RESNET_50: [(usize, usize); 12] = [
    (64, 112),
    (64, 56),
    (128, 56),
    (256, 56),
    (128, 28),
    (256, 28),
    (512, 28),
    (256, 14),
    (512, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
];

/// All shapes.
pub fn resnet_50() -> impl Iterator<Item = Shape> {
    RESNET_50
        .into_iter()
        .map(|(channels, side)| Shape::nchw(BATCH, channels, side, side))
        .flat_map(|shape| [shape, shape.channels_last()])
}

/// What a benchmark of this shape and element is called, for filters: `f32/nchw/32x64x56x56`.
pub fn name<T: Element>(shape: Shape) -> String {
    let Shape {
        batch,
        channels,
        height,
        width,
        layout,
    } = shape;
    format!("{}/{layout}/{batch}x{channels}x{height}x{width}", T::DTYPE)
}

/// Bytes of `tensors` tensors: of the traffic of a pass that touches each of them once.
///
/// Copy 2 (read, written), forward in training and evaluation 2 (x, y), backward 3 (x, dy, dx).
pub fn bytes<T: Element>(shape: Shape, tensors: u64) -> u64 {
    let len = shape.len().expect("a shape of ResNet-50");
    tensors * (len * size_of::<T>()) as u64
}
