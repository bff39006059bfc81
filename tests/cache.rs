//! Compiled kernels are kept: in memory for each context, on disk for the next start. What is on disk is used only if it is
//! whole, for this key, and nobody else's.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use batchnorm_cuda::cuda::plan::Choice;
use batchnorm_cuda::cuda::{CompileReport, DiskCache};
use batchnorm_cuda::cudarc::driver::CudaContext;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Element, Epilogue, Result, Shape};

const SHAPE: Shape = Shape::nchw(2, 3, 4, 4);

/// Kernels of one evaluation: one.
const KERNELS: usize = 1;

/// A program start: a context of its own, so that nothing is in memory yet.
fn start(cache: DiskCache) -> Cuda {
    common::driver();
    let context = CudaContext::new(0).expect("a context");
    Cuda::with_cache(context.default_stream(), cache).expect("a device and NVRTC")
}

/// Evaluates something whose result is known.
fn evaluate<T: Element<Param = f32>>(cuda: &Cuda) -> Result<()> {
    let bn: BatchNorm2d<Cuda> = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(3).eps(0.0))?;
    let values: Vec<T> = (0..SHAPE.len()?).map(|i| T::from_param(i as f32)).collect();
    let y = bn.forward_eval_alloc(SHAPE, &cuda.upload(&values)?)?;
    // Mean 0, variance 1, weight 1, bias 0.
    assert_eq!(cuda.to_vec(y.as_view())?, values);
    Ok(())
}

/// Starts with this cache, evaluates, and tells what that cost.
fn cost(cache: &DiskCache) -> CompileReport {
    let cuda = start(cache.clone());
    evaluate::<f32>(&cuda).expect("an evaluation");
    cuda.compile_report()
}

fn assert_compiled(report: CompileReport) {
    assert_eq!((report.compiled, report.from_disk), (KERNELS, 0));
}

fn assert_from_disk(report: CompileReport) {
    assert_eq!((report.compiled, report.from_disk), (0, KERNELS));
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("the cache's folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

/// A folder that has been filled by a first start, and the file in it.
fn filled() -> (tempfile::TempDir, DiskCache, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = DiskCache::Folder(folder.path().join("kernels"));
    assert_compiled(cost(&cache));
    let file = match &files(&folder.path().join("kernels"))[..] {
        [file] => file.clone(),
        files => panic!("one kernel, but {files:?}"),
    };
    (folder, cache, file)
}

#[test]
fn a_second_start_finds_the_kernels_on_disk() {
    let (_folder, cache, _) = filled();
    assert_from_disk(cost(&cache));
}

#[test]
fn a_kernel_is_compiled_once_per_context() {
    let cuda = start(DiskCache::Off);
    for _ in 0..3 {
        evaluate::<f32>(&cuda).unwrap();
    }
    assert_eq!(cuda.compile_report().compiled, 1);
    // Another stream of the same context shares what is loaded.
    let other = Cuda::with_cache(cuda.stream().context().new_stream().unwrap(), DiskCache::Off).unwrap();
    evaluate::<f32>(&other).unwrap();
    assert_eq!(other.compile_report().compiled, 1);
}

/// Two contexts of one device compare equal, yet a kernel of one is unknown to the other.
#[test]
fn each_context_loads_its_own_kernels() {
    let (one, other) = (start(DiskCache::Off), start(DiskCache::Off));
    for cuda in [&one, &other] {
        evaluate::<f32>(cuda).unwrap();
        assert_eq!(cuda.compile_report().compiled, 1);
    }
}

#[test]
fn only_what_is_used_is_compiled() {
    // Beside apply, which evaluation has brought: statistics, backward reduce and backward apply; or forward and backward.
    for (choice, compiled) in [(Choice::GENERAL, 4), (Choice::resident(None), 3)] {
        let cuda = start(DiskCache::Off).with_choice(choice);
        let bn: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(3)).unwrap();
        assert_eq!(cuda.compile_report().compiled, 0);
        bn.prepare_eval::<f32>(SHAPE, Epilogue::Identity).unwrap();
        assert_eq!(cuda.compile_report().compiled, 1);
        bn.prepare::<f32>(SHAPE).unwrap();
        assert_eq!(cuda.compile_report().compiled, compiled);
    }
}

#[test]
fn threads_that_need_one_kernel_at_once_compile_it_once() {
    let cuda = start(DiskCache::Off);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| evaluate::<f32>(&cuda).unwrap());
        }
    });
    assert_eq!(cuda.compile_report().compiled, 1);
}

#[test]
fn starts_at_the_same_time_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::Folder(folder.path().to_owned());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| cost(&cache));
        }
    });
    assert_eq!(files(folder.path()).len(), 1);
    assert_from_disk(cost(&cache));
}

/// Damages the file, and sees it recompiled and mended.
fn assert_not_trusted(damage: impl FnOnce(&Path, Vec<u8>)) {
    let (_folder, cache, file) = filled();
    let whole = fs::read(&file).unwrap();
    damage(&file, whole.clone());
    assert_compiled(cost(&cache));
    assert_eq!(fs::read(&file).unwrap().len(), whole.len(), "the file is not mended");
    assert_from_disk(cost(&cache));
}

