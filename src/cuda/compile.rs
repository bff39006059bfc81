//! From a kernel's source to code for a device, through NVRTC.
//!
//! The result is a cubin for the device's own architecture. PTX would be refused by a driver older than NVRTC; a cubin is
//! taken by every driver of the same major version. PTX is the last resort, for a device that this NVRTC does not know.

use super::disk_cache::{DiskCache, Key};
use super::kernel::Instantiation;
use super::nvrtc::{Code, Failure, Nvrtc};
use super::probe;
use crate::error::{Error, Result};

/// Options that every kernel is compiled with: IEEE arithmetic, contracted only where the source says so.
pub const OPTIONS: [&str; 5] = [
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
];

/// What the driver gets: code for this architecture, or PTX to translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code.
    Cubin(u32),
    /// Intermediate code, which newer devices can run.
    Ptx(u32),
}

impl Target {
    /// The best that an NVRTC which knows the `supported` architectures can do for a device.
    ///
    /// Machine code runs on devices of the same major version and the same or a newer minor version.
    pub(super) fn choose(architecture: u32, supported: &[u32]) -> Option<Self> {
        let older = supported.iter().copied().filter(|&known| known <= architecture);
        let same_major = older.clone().filter(|known| known / 10 == architecture / 10).max();
        same_major.map(Target::Cubin).or_else(|| older.max().map(Target::Ptx))
    }

    fn option(self) -> String {
        match self {
            Target::Cubin(architecture) => format!("--gpu-architecture=sm_{architecture}"),
            Target::Ptx(architecture) => format!("--gpu-architecture=compute_{architecture}"),
        }
    }
}

/// A compiled kernel.
pub(super) struct Compiled {
    /// A cubin, or PTX with its closing zero byte.
    pub(super) image: Vec<u8>,
    /// Whether the disk cache had it.
    pub(super) from_disk: bool,
}

/// Compiles a kernel to machine code, for a device that need not be there: this takes NVRTC, but no driver.
///
/// What it compiles goes to `cache`, so that an image of a program can be shipped with its kernels compiled.
///
/// # Errors
/// [`Unavailable::NoNvrtc`](super::Unavailable::NoNvrtc); [`Error::Compile`] with NVRTC's log, also where this NVRTC does not
/// know the architecture.
pub fn compile_ahead(instantiation: &Instantiation, architecture: u32, cache: &DiskCache) -> Result<Vec<u8>> {
    compile_with(Nvrtc::find(None)?, instantiation, architecture, cache).map(|compiled| compiled.image)
}

/// Compiles a kernel for a device of this driver, or finds it in the cache.
pub(super) fn compile(instantiation: &Instantiation, architecture: u32, cache: &DiskCache) -> Result<Compiled> {
    compile_with(probe::nvrtc()?, instantiation, architecture, cache)
}

fn compile_with(
    nvrtc: &Nvrtc,
    instantiation: &Instantiation,
    architecture: u32,
    cache: &DiskCache,
) -> Result<Compiled> {
    let (major, minor) = nvrtc.version();
    let failed = |log| Error::Compile {
        kernel: instantiation.to_string(),
        architecture,
        log,
    };
    let target = Target::choose(architecture, &nvrtc.architectures()?).ok_or_else(|| {
        failed(format!(
            "NVRTC {major}.{minor} knows no architecture up to sm_{architecture}"
        ))
    })?;
    let options: Vec<String> = std::iter::once(target.option())
        .chain(OPTIONS.iter().map(|&option| option.to_owned()))
        .chain(instantiation.definitions())
        .collect();
    let source = instantiation.kernel.source();
    let version = format!("NVRTC {major}.{minor}");
    let key = Key::of(
        [source.hash, &version]
            .into_iter()
            .chain(options.iter().map(String::as_str)),
    );
    if let Some(image) = cache.read(&key) {
        return Ok(Compiled { image, from_disk: true });
    }
    let code = match target {
        Target::Cubin(_) => Code::Cubin,
        Target::Ptx(_) => Code::Ptx,
    };
    let image = nvrtc
        .compile(source.text, &options, code)
        .map_err(|failure| match failure {
            Failure::Source(log) => failed(log),
            Failure::Other(error) => error,
        })?;
    cache.write(&key, &image);
    Ok(Compiled {
        image,
        from_disk: false,
    })
}
