//! What a module keeps between its calls, shared by its clones: scratch memory of earlier steps and, on a GPU, the backend.

use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::step::Step;
use crate::backend::Backend;
use crate::element::{Dtype, Element};
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::shape::Shape;

/// Steps kept for later. A module that meets more shapes than this, or has more steps in flight, allocates some again.
const STEPS_KEPT: usize = 16;

/// What a module and its clones share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    steps: Mutex<Vec<Kept>>,
    #[cfg(feature = "candle-cuda")]
    pub(super) cuda: std::sync::OnceLock<crate::Cuda>,
}

/// What a step can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Purpose {
    pub(super) shape: Shape,
    pub(super) dtype: Dtype,
    pub(super) epilogue: Epilogue,
    /// candle works on the stream of the calling thread. What another thread has put on its own may not be done yet.
    pub(super) thread: ThreadId,
}

/// A step that nobody uses now.
#[derive(Debug)]
pub(super) struct Kept {
    purpose: Purpose,
    step: Box<dyn Any + Send>,
}

impl Kept {
    /// The step, which is of the types it was taken for.
    pub(super) fn step<B: Backend, T: Element>(&mut self) -> &mut Step<B, T> {
        self.step
            .downcast_mut()
            .expect("a step serves one backend and element type")
    }
}

impl Shared {
    /// A step for this purpose: one kept, or a new one.
    pub(super) fn take<B: Backend, T: Element>(&self, backend: &B, purpose: Purpose) -> Result<Kept> {
        let kept = {
            let mut steps = lock(&self.steps);
            let found = steps
                .iter()
                .position(|kept| kept.purpose == purpose && kept.step.is::<Step<B, T>>());
            found.map(|at| steps.remove(at))
        };
        match kept {
            Some(kept) => Ok(kept),
            None => Ok(Kept {
                purpose,
                step: Box::new(Step::<B, T>::new(backend, purpose.shape, purpose.epilogue)?),
            }),
        }
    }

    /// Gives a step back for later.
    pub(super) fn put(&self, kept: Kept) {
        let mut steps = lock(&self.steps);
        if steps.len() == STEPS_KEPT {
            steps.remove(0);
        }
        steps.push(kept);
    }
}

/// No state under these locks is left half-made by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