#[test]
fn a_truncated_file_is_recompiled() {
    assert_not_trusted(|file, whole| fs::write(file, &whole[..whole.len() / 2]).unwrap());
    assert_not_trusted(|file, whole| fs::write(file, &whole[..10]).unwrap());
    assert_not_trusted(|file, _| fs::write(file, b"").unwrap());
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    for place in [0.0, 0.001, 0.5, 0.999] {
        assert_not_trusted(|file, mut bytes| {
            let at = (bytes.len() as f64 * place) as usize;
            bytes[at] ^= 1;
            fs::write(file, bytes).unwrap();
        });
    }
}

#[test]
fn a_file_of_another_kernel_is_recompiled() {
    let (_folder, cache, file) = filled();
    // The kernel for half precision, under the name of the one for single precision.
    let cuda = start(cache.clone());
    evaluate::<batchnorm_cuda::half::f16>(&cuda).unwrap();
    let other = files(file.parent().unwrap())
        .into_iter()
        .find(|path| *path != file)
        .unwrap();
    fs::copy(&other, &file).unwrap();
    assert_compiled(cost(&cache));
    assert_from_disk(cost(&cache));
}

/// A whole file with the right hash, whose content the driver refuses.
#[test]
fn a_kernel_the_driver_refuses_is_recompiled() {
    use sha2::{Digest, Sha256};
    let (_folder, cache, file) = filled();
    let whole = fs::read(&file).unwrap();
    let content = b"no machine code at all, and long enough to be looked at by a loader of such things";
    // Magic and key, then the hash of the content and the content.
    let header = &whole[..16 + 32];
    fs::write(&file, [header, Sha256::digest(content).as_slice(), content].concat()).unwrap();
    let report = cost(&cache);
    assert_eq!((report.compiled, report.from_disk), (1, 1));
}

/// Several programs that start at the same time, and again and again.
#[test]
fn processes_share_a_folder() {
    const FOLDER: &str = "BATCHNORM_TEST_SHARED_FOLDER";
    const ROUNDS: usize = 10;
    let round = |folder: &Path, number: usize| DiskCache::Folder(folder.join(number.to_string()));
    if let Some(folder) = std::env::var_os(FOLDER) {
        for number in 0..ROUNDS {
            let report = cost(&round(Path::new(&folder), number));
            assert_eq!(report.compiled + report.from_disk, KERNELS);
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let processes: Vec<_> = (0..4)
        .map(|_| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "processes_share_a_folder"])
                .env(FOLDER, folder.path())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for process in processes {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    for number in 0..ROUNDS {
        assert_eq!(files(&folder.path().join(number.to_string())).len(), KERNELS);
        assert_from_disk(cost(&round(folder.path(), number)));
    }
}

/// Not even the superuser can read a folder as if it were a file.
#[test]
fn what_cannot_be_read_costs_nothing_but_time() {
    let (_folder, cache, file) = filled();
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_compiled(cost(&cache));
    assert_compiled(cost(&cache));
    // Nothing half-made is left beside it.
    assert_eq!(files(file.parent().unwrap()), [file]);
}

#[cfg(unix)]
mod permissions {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn folder_and_file_are_private() {
        let (_folder, _, file) = filled();
        assert_eq!(mode(file.parent().unwrap()), 0o700);
        assert_eq!(mode(&file), 0o600);
    }

    #[test]
    fn a_file_that_others_can_write_is_not_trusted() {
        let (_folder, cache, file) = filled();
        set_mode(&file, 0o666);
        assert_compiled(cost(&cache));
        // It has been replaced by a private one.
        assert_eq!(mode(&file), 0o600);
        assert_from_disk(cost(&cache));
    }

    /// The superuser reads it all the same.
    #[test]
    fn a_file_that_must_not_be_read_is_recompiled() {
        let (_folder, cache, file) = filled();
        set_mode(&file, 0o000);
        if fs::read(&file).is_ok() {
            assert_from_disk(cost(&cache));
        } else {
            assert_compiled(cost(&cache));
            // It has been replaced by one that can be read.
            assert_from_disk(cost(&cache));
        }
    }

    /// What is there is used; what is not is compiled, and kept only by the superuser, who writes all the same.
    #[test]
    fn a_read_only_folder_is_read() {
        let (_folder, cache, file) = filled();
        let folder = file.parent().unwrap();
        set_mode(folder, 0o500);
        let writable = tempfile::tempfile_in(folder).is_ok();
        assert_from_disk(cost(&cache));
        let cuda = start(cache.clone());
        evaluate::<batchnorm_cuda::half::f16>(&cuda).unwrap();
        assert_eq!(cuda.compile_report().compiled, 1);
        assert_eq!(files(folder).len(), if writable { 2 } else { 1 });
        set_mode(folder, 0o700);
    }

    #[test]
    fn a_folder_that_others_can_write_is_not_trusted() {
        let (_folder, cache, file) = filled();
        set_mode(file.parent().unwrap(), 0o777);
        assert_compiled(cost(&cache));
    }
}

#[test]
fn a_folder_that_cannot_be_made_costs_nothing_but_time() {
    let folder = tempfile::tempdir().unwrap();
    let in_the_way = folder.path().join("a file");
    fs::write(&in_the_way, "").unwrap();
    let cache = DiskCache::Folder(in_the_way.join("kernels"));
    assert_compiled(cost(&cache));
    assert_compiled(cost(&cache));
}

#[test]
fn the_cache_can_be_turned_off() {
    assert_eq!(DiskCache::Off.folder(), None);
    assert_compiled(cost(&DiskCache::Off));
    assert_compiled(cost(&DiskCache::Off));
}
