//! The stand-in NVRTC: options, logs, images, and what the driver makes of bad ones.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUresult;
use cudarc::nvrtc::sys::{self, nvrtcResult};
use cudarc::nvrtc::{Ptx, result};
use support::*;

const NOTHING: &str = "KERNEL(nothing, Arguments, 32) {}";

fn source() -> String {
    with_seam(&format!("{ARGUMENTS}{NOTHING}"))
}

/// Loads an image on a device; the error.
fn load(name: &str, image: &[u8]) -> CUresult {
    let (context, _stream) = device(name);
    match context.load_module(Ptx::from_binary(image.to_vec())) {
        Ok(_) => CUresult::CUDA_SUCCESS,
        Err(error) => error.0,
    }
}

#[test]
fn an_error_of_compilation_comes_with_the_compilers_words() {
    emulator::install();
    let broken = with_seam(&format!(
        "{ARGUMENTS}KERNEL(broken, Arguments, 32) {{\n  this is no kernel;\n}}"
    ));
    let (code, log) = compile(&broken, &["--gpu-architecture=sm_90"]).unwrap_err();
    assert_eq!(code, nvrtcResult::NVRTC_ERROR_COMPILATION);
    assert!(log.contains("test.cu:3:") && log.contains("error"), "{log}");
}

#[test]
fn options_that_cannot_be_kept_are_errors() {
    emulator::install();
    for option in [
        "--use_fast_math",
        "-use_fast_math",
        "--fmad=true",
        "--gpu-architecture=sm_61",
        "--gpu-architecture=9.0",
        "--nonsense",
    ] {
        let (code, log) = compile(&source(), &[option]).unwrap_err();
        assert_eq!(code, nvrtcResult::NVRTC_ERROR_INVALID_OPTION, "{option}");
        assert!(log.contains("error"), "{log}");
    }
}

#[test]
fn definitions_reach_the_source() {
    emulator::install();
    let source = with_seam("#if SIZE != 7 || !defined(FLAG) || defined(GONE)\n#error\n#endif\n");
    for options in [
        ["--gpu-architecture=sm_80", "-DSIZE=7", "-DFLAG", "-DGONE", "-UGONE"],
        [
            "-arch=sm_80",
            "--define-macro=SIZE=7",
            "--define-macro=FLAG",
            "-w",
            "-lineinfo",
        ],
    ] {
        compile(&source, &options).unwrap();
    }
    compile(&source, &["-arch", "sm_80", "-D", "SIZE=7", "--define-macro", "FLAG"]).unwrap();
    compile(&source, &["-arch=sm_80", "-DSIZE=8", "-DFLAG"]).unwrap_err();
}

/// Definitions that only a GPU's compiler looks at make no other object of a source, so that it is compiled once; the
/// architecture is in the trailer alone.
#[test]
fn images_differ_where_the_preprocessed_sources_do() {
    emulator::install();
    let source = with_seam(&format!(
        "{ARGUMENTS}KERNEL(number, Arguments, 32) {{ arguments.c[0] = NUMBER; }}"
    ));
    let image = |options: [&str; 3]| compile(&source, &options).unwrap();
    let first = image(["-arch=sm_80", "-DNUMBER=1", "-DBLOCKS=1"]);
    assert_eq!(first, image(["-arch=sm_80", "-DNUMBER=1", "-DBLOCKS=2"]));
    assert_ne!(first, image(["-arch=sm_80", "-DNUMBER=2", "-DBLOCKS=1"]));
    let for_90 = image(["-arch=sm_90", "-DNUMBER=1", "-DBLOCKS=1"]);
    const TRAILER: usize = 40;
    let object = |image: &[u8]| image[..image.len() - TRAILER].to_vec();
    assert_eq!(object(&first), object(&for_90));
    assert_ne!(first, for_90);
}

#[test]
fn the_architectures_are_those_of_nvrtc_13() {
    emulator::install();
    let mut count = 0;
    // SAFETY: NVRTC writes as many architectures as it said.
    let architectures = unsafe {
        sys::nvrtcGetNumSupportedArchs(&mut count).result().unwrap();
        let mut list = vec![0; count as usize];
        sys::nvrtcGetSupportedArchs(list.as_mut_ptr()).result().unwrap();
        list
    };
    assert_eq!(architectures, [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]);
}

