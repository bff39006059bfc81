//! Overwriting several buffers of a module, all of them or none.
//!
//! Captured graphs and optimisers hold the addresses, so the values are copied in place; and a copy may fail after others
//! have been made. So what is overwritten is kept until all copies are on their way.

use crate::backend::{AsTensor, AsTensorMut, Backend};
use crate::element::Plain;
use crate::error::Result;

/// A buffer that is to get new values.
pub(crate) struct Change<'m, B: Backend, T: Plain> {
    backend: &'m B,
    target: &'m mut B::Buffer<T>,
    new: B::Buffer<T>,
    old: B::Buffer<T>,
}

impl<'m, B: Backend, T: Plain> Change<'m, B, T> {
    /// Keeps what `target` holds. `new` has as many elements. Allocates.
    pub(crate) fn boxed(
        backend: &'m B,
        target: &'m mut B::Buffer<T>,
        new: B::Buffer<T>,
    ) -> Result<Box<dyn Overwrite + 'm>> {
        let mut old = backend.zeros(B::view_len(&target.view()))?;
        backend.copy(target.view(), old.view_mut())?;
        Ok(Box::new(Self {
            backend,
            target,
            new,
            old,
        }))
    }
}

/// A [`Change`] of any element type.
pub(crate) trait Overwrite {
    fn write(&mut self) -> Result<()>;
    fn restore(&mut self) -> Result<()>;
}

impl<B: Backend, T: Plain> Overwrite for Change<'_, B, T> {
    fn write(&mut self) -> Result<()> {
        self.backend.copy(self.new.view(), self.target.view_mut())
    }

    fn restore(&mut self) -> Result<()> {
        self.backend.copy(self.old.view(), self.target.view_mut())
    }
}

/// Makes all changes. After an error none is made, unless the device is lost.
pub(crate) fn overwrite(changes: &mut [Box<dyn Overwrite + '_>]) -> Result<()> {
    for at in 0..changes.len() {
        if let Err(error) = changes[at].write() {
            for change in &mut changes[..=at] {
                // Where this fails too there is nothing left to try, and the first error says more.
                let _ = change.restore();
            }
            return Err(error);
        }
    }
    Ok(())
}
