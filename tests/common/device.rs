//! The devices the tests run on.

use std::ops::Range;

use batchnorm_cuda::{AsTensor, Backend, Backward, Cpu, Element, Forward, Plain, Result};

/// A backend whose buffers can be cut, and whose pieces can be given to a pass.
///
/// The library takes pieces of each device's own kind (slices, `CudaView`); this trait gives both one name, so that a
/// test is written once.
pub trait Device: Backend {
    /// What a failed test calls it.
    const NAME: &'static str;

    fn part<T: Plain>(buffer: &Self::Buffer<T>, range: Range<usize>) -> Self::View<'_, T>;
    fn part_mut<T: Plain>(buffer: &mut Self::Buffer<T>, range: Range<usize>) -> Self::ViewMut<'_, T>;

    fn new_forward<'a, T: Element>(x: &'a Self::View<'_, T>, y: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T>;
    fn forward_in_place<'a, T: Element>(x: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T>;
    fn forward_add_relu<'a, T: Element>(
        forward: Forward<'a, Self, T>,
        z: &'a Self::View<'_, T>,
    ) -> Forward<'a, Self, T>;

    fn new_backward<'a, T: Element>(x: &'a Self::View<'_, T>, dy: &'a Self::View<'_, T>) -> Backward<'a, Self, T>;
    fn backward_in_place<'a, T: Element>(
        x: &'a Self::View<'_, T>,
        dy: &'a mut Self::ViewMut<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_dx<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        dx: &'a mut Self::ViewMut<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_add_relu<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        y: &'a Self::View<'_, T>,
    ) -> Backward<'a, Self, T>;
    fn backward_dz<'a, T: Element>(
        backward: Backward<'a, Self, T>,
        dz: &'a mut Self::ViewMut<'_, T>,
    ) -> Result<Backward<'a, Self, T>>;

    /// A size for this device: `full`, or `reduced` where a stand-in runs every thread one after another.
    fn size(full: usize, reduced: usize) -> usize {
        let _ = reduced;
        full
    }

    /// A buffer's values, on the host.
    fn download<T: Plain>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>> {
        self.to_vec(buffer.view())
    }
}

/// The methods of [`Device`] that read the same for every backend once its pieces are tensors. (Not generic code, because
/// a slice is a tensor itself and a `CudaView` is one behind a reference.)
macro_rules! passes {
    ($piece:ident => $read:expr, $piece_mut:ident => $write:expr) => {
        fn new_forward<'a, T: Element>(
            $piece: &'a Self::View<'_, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Forward<'a, Self, T> {
            Forward::new($read, $write)
        }

        fn forward_in_place<'a, T: Element>($piece_mut: &'a mut Self::ViewMut<'_, T>) -> Forward<'a, Self, T> {
            Forward::in_place($write)
        }

        fn forward_add_relu<'a, T: Element>(
            forward: Forward<'a, Self, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Forward<'a, Self, T> {
            forward.add_relu($read)
        }

        fn new_backward<'a, T: Element>(
            x: &'a Self::View<'_, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Backward<'a, Self, T> {
            let dy = $read;
            let $piece = x;
            Backward::new($read, dy)
        }

        fn backward_in_place<'a, T: Element>(
            $piece: &'a Self::View<'_, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Backward<'a, Self, T> {
            Backward::in_place($read, $write)
        }

        fn backward_dx<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Backward<'a, Self, T> {
            backward.dx($write)
        }

        fn backward_add_relu<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece: &'a Self::View<'_, T>,
        ) -> Backward<'a, Self, T> {
            backward.add_relu($read)
        }

        fn backward_dz<'a, T: Element>(
            backward: Backward<'a, Self, T>,
            $piece_mut: &'a mut Self::ViewMut<'_, T>,
        ) -> Result<Backward<'a, Self, T>> {
            backward.dz($write)
        }
    };
}

impl Device for Cpu {
    const NAME: &'static str = "cpu";

    fn part<T: Plain>(buffer: &Vec<T>, range: Range<usize>) -> &[T] {
        &buffer[range]
    }

    fn part_mut<T: Plain>(buffer: &mut Vec<T>, range: Range<usize>) -> &mut [T] {
        &mut buffer[range]
    }

    passes!(piece => *piece, piece_mut => *piece_mut);
}

/// The CPU.
pub fn cpu() -> Cpu {
    Cpu::new()
}
