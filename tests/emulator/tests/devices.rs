//! The devices are what their profiles say, under every name a library may be asked for; and many can be used at once.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUevent_flags};
use support::*;

#[test]
fn the_driver_reports_the_profiles() {
    emulator::install();
    for profile in &emulator::PROFILES {
        let context = CudaContext::new(emulator::ordinal(profile.name)).unwrap();
        assert_eq!(context.name().unwrap(), profile.device_name);
        assert_eq!(context.total_mem().unwrap(), profile.memory_bytes);
        let (major, minor) = profile.compute_capability;
        assert_eq!(context.compute_capability().unwrap(), (major as i32, minor as i32));
        let attribute = |which| context.attribute(which).unwrap();
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) as u32,
            profile.multiprocessors
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK) as u32,
            profile.shared_per_block
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) as u32,
            profile.shared_per_block_opt_in
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) as u32,
            profile.shared_per_multiprocessor
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK) as u32,
            profile.shared_reserved_per_block
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) as u32,
            profile.l2_bytes
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK) as u32,
            profile.registers
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR) as u32,
            profile.registers
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR) as u32,
            profile.threads_per_multiprocessor
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR) as u32,
            profile.blocks_per_multiprocessor
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE) as u32,
            profile.clock_khz
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) as u32,
            profile.memory_clock_khz
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) as u32,
            profile.memory_bus_bits
        );
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) == 1,
            profile.clusters
        );
        assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH), 1);
        assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED), 1);
        assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE), 32);
        assert_eq!(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X) as u32,
            profile.largest_grid
        );
        assert_eq!(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y), 65535);
    }
}

#[test]
fn the_first_device_is_the_h200() {
    assert_eq!(emulator::ordinal("h200"), 0);
    assert_eq!(
        emulator::PROFILES[emulator::ordinal("too-old")].compute_capability,
        (6, 1)
    );
}

#[test]
#[should_panic(expected = "no device profile named voodoo")]
fn an_unknown_profile_is_an_error() {
    emulator::ordinal("voodoo");
}

#[test]
fn the_loader_answers_for_every_usual_name() {
    emulator::install();
    emulator::install();
    for (name, symbol) in [
        ("libcuda.so", "cuInit"),
        ("libcuda.so.1", "cuInit"),
        ("libnvrtc.so", "nvrtcVersion"),
        ("libnvrtc.so.13", "nvrtcVersion"),
        ("libnvrtc.so.12", "nvrtcVersion"),
    ] {
        // SAFETY: the library is the stand-in; the symbol is looked at, not called.
        unsafe {
            let library = libloading::Library::new(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            let own = if symbol == "cuInit" {
                "stand_in_take_launches"
            } else {
                "stand_in_nvrtc_configure"
            };
            for symbol in [symbol, own] {
                library
                    .get::<unsafe extern "C" fn()>(symbol.as_bytes())
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
    }
}

#[test]
fn the_null_streams_account_is_each_threads_own() {
    emulator::install();
    let context = CudaContext::new(emulator::ordinal("rtx4090")).unwrap();
    let nothing = kernel(
        &context,
        &format!("{ARGUMENTS}KERNEL(nothing, Arguments, 32) {{}}"),
        "nothing",
    );
    std::thread::scope(|scope| {
        for count in 1..5 {
            let (context, nothing) = (&context, &nothing);
            scope.spawn(move || {
                let stream = context.default_stream();
                for _ in 0..count {
                    launch(&stream, nothing, shape(1, 32, 0), Arguments::default()).unwrap();
                }
                assert_eq!(emulator::launches(stream.cu_stream()).len(), count);
                assert_eq!(emulator::stream_calls(stream.cu_stream()).launches, count as u64);
            });
        }
    });
}

#[test]
fn many_threads_streams_and_contexts_work_at_once() {
    emulator::install();
    let source = format!(
        "{ARGUMENTS}KERNEL(add, Arguments, 128) {{
           float* const part = (float*)shared_memory();
           part[threadIdx.x] = arguments.a[threadIdx.x];
           block_barrier();
           const float sum = part[threadIdx.x] + part[127 - threadIdx.x];
           block_barrier();
           arguments.a[threadIdx.x] = sum + (float)arguments.n;
         }}"
    );
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let source = &source;
            scope.spawn(move || {
                let name = ["h200", "t4", "small-90"][thread as usize % 3];
                let context = CudaContext::new(emulator::ordinal(name)).unwrap();
                let stream = context.new_stream().unwrap();
                let add = kernel(&context, source, "add");
                let mut values: Vec<f32> = (0..128).map(|i| i as f32).collect();
                let a = stream.clone_htod(&values).unwrap();
                for round in 0..50 {
                    let arguments = Arguments {
                        a: address(&a, &stream),
                        n: thread + round,
                        ..Default::default()
                    };
                    launch(&stream, &add, shape(1, 128, 512), arguments).unwrap();
                    let before = values.clone();
                    for i in 0..128 {
                        values[i] = before[i] + before[127 - i] + (thread + round) as f32;
                    }
                }
                assert_eq!(stream.clone_dtoh(&a).unwrap(), values);
                assert_eq!(emulator::launches(stream.cu_stream()).len(), 50);
            });
        }
    });
}

#[test]
fn events_measure_time() {
    let (context, stream) = device("h200");
    let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(timed).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    let end = stream.record_event(timed).unwrap();
    assert!(end.is_complete());
    let elapsed = start.elapsed_ms(&end).unwrap();
    assert!((5.0..5000.0).contains(&elapsed), "{elapsed}");
    let untimed = context.new_event(None).unwrap();
    untimed.record(&stream).unwrap();
    assert!(start.elapsed_ms(&untimed).is_err());
}
