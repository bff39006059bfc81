//! Stream capture: what is noted is replayed, and what a graph cannot hold ends the capture.

#![cfg(target_os = "linux")]

mod support;

use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream};
use support::*;

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Doubles n numbers of a.
const DOUBLE: &str = "KERNEL(twice, Arguments, 32) { if (threadIdx.x < arguments.n) arguments.a[threadIdx.x] *= 2; }";

struct Bench {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    twice: CudaFunction,
    a: CudaSlice<f32>,
}

impl Bench {
    fn new() -> Bench {
        let (context, stream) = device("h200");
        // SAFETY: every slice here is used on one stream at a time; cudarc's events would be foreign to the captures.
        unsafe { context.disable_event_tracking() };
        let twice = kernel(&context, &format!("{ARGUMENTS}{DOUBLE}"), "twice");
        let a = stream.clone_htod(&[1f32, 10.0, 100.0]).unwrap();
        Bench {
            context,
            stream,
            twice,
            a,
        }
    }

    fn double(&self, stream: &Arc<CudaStream>) {
        let arguments = Arguments {
            a: address(&self.a, stream),
            n: 3,
            ..Default::default()
        };
        launch(stream, &self.twice, shape(1, 32, 0), arguments).unwrap();
    }

    fn begin(&self) {
        self.stream.begin_capture(MODE).unwrap();
    }

    fn end(&self) -> Result<CudaGraph, CUresult> {
        let graph = self
            .stream
            .end_capture(CUgraphInstantiate_flags(0))
            .map_err(|error| error.0)?;
        Ok(graph.expect("a graph"))
    }

    fn values(&self) -> Vec<f32> {
        self.stream.clone_dtoh(&self.a).unwrap()
    }
}

#[test]
fn captured_work_runs_when_the_graph_is_launched() {
    let mut bench = Bench::new();
    bench.begin();
    assert_eq!(
        bench.stream.capture_status().unwrap(),
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
    );
    bench.double(&bench.stream);
    bench.double(&bench.stream);
    bench.stream.memset_zeros(&mut bench.a.slice_mut(2..)).unwrap();
    let graph = bench.end().unwrap();
    assert_eq!(
        bench.stream.capture_status().unwrap(),
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
    );
    assert_eq!(bench.values(), [1.0, 10.0, 100.0], "nothing has run yet");
    assert!(emulator::launches(bench.stream.cu_stream()).is_empty());

    graph.upload().unwrap();
    graph.launch().unwrap();
    assert_eq!(bench.values(), [4.0, 40.0, 0.0]);
    graph.launch().unwrap();
    assert_eq!(bench.values(), [16.0, 160.0, 0.0]);
    assert_eq!(emulator::launches(bench.stream.cu_stream()).len(), 4);
}

#[test]
fn a_graph_outlives_its_module_and_arguments() {
    let bench = Bench::new();
    bench.begin();
    bench.double(&bench.stream);
    let graph = bench.end().unwrap();
    drop(bench.twice);
    graph.launch().unwrap();
    assert_eq!(bench.stream.clone_dtoh(&bench.a).unwrap(), [2.0, 20.0, 200.0]);
}

