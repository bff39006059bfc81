//! How ranks reach each other: one operation, an all-gather of a few words.

use std::rc::Rc;
use std::sync::Arc;

use crate::backend::Backend;
use crate::error::Result;

/// A group of ranks that pass messages of the same length at the same time, seen from one of them.
///
/// [`ThreadRank`](crate::ThreadRank) is one for threads of a process, on every backend. With the feature `nccl`,
/// `cudarc::nccl::safe::Comm` is one for GPUs, of one machine or many. Others are easily written: it takes one operation.
///
/// A reference, an `Rc` or an `Arc` of a collective is a collective too, so that all layers of a network share one.
pub trait Collective<B: Backend> {
    /// This rank's number, from 0 on.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// Writes every rank's `own` to `gathered`, in the order of the ranks: of `own.len() * world_size()` words.
    ///
    /// All ranks call it, the same number of times and in the same order, with `own` of the same length. On a device it is
    /// work on the backend's stream: it need not be done when this returns, but what is launched there afterwards finds
    /// the result.
    ///
    /// # Errors
    /// [`Error::Collective`](crate::Error::Collective) where another rank is known to be gone, or this rank has waited too
    /// long; [`Error::RanksDisagree`](crate::Error::RanksDisagree) where lengths are known to differ; the driver's.
    fn all_gather(&self, backend: &B, own: B::View<'_, i64>, gathered: B::ViewMut<'_, i64>) -> Result<()>;
}

macro_rules! shared_collective {
    ($($shared:ty),+) => {$(
        impl<B: Backend, C: Collective<B> + ?Sized> Collective<B> for $shared {
            fn rank(&self) -> usize {
                (**self).rank()
            }

            fn world_size(&self) -> usize {
                (**self).world_size()
            }

            fn all_gather(&self, backend: &B, own: B::View<'_, i64>, gathered: B::ViewMut<'_, i64>) -> Result<()> {
                (**self).all_gather(backend, own, gathered)
            }
        }
    )+};
}
shared_collective!(&C, Rc<C>, Arc<C>);
