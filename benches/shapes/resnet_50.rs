//! The batch normalisations of ResNet-50.

use batchnorm_cuda::Shape;

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
