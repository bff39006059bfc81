//! Flattens each kernel with its headers into one source string, and hashes it.
//!
//! NVRTC gets no include path, so a kernel must carry its headers along; the hash keys the caches of compiled kernels.
//! `#line` directives keep messages pointing at the files under `kernels/`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use sha2::{Digest, Sha256};

const KERNELS: [&str; 9] = [
    "statistics",
    "apply",
    "backward_reduce",
    "backward_apply",
    "resident_forward",
    "resident_backward",
    "merge_statistics",
    "merge_sums",
    "update_running",
];

fn main() {
    let folder = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("kernels");
    println!("cargo:rerun-if-changed={}", folder.display());

    let mut sources = String::new();
    for kernel in KERNELS {
        let mut flat = String::new();
        flatten(&folder, &format!("{kernel}.cu"), &mut HashSet::new(), &mut flat);
        let hash = Sha256::digest(flat.as_bytes())
            .iter()
            .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        writeln!(
            sources,
            "pub(super) const {}: Source = Source {{ text: {flat:?}, hash: {hash:?} }};",
            kernel.to_uppercase()
        )
        .expect("a string can be written to");
    }
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernel_sources.rs");
    fs::write(&out, sources).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
}

/// Appends `file` with every header of the folder in place of its first inclusion. Headers from elsewhere (the stand-in
/// driver's) stay as they are.
fn flatten(folder: &Path, file: &str, seen: &mut HashSet<String>, flat: &mut String) {
    if !seen.insert(file.to_owned()) {
        return;
    }
    let path = folder.join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    writeln!(flat, "#line 1 \"{file}\"").expect("a string can be written to");
    for (number, line) in text.lines().enumerate() {
        let header = line
            .trim()
            .strip_prefix("#include \"")
            .and_then(|rest| rest.strip_suffix('"'))
            .filter(|header| folder.join(header).exists());
        match header {
            Some(header) => {
                flatten(folder, header, seen, flat);
                writeln!(flat, "#line {} \"{file}\"", number + 2).expect("a string can be written to");
            }
            None if line.trim() == "#pragma once" => flat.push('\n'),
            None => {
                flat.push_str(line);
                flat.push('\n');
            }
        }
    }
}
