//! What a module keeps between its calls, shared by its clones: memory of earlier steps and, on a GPU, the backend.

use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use crate::element::Dtype;
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::shape::Shape;

/// Things kept of one kind. A module that meets more shapes than this, or has more steps in flight, allocates some again.
const KEPT: usize = 16;

/// What a module and its clones share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Scratch memory of passes.
    pub(super) workspaces: Pool,
    /// The statistics of batches.
    pub(super) statistics: Pool,
    #[cfg(feature = "candle-cuda")]
    pub(super) cuda: std::sync::OnceLock<crate::Cuda>,
}

/// What a workspace or statistics can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Purpose {
    pub(super) shape: Shape,
    pub(super) dtype: Dtype,
    pub(super) epilogue: Epilogue,
    /// candle works on the stream of the calling thread. What another thread has put on its own may not be done yet.
    pub(super) thread: ThreadId,
}

impl Purpose {
    /// The same on the calling thread.
    pub(super) fn here(self) -> Self {
        Self {
            thread: std::thread::current().id(),
            ..self
        }
    }
}

/// Memory of some type that nobody uses now.
pub(super) type Kept = Box<dyn Any + Send + Sync>;

/// Things of one kind that nobody uses now. It is locked to take or put one, never while a pass runs.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<(Purpose, Kept)>>);

impl Pool {
    /// A thing for this purpose: one kept, or a new one.
    pub(super) fn take<X: Any + Send + Sync>(
        &self,
        purpose: Purpose,
        new: impl FnOnce() -> Result<X>,
    ) -> Result<Box<X>> {
        let kept = {
            let mut all = lock(&self.0);
            let found = all
                .iter()
                .position(|(serves, kept)| *serves == purpose && kept.is::<X>());
            found.map(|at| all.remove(at).1)
        };
        match kept {
            Some(kept) => Ok(kept.downcast().expect("what was found is of this type")),
            None => Ok(Box::new(new()?)),
        }
    }

    /// Gives a thing back for later.
    pub(super) fn put(&self, purpose: Purpose, kept: Kept) {
        let mut all = lock(&self.0);
        let oldest = (all.len() == KEPT).then(|| all.remove(0));
        all.push((purpose, kept));
        // Freeing memory of a device is not done under a lock.
        drop(all);
        drop(oldest);
    }
}

/// No state under these locks is left half-made by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
