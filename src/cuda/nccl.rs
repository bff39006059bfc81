//! NCCL between the ranks of a synchronised batch norm: the caller's communicator as a [`Collective`].

use cudarc::driver::{CudaView, CudaViewMut};
use cudarc::nccl::result::{NcclError, NcclStatus};
use cudarc::nccl::safe::Comm;

use super::Cuda;
use crate::error::{Error, Result, Unavailable};
use crate::sync::Collective;

/// Whether this machine has NCCL. `cudarc` panics where it has not, so ask before the first call of it.
///
/// # Errors
/// [`Unavailable::NoNccl`], with how to get it.
pub fn is_nccl_available() -> std::result::Result<(), Unavailable> {
    // The first name that cudarc tries. It knows no libnccl.so.2, which is what NCCL's own packages are called.
    let name = libloading::library_filename("nccl");
    // SAFETY: NCCL's initialisers have no demands, and nothing of it is called here.
    match unsafe { libloading::Library::new(&name) } {
        // It stays loaded: the next to ask is cudarc.
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(_) => Err(Unavailable::NoNccl {
            tried: name.to_string_lossy().into_owned(),
        }),
    }
}

/// One communicator for each rank, made by `Comm::from_rank` with the very stream that the module's [`Cuda`] launches on:
/// so the gathering is ordered with the kernels before and after it, and nothing waits.
///
/// Each rank needs a thread or a process of its own, because the calls of one pass go to NCCL one after another; one thread
/// that drives several ranks (`Comm::from_devices`) would wait for itself.
///
/// What NCCL decides: how messages travel, what its own environment variables say, what becomes of a rank whose peer is gone,
/// and of messages of different lengths (of modules with different numbers of channels), which it asks its callers never to send. Errors that its calls return come out as [`Error::Collective`]. A peer that is silent is no error to NCCL: the
/// gathering waits on the stream, and with it whoever waits for the stream, until the communicator is aborted or the process
/// ends.
impl Collective<Cuda> for Comm {
    fn rank(&self) -> usize {
        Comm::rank(self)
    }

    fn world_size(&self) -> usize {
        Comm::world_size(self)
    }

    fn all_gather(&self, backend: &Cuda, own: CudaView<'_, i64>, mut gathered: CudaViewMut<'_, i64>) -> Result<()> {
        let failed = |message| {
            Err(Error::Collective {
                rank: Comm::rank(self),
                message,
            })
        };
        if self.stream().cu_stream() != backend.stream().cu_stream() {
            return Err(Error::Argument {
                argument: "collective",
                expected: "a communicator on the stream of the module's device".into(),
                got: "one on another stream".into(),
            });
        }
        match Comm::all_gather(self, &own, &mut gathered) {
            Ok(NcclStatus::Success) => Ok(()),
            Ok(NcclStatus::InProgress) => {
                failed("the communicator is non-blocking: make one with Comm::from_rank, which is blocking".into())
            }
            Ok(NcclStatus::NumResults) => failed("ncclAllGather returned a result that is none".into()),
            Err(NcclError(result)) => failed(format!("ncclAllGather: {result:?}")),
        }
    }
}