#[test]
fn an_image_runs_on_its_own_major_version_from_its_minor_on() {
    emulator::install();
    let image = |architecture: &str| compile(&source(), &[architecture]).unwrap();
    let of_80 = image("--gpu-architecture=sm_80");
    assert_eq!(load("a100", &of_80), CUresult::CUDA_SUCCESS);
    assert_eq!(load("rtx4090", &of_80), CUresult::CUDA_SUCCESS);
    assert_eq!(load("h200", &of_80), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(load("t4", &of_80), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(
        load("a100", &image("--gpu-architecture=sm_89")),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
    );
    assert_eq!(
        load("h200", &image("--gpu-architecture=sm_90a")),
        CUresult::CUDA_SUCCESS
    );
}

#[test]
fn a_damaged_image_is_refused() {
    emulator::install();
    let image = compile(&source(), &["--gpu-architecture=sm_90"]).unwrap();
    assert_eq!(load("h200", &image), CUresult::CUDA_SUCCESS);
    // In the trailer: its mark, the architecture, the length, the hash.
    let len = image.len();
    for position in [0, 3, 20, 40, len / 2, len - 60, len - 40, len - 24, len - 16, len - 1] {
        let mut damaged = image.clone();
        damaged[position] ^= 1;
        assert_eq!(
            load("h200", &damaged),
            CUresult::CUDA_ERROR_INVALID_IMAGE,
            "byte {position}"
        );
    }
    for length in [1, 4, 63, 64, 1000, image.len() / 2, image.len() - 1] {
        assert_eq!(
            load("h200", &image[..length]),
            CUresult::CUDA_ERROR_INVALID_IMAGE,
            "cut to {length} bytes"
        );
    }
    for garbage in [&b""[..], b"\0", b"garbage", b"\x7fELF"] {
        let mut garbage = garbage.to_vec();
        garbage.push(0);
        assert_eq!(
            load("h200", &garbage),
            CUresult::CUDA_ERROR_INVALID_IMAGE,
            "{garbage:?}"
        );
    }
}

#[test]
fn ptx_is_only_text() {
    let (context, _stream) = device("h200");
    let source = std::ffi::CString::new(source()).unwrap();
    let program = result::create_program(&source, None).unwrap();
    // SAFETY: the program is live until it is destroyed.
    let ptx = unsafe {
        result::compile_program(program, &["--gpu-architecture=compute_90"]).unwrap();
        let mut size = 1;
        sys::nvrtcGetCUBINSize(program, &mut size).result().unwrap();
        assert_eq!(size, 0, "a virtual architecture has no cubin");
        let ptx = result::get_ptx(program).unwrap();
        result::destroy_program(program).unwrap();
        ptx.into_iter()
            .map(|c| c as u8)
            .take_while(|c| *c != 0)
            .collect::<Vec<u8>>()
    };
    let text = String::from_utf8(ptx).unwrap();
    assert!(text.contains(".target sm_90"), "{text}");
    let refused = context.load_module(Ptx::from_src(text)).unwrap_err();
    assert_eq!(refused.0, CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
}

#[test]
fn a_kernel_that_is_not_there_is_not_found() {
    let (context, _stream) = device("h200");
    let module = context
        .load_module(Ptx::from_binary(cubin(0, &format!("{ARGUMENTS}{NOTHING}"))))
        .unwrap();
    module.load_function("nothing").unwrap();
    assert_eq!(
        module.load_function("something").unwrap_err().0,
        CUresult::CUDA_ERROR_NOT_FOUND
    );
}

#[test]
fn many_threads_compile_the_same_and_different_sources() {
    emulator::install();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let context = CudaContext::new(thread % 2).unwrap();
                let stream = context.new_stream().unwrap();
                let source = format!(
                    "{ARGUMENTS}enum {{ PROCESS = {} }};\nKERNEL(mark, Arguments, 1) {{ arguments.c[0] = {}; }}",
                    std::process::id(),
                    thread / 4
                );
                let mark = kernel(&context, &source, "mark");
                let c = stream.alloc_zeros::<u32>(1).unwrap();
                let arguments = Arguments {
                    c: address(&c, &stream),
                    ..Default::default()
                };
                launch(&stream, &mark, shape(1, 1, 0), arguments).unwrap();
                assert_eq!(stream.clone_dtoh(&c).unwrap(), [thread as u32 / 4]);
            });
        }
    });
}

#[test]
fn wrong_programs_are_errors() {
    emulator::install();
    let mut size = 0;
    let invented = 0x1234_usize as sys::nvrtcProgram;
    // SAFETY: the handle is wrong, which NVRTC must notice without following it.
    unsafe {
        assert_eq!(
            sys::nvrtcGetCUBINSize(invented, &mut size),
            nvrtcResult::NVRTC_ERROR_INVALID_PROGRAM
        );
        assert_eq!(
            sys::nvrtcCompileProgram(invented, 0, std::ptr::null()),
            nvrtcResult::NVRTC_ERROR_INVALID_PROGRAM
        );
    }
}

#[test]
fn patches_change_sources_while_they_live() {
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(number, Arguments, 1) {{ arguments.c[0] = 1; }}");
    let number = || {
        let number = kernel(&context, &source, "number");
        let c = stream.alloc_zeros::<u32>(1).unwrap();
        let arguments = Arguments {
            c: address(&c, &stream),
            ..Default::default()
        };
        launch(&stream, &number, shape(1, 1, 0), arguments).unwrap();
        stream.clone_dtoh(&c).unwrap()[0]
    };
    let patches = emulator::patch_sources(&[("c[0] = 1", "c[0] = 2"), ("c[0] = 2", "c[0] = 3"), ("absent", "")]);
    assert_eq!(number(), 3, "one patch after the other");
    assert_eq!(
        std::thread::scope(|scope| scope.spawn(number).join().unwrap()),
        1,
        "of this thread alone"
    );
    assert_eq!(patches.finish(), 2);
    assert_eq!(number(), 1);
    drop(emulator::patch_sources(&[("c[0] = 1", "c[0] = 4")]));
    assert_eq!(number(), 1);
    assert_eq!(emulator::patch_sources(&[]).finish(), 0);
}
