//! Each intrinsic of `kernels/device.cuh` alone: what it makes of fixed inputs, as hashes, so that a GPU can be compared with
//! the stand-in driver, whose half of the same file is ordinary C++.
//!
//!     cargo run --release --example intrinsics -- --stand-in h200 > stand-in.json
//!     cargo run --release --example intrinsics > gpu.json            # on a machine with a GPU
//!     cargo run --release --example intrinsics -- --compile 75,90    # with NVRTC alone: do the probes compile?
//!
//! A NaN is a NaN, whatever its bits. Every block of results has a hash of its own, so that a difference says where it is.

use std::error::Error;
use std::ffi::{CStr, CString};
use std::sync::Arc;

use batchnorm_cuda::cuda::COMPILE_OPTIONS;
use batchnorm_cuda::cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use batchnorm_cuda::cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use batchnorm_cuda::cudarc::nvrtc::{Ptx, result, sys};
use batchnorm_cuda::half::{bf16, f16};
use clap::Parser;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const DEVICE_HEADER: &str = include_str!("../../kernels/device.cuh");
const PROBES: &str = include_str!("probes.cu");

/// Threads of every block.
const THREADS: usize = 128;
/// Blocks of a cluster.
const CLUSTER: usize = 4;
/// Results that share a hash.
const HASHED_TOGETHER: usize = 4096;
/// First compute capability with clusters and bulk copies, times ten.
const CLUSTERS: i32 = 90;

/// Prints hashes of what every intrinsic computes.
#[derive(Parser)]
struct Arguments {
    /// Use the stand-in driver, with this device profile.
    #[arg(long)]
    stand_in: Option<String>,
    /// Only compile for these compute capabilities, times ten, without a driver.
    #[arg(long, value_delimiter = ',')]
    compile: Vec<i32>,
}

/// What the bytes of a result are.
#[derive(Clone, Copy)]
enum Kind {
    Bits(usize),
    F16,
    Bf16,
    F32,
    F64,
}

/// The parts of device.cuh that a kernel needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Plain,
    Clusters,
    Bulk,
}

/// A kernel of probes.cu with its input.
struct Probe {
    name: String,
    part: Part,
    input: Vec<u8>,
    results: usize,
    kind: Kind,
    blocks: usize,
    cooperative: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    check_complete()?;
    if !arguments.compile.is_empty() {
        for &architecture in &arguments.compile {
            let mut bytes = 0;
            for part in parts(architecture) {
                bytes += compile(part, architecture)?.len();
            }
            println!("sm_{architecture}: the probes compile, {bytes} bytes");
        }
        return Ok(());
    }
    let ordinal = match &arguments.stand_in {
        Some(profile) => {
            emulator::install();
            emulator::ordinal(profile)
        }
        None => {
            batchnorm_cuda::cuda::is_available()?;
            0
        }
    };
    let context = CudaContext::new(ordinal)?;
    let architecture = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
        + context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let (mut hashes, mut not_run) = (Map::new(), Map::new());
    for part in [Part::Plain, Part::Clusters, Part::Bulk] {
        let probes = probes().into_iter().filter(|probe| probe.part == part);
        if !parts(architecture).contains(&part) {
            not_run.extend(probes.map(|probe| (probe.name, json!("needs compute capability 9.0"))));
            continue;
        }
        let module = context.load_module(Ptx::from_binary(compile(part, architecture)?))?;
        for probe in probes {
            let function = module.load_function(&probe.name)?;
            let output = run(&context.default_stream(), &function, &probe)?;
            hashes.insert(probe.name.clone(), probe.hashes(&output));
        }
    }
    let report = json!({
        "device": context.name()?,
        "driver": if arguments.stand_in.is_some() { "stand-in" } else { "real" },
        "architecture": architecture,
        "intrinsics": hashes,
        "not_run": not_run,
    });
    println!("{report:#}");
    Ok(())
}

/// Refuses to leave out a function of device.cuh.
fn check_complete() -> Result<()> {
    let names = DEVICE_HEADER.lines().filter_map(|line| {
        let name = line.strip_prefix("DEVICE ")?.split('(').next()?;
        name.rsplit([' ', '*', '&']).next()
    });
    // An address is what other functions of the file are made of.
    let missing: Vec<&str> = names
        .filter(|&name| name != "shared_address" && !PROBES.contains(name))
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("kernels/device.cuh has what no probe uses: {missing:?}").into())
    }
}

fn parts(architecture: i32) -> Vec<Part> {
    if architecture >= CLUSTERS {
        vec![Part::Plain, Part::Clusters, Part::Bulk]
    } else {
        vec![Part::Plain]
    }
}

// ---- inputs --------------------------------------------------------------------------------------------------------

