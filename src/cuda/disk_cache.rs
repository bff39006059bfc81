//! Compiled kernels on disk, so that a program compiles each of them once per machine, not once per start.
//!
//! A file is trusted only if it is whole, is for this very key, and lies where nobody else can write: else the kernel is
//! compiled again. Failing to write is no error, only slower.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Names the folder of the cache; `off` turns it off.
pub const CACHE_VARIABLE: &str = "BATCHNORM_CUDA_CACHE";

const MAGIC: &[u8; 16] = b"batchnorm-cuda 1";
const HASH_BYTES: usize = 32;

/// Where compiled kernels are kept between program starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DiskCache {
    /// The folder that the environment variable `BATCHNORM_CUDA_CACHE` names (`off`: nowhere), else `batchnorm-cuda` in
    /// the user's cache folder.
    #[default]
    Default,
    /// This folder. Where other users can write to it, it is not used.
    Folder(PathBuf),
    /// Nowhere.
    Off,
}

impl DiskCache {
    /// The folder, if there is to be one.
    pub fn folder(&self) -> Option<PathBuf> {
        match self {
            DiskCache::Off => None,
            DiskCache::Folder(folder) => Some(folder.clone()),
            DiskCache::Default => match std::env::var_os(CACHE_VARIABLE) {
                Some(value) if value == "off" => None,
                Some(folder) if !folder.is_empty() => Some(folder.into()),
                _ => dirs::cache_dir().map(|caches| caches.join("batchnorm-cuda")),
            },
        }
    }

    /// What was kept under `key`, if it can be trusted.
    pub(super) fn read(&self, key: &Key) -> Option<Vec<u8>> {
        let path = key.path(&self.folder()?);
        if !is_private(path.parent()?) || !is_private(&path) {
            return None;
        }
        let file = fs::read(path).ok()?;
        let (magic, rest) = file.split_at_checked(MAGIC.len())?;
        let (for_key, rest) = rest.split_at_checked(HASH_BYTES)?;
        let (hash, content) = rest.split_at_checked(HASH_BYTES)?;
        let trusted = magic == MAGIC && for_key == key.0 && hash == Sha256::digest(content).as_slice();
        trusted.then(|| content.to_vec())
    }

    /// Keeps `content` under `key`, if possible. A reader sees either nothing or all of it.
    pub(super) fn write(&self, key: &Key, content: &[u8]) {
        if let Some(folder) = self.folder() {
            // A cache that cannot be written is a slow start, nothing more.
            let _ = write_file(&folder, key, content);
        }
    }
}

/// Hash of everything that a compiled kernel depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key([u8; HASH_BYTES]);

impl Key {
    /// The parts in their order; none can pass for a piece of its neighbour.
    pub(super) fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Key(hash.finalize().into())
    }

    fn path(&self, folder: &Path) -> PathBuf {
        let name: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        folder.join(name).with_extension("cubin")
    }
}

fn write_file(folder: &Path, key: &Key, content: &[u8]) -> io::Result<()> {
    create_private_folder(folder)?;
    if !is_private(folder) {
        // What is written there would never be trusted.
        return Ok(());
    }
    // Its permissions are private from the start, and it takes its name only when it is whole.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(MAGIC)?;
    file.write_all(&key.0)?;
    file.write_all(&Sha256::digest(content))?;
    file.write_all(content)?;
    file.persist(key.path(folder))?;
    Ok(())
}

#[cfg(unix)]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

#[cfg(not(unix))]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)
}

/// Whether only this user can have written it.
#[cfg(unix)]
fn is_private(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    fs::metadata(path).is_ok_and(|metadata| {
        metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & WRITABLE_BY_OTHERS == 0
    })
}

/// Elsewhere the user's folders are private by default.
#[cfg(not(unix))]
fn is_private(_path: &Path) -> bool {
    true
}