/// Does something in a capture that must fail; the capture is lost, the stream is not.
#[track_caller]
fn forbidden(expected: CUresult, act: impl FnOnce(&Bench) -> CUresult) {
    let bench = Bench::new();
    bench.begin();
    bench.double(&bench.stream);
    assert_eq!(act(&bench), expected);
    assert_eq!(
        bench.stream.capture_status().unwrap(),
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED
    );
    let arguments = Arguments {
        a: address(&bench.a, &bench.stream),
        n: 3,
        ..Default::default()
    };
    let afterwards = launch(&bench.stream, &bench.twice, shape(1, 32, 0), arguments).unwrap_err();
    assert_eq!(afterwards.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    assert_eq!(bench.end().err(), Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
    bench.double(&bench.stream);
    assert_eq!(bench.values(), [2.0, 20.0, 200.0]);
}

#[test]
fn waiting_allocating_and_copying_to_the_host_end_a_capture() {
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let code = |error: cudarc::driver::DriverError| error.0;
    forbidden(unsupported, |bench| {
        bench.stream.synchronize().map_err(code).unwrap_err()
    });
    forbidden(unsupported, |bench| {
        bench.context.synchronize().map_err(code).unwrap_err()
    });
    forbidden(unsupported, |bench| {
        bench.stream.alloc_zeros::<f32>(4).map_err(code).unwrap_err()
    });
    forbidden(unsupported, |bench| {
        bench.stream.clone_htod(&[1f32]).map_err(code).unwrap_err()
    });
    forbidden(unsupported, |bench| {
        bench.stream.clone_dtoh(&bench.a).map_err(code).unwrap_err()
    });
    // SAFETY: the address goes to a variable that outlives the call.
    forbidden(unsupported, |_| unsafe { sys::cuMemAlloc_v2(&mut 0, 16) });
}

#[test]
fn an_event_from_outside_does_not_order_a_capture() {
    forbidden(CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION, |bench| {
        let other = bench.context.new_stream().unwrap();
        let event = other.record_event(None).unwrap();
        bench.stream.wait(&event).unwrap_err().0
    });
}

#[test]
fn another_stream_joins_by_events() {
    let bench = Bench::new();
    let side = bench.context.new_stream().unwrap();
    bench.begin();
    bench.double(&bench.stream);
    side.wait(&bench.stream.record_event(None).unwrap()).unwrap();
    assert_eq!(
        side.capture_status().unwrap(),
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
    );
    bench.double(&side);
    let event = side.record_event(None).unwrap();
    assert_eq!(event.synchronize().unwrap_err().0, CUresult::CUDA_ERROR_CAPTURED_EVENT);
    bench.stream.wait(&event).unwrap();
    let graph = bench.end().unwrap();
    assert_eq!(
        side.capture_status().unwrap(),
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
    );
    graph.launch().unwrap();
    assert_eq!(bench.values(), [4.0, 40.0, 400.0]);
}

#[test]
fn a_stream_that_does_not_come_back_is_an_error() {
    let bench = Bench::new();
    let side = bench.context.new_stream().unwrap();
    bench.begin();
    side.wait(&bench.stream.record_event(None).unwrap()).unwrap();
    bench.double(&side);
    assert_eq!(bench.end().err(), Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
}

#[test]
fn captures_have_rules() {
    let bench = Bench::new();
    let null = bench.context.default_stream();
    assert_eq!(
        null.begin_capture(MODE).unwrap_err().0,
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    assert_eq!(
        bench.end().err(),
        Some(CUresult::CUDA_ERROR_INVALID_VALUE),
        "there is no capture to end"
    );
    bench.begin();
    assert_eq!(
        bench.stream.begin_capture(MODE).unwrap_err().0,
        CUresult::CUDA_ERROR_INVALID_VALUE,
        "one at a time"
    );
    let stream = bench.stream.clone();
    let elsewhere = std::thread::spawn(move || {
        stream
            .end_capture(CUgraphInstantiate_flags(0))
            .map(|_| ())
            .unwrap_err()
            .0
    });
    assert_eq!(
        elsewhere.join().unwrap(),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD
    );
    bench.end().unwrap();
}

#[test]
fn other_threads_work_on_while_one_captures() {
    let bench = Bench::new();
    bench.begin();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other = bench.context.new_stream().unwrap();
            let x = other.clone_htod(&[5f32]).unwrap();
            assert_eq!(other.clone_dtoh(&x).unwrap(), [5.0]);
            other.synchronize().unwrap();
        });
    });
    bench.double(&bench.stream);
    bench.end().unwrap().launch().unwrap();
    assert_eq!(bench.values(), [2.0, 20.0, 200.0]);
}