/// SplitMix64 (Steele, Lea and Flood 2014).
fn random(count: usize) -> impl Iterator<Item = u64> {
    (1..=count as u64).map(|i| {
        let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Numbers at which arithmetic goes wrong if anywhere: with the signs and exponents of each other, they make every special
/// case of an addition, a product and a quotient.
fn specials() -> Vec<f64> {
    let magnitudes = [
        0.0,
        1.0,
        1.0 + f64::EPSILON,
        f64::from(1.0 + f32::EPSILON),
        1.5,
        3.0,
        0.1,
        1e10,
        f64::from(f32::MAX),
        f64::from(f32::MIN_POSITIVE),
        f64::from(f32::MIN_POSITIVE) / 1024.0,
        f64::MAX,
        f64::MIN_POSITIVE,
        5e-324,
        f64::INFINITY,
    ];
    let mut all: Vec<f64> = magnitudes.into_iter().flat_map(|x| [x, -x]).collect();
    all.push(f64::NAN);
    all
}

/// Triples of special numbers, and of random bits.
fn triples() -> Vec<[f64; 3]> {
    let specials = specials();
    let each = || specials.iter().copied();
    let mut all: Vec<[f64; 3]> = each()
        .flat_map(|a| each().flat_map(move |b| [1.0, -1.5, 0.0, f64::INFINITY, 5e-324].map(|c| [a, b, c])))
        .collect();
    let bits: Vec<u64> = random(3 * 4096).collect();
    all.extend(
        bits.chunks(3)
            .map(|bits| [bits[0], bits[1], bits[2]].map(f64::from_bits)),
    );
    all
}

/// Floats around which the results of rounding to half precision change: every upper half, with tails that are just below,
/// at and just above a tie, for f16, bf16 and subnormals.
fn floats_to_narrow() -> Vec<f32> {
    let tails: [u32; 12] = [
        0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff,
    ];
    (0..=u32::from(u16::MAX))
        .flat_map(|upper| tails.map(|tail| f32::from_bits(upper << 16 | tail)))
        .collect()
}

fn bytes<const N: usize>(values: impl IntoIterator<Item = [u8; N]>) -> Vec<u8> {
    values.into_iter().flatten().collect()
}

/// Every kernel of probes.cu.
fn probes() -> Vec<Probe> {
    let mut all = Vec::new();
    let mut add = |name: &str, part, input: Vec<u8>, results, kind, blocks, cooperative| {
        all.push(Probe {
            name: name.to_owned(),
            part,
            input,
            results,
            kind,
            blocks,
            cooperative,
        });
    };
    let triples = triples();
    let singles = triples.iter().flatten().map(|&x| (x as f32).to_le_bytes());
    let (singles, doubles) = (bytes(singles), bytes(triples.iter().flatten().map(|x| x.to_le_bytes())));
    for operation in ["fma", "divide", "sqrt", "sum_and_product"] {
        for (suffix, input, kind) in [("float", &singles, Kind::F32), ("double", &doubles, Kind::F64)] {
            let name = format!("{operation}_{suffix}");
            add(&name, Part::Plain, input.clone(), triples.len(), kind, 8, false);
        }
    }
    add("real_to_real", Part::Plain, doubles, triples.len(), Kind::F64, 8, false);

    let halves = bytes((0..=u16::MAX).map(u16::to_le_bytes));
    let floats = floats_to_narrow();
    let floats_bytes = bytes(floats.iter().map(|x| x.to_le_bytes()));
    for (name, kind) in [("f16", Kind::F16), ("bf16", Kind::Bf16)] {
        add(
            &format!("widen_{name}"),
            Part::Plain,
            halves.clone(),
            1 << 16,
            Kind::F32,
            16,
            false,
        );
        let input = floats_bytes.clone();
        add(
            &format!("narrow_{name}"),
            Part::Plain,
            input,
            floats.len(),
            kind,
            64,
            false,
        );
    }

    let noise = bytes(random(8 * THREADS).map(u64::to_le_bytes));
    for n in [1, 2, 4, 8] {
        for name in ["load_store", "load_last_use", "load_coherent", "store_streaming"] {
            let name = format!("{name}_{n}");
            add(
                &name,
                Part::Plain,
                noise.clone(),
                3 * THREADS,
                Kind::Bits(2 * n),
                2,
                false,
            );
        }
        let name = format!("shared_{n}");
        add(&name, Part::Plain, noise.clone(), THREADS, Kind::Bits(2 * n), 1, false);
        let name = format!("copy_async_{n}");
        add(
            &name,
            Part::Plain,
            noise.clone(),
            2 * THREADS,
            Kind::Bits(2 * n),
            1,
            false,
        );
    }
    add(
        "shuffle_xor",
        Part::Plain,
        noise.clone(),
        5 * THREADS,
        Kind::Bits(8),
        1,
        false,
    );
    add("arrive", Part::Plain, noise.clone(), 24, Kind::Bits(4), 24, false);
    add(
        "await_arrivals",
        Part::Plain,
        noise.clone(),
        24,
        Kind::Bits(4),
        24,
        true,
    );
    let threads = CLUSTER * THREADS;
    add(
        "cluster_exchange",
        Part::Clusters,
        noise.clone(),
        threads,
        Kind::Bits(8),
        CLUSTER,
        false,
    );
    add("bulk_copy", Part::Bulk, noise, 2 * THREADS, Kind::Bits(4), 1, false);
    all
}

// ---- running -------------------------------------------------------------------------------------------------------

/// `struct Arguments` of probes.cu.
#[repr(C)]
struct KernelArguments {
    input: u64,
    output: u64,
    counters: u64,
    count: u64,
}

// SAFETY: four integers without padding.
unsafe impl DeviceRepr for KernelArguments {}

fn run(stream: &Arc<CudaStream>, function: &CudaFunction, probe: &Probe) -> Result<Vec<u8>> {
    let input = stream.clone_htod(&probe.input)?;
    let output = stream.alloc_zeros::<u8>(probe.results * probe.kind.size())?;
    // Behind the counters there is room for one number per block.
    let counters = stream.alloc_zeros::<u32>(64 + probe.blocks)?;
    let arguments = KernelArguments {
        input: input.device_ptr(stream).0,
        output: output.device_ptr(stream).0,
        counters: counters.device_ptr(stream).0,
        count: probe.results as u64,
    };
    let config = LaunchConfig {
        grid_dim: (probe.blocks as u32, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: (32 * THREADS + 16) as u32,
    };
    let mut launch = stream.launch_builder(function);
    launch.arg(&arguments);
    // SAFETY: the kernel takes this structure; the buffers are as large as probes.cu goes, and live until the stream has
    // been waited for.
    unsafe {
        if probe.cooperative {
            launch.launch_cooperative(config)?;
        } else {
            launch.launch(config)?;
        }
    }
    let bytes = stream.clone_dtoh(&output)?;
    stream.synchronize()?;
    Ok(bytes)
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Kind::Bits(bytes) => bytes,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::F32 => 4,
            Kind::F64 => 8,
        }
    }

    fn is_nan(self, value: &[u8]) -> bool {
        match (self, value) {
            (Kind::F16, &[a, b]) => f16::from_le_bytes([a, b]).is_nan(),
            (Kind::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).is_nan(),
            (Kind::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).is_nan(),
            (Kind::F64, value) => value.try_into().is_ok_and(|value| f64::from_le_bytes(value).is_nan()),
            _ => false,
        }
    }
}

impl Probe {
    /// One hash for each run of results.
    fn hashes(&self, output: &[u8]) -> Value {
        let size = self.kind.size();
        let hash = |part: &[u8]| -> String {
            let mut hash = Sha256::new();
            for value in part.chunks(size) {
                hash.update(if self.kind.is_nan(value) { b"NaN" } else { value });
            }
            hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
        };
        let hashes: Vec<String> = output.chunks(HASHED_TOGETHER * size).map(hash).collect();
        json!({ "results": self.results, "hashes": hashes })
    }
}

// ---- compiling -----------------------------------------------------------------------------------------------------

/// Machine code of a part of the probes, compiled as the library compiles its kernels.
fn compile(part: Part, architecture: i32) -> Result<Vec<u8>> {
    let source = CString::new(format!("{DEVICE_HEADER}\n#line 1 \"probes.cu\"\n{PROBES}"))?;
    let mut options: Vec<String> = COMPILE_OPTIONS.iter().map(|&option| option.to_owned()).collect();
    options.push(format!("--gpu-architecture=sm_{architecture}"));
    options.push(format!("-DTHREADS={THREADS}"));
    options.push("-DBLOCKS=1".to_owned());
    options.push(format!(
        "-DCLUSTER={}",
        if part == Part::Clusters { CLUSTER } else { 1 }
    ));
    options.push(format!("-DBULK={}", u8::from(part == Part::Bulk)));
    let program = result::create_program(&source, Some(c"probes.cu")).map_err(|error| format!("{error:?}"))?;
    // SAFETY: the program is alive until the end of this function, and nobody else has it.
    let compiled = unsafe { result::compile_program(program, &options) };
    let code = match compiled {
        // SAFETY: as above; NVRTC writes as many bytes as it says.
        Ok(()) => unsafe {
            let mut size = 0;
            let mut code = Vec::new();
            let sized = sys::nvrtcGetCUBINSize(program, &mut size).result();
            sized
                .and_then(|()| {
                    code.resize(size, 0);
                    sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()
                })
                .map(|()| code)
                .map_err(|error| format!("{error:?}"))
        },
        // SAFETY: as above; the log ends with a zero.
        Err(error) => Err(unsafe {
            result::get_program_log(program).map_or_else(
                |_| format!("{error:?}"),
                |log| CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned(),
            )
        }),
    };
    // SAFETY: nobody uses the program after this.
    unsafe { result::destroy_program(program) }.map_err(|error| format!("{error:?}"))?;
    Ok(code?)
}
