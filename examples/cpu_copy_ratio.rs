//! Holds the CPU backend's training forward pass against a copy of the same tensor, the least that any pass can cost.
//!
//! For three shapes of ResNet-50, in NCHW and NHWC, `f32`: in each round a memcpy, a copy with streaming stores and a
//! training forward pass are timed one after the other on the same threads. Two figures compare the forward pass with the
//! faster copy: the ratio of the best times over all rounds, and that of the medians. The program fails if the latter is above
//! the bar of 3.0: it is what a change of the CPU backend must not break. On a busy machine both are too large.
//!
//!     cargo run --release --example cpu_copy_ratio -- [--threads N] [--rounds N]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Result, Shape};

/// How many times the copy the forward pass may take.
const BAR: f64 = 3.0;

fn main() -> ExitCode {
    let threads = argument("--threads").unwrap_or(1);
    let rounds = argument("--rounds").unwrap_or(101);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("threads");
    println!("{threads} threads, {rounds} rounds; milliseconds are the best of each");
    println!("shape                               memcpy  streaming  forward  ratio  of medians");
    let shapes = [
        Shape::nchw(32, 64, 56, 56),
        Shape::nchw(32, 256, 14, 14),
        Shape::nchw(8, 64, 112, 112),
    ];
    let mut within = true;
    for shape in shapes.into_iter().flat_map(|shape| [shape, shape.channels_last()]) {
        let figures = pool.install(|| measure(shape, rounds)).expect("a valid shape");
        println!("{figures}");
        within &= figures.ratio_of_medians <= BAR;
    }
    if within {
        ExitCode::SUCCESS
    } else {
        eprintln!("a ratio is above {BAR}");
        ExitCode::FAILURE
    }
}

/// The number after `name` on the command line.
fn argument(name: &str) -> Option<usize> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next()?;
    Some(
        arguments
            .next()
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("{name} takes a number")),
    )
}

struct Figures {
    shape: Shape,
    memcpy: Duration,
    streaming: Duration,
    forward: Duration,
    ratio: f64,
    ratio_of_medians: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [memcpy, streaming, forward] =
            [self.memcpy, self.streaming, self.forward].map(|time| time.as_secs_f64() * 1e3);
        write!(
            f,
            "{:<34} {memcpy:>7.3} {streaming:>10.3} {forward:>8.3} {:>6.2} {:>11.2}",
            self.shape.to_string(),
            self.ratio,
            self.ratio_of_medians
        )
    }
}

fn measure(shape: Shape, rounds: usize) -> Result<Figures> {
    let x: Vec<f32> = (0..shape.len()?)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 65536.0 - 0.5)
        .collect();
    let mut y = vec![0.0f32; x.len()];
    let mut bn = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(shape.channels))?;
    let mut saved = bn.prepare::<f32>(shape)?;

    let mut times = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        times[0].push(time(|| copy(&x, &mut y, |from, to| to.copy_from_slice(from))));
        times[1].push(time(|| copy(&x, &mut y, copy_streaming)));
        times[2].push(time(|| {
            bn.forward_train(&x, &mut y, &mut saved)
                .expect("all lengths are the shape's");
        }));
    }
    times.iter_mut().for_each(|times| times.sort());
    let ratio = |at: usize| {
        let [memcpy, streaming, forward] = [0, 1, 2].map(|kind: usize| times[kind][at].as_secs_f64());
        forward / memcpy.min(streaming)
    };
    Ok(Figures {
        shape,
        memcpy: times[0][0],
        streaming: times[1][0],
        forward: times[2][0],
        ratio: ratio(0),
        ratio_of_medians: ratio(rounds / 2),
    })
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Copies with all threads of the pool, each a contiguous share.
fn copy(from: &[f32], to: &mut [f32], part: impl Fn(&[f32], &mut [f32]) + Sync) {
    let threads = rayon::current_num_threads();
    let share = from.len().div_ceil(threads).next_multiple_of(16);
    rayon::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            let part = &part;
            scope.spawn(move |_| part(from, to));
        }
    });
}

/// Copies without reading the lines that are written.
#[cfg(target_arch = "x86_64")]
fn copy_streaming(from: &[f32], to: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_ps, _mm_sfence, _mm_stream_ps};

    const LINE: usize = 16;
    let head = to.as_ptr().align_offset(64).min(to.len());
    to[..head].copy_from_slice(&from[..head]);
    let (from, to) = (&from[head..], &mut to[head..]);
    let whole = to.len() / LINE * LINE;
    for (from, to) in from[..whole].chunks_exact(LINE).zip(to[..whole].chunks_exact_mut(LINE)) {
        for at in (0..LINE).step_by(4) {
            // SAFETY: every x86-64 machine has SSE; both slices have a whole line, and `to` is aligned to one.
            unsafe { _mm_stream_ps(to.as_mut_ptr().add(at), _mm_loadu_ps(from.as_ptr().add(at))) };
        }
    }
    to[whole..].copy_from_slice(&from[whole..]);
    // SAFETY: as above.
    unsafe { _mm_sfence() };
}

/// Other machines' memcpy is the only copy.
#[cfg(not(target_arch = "x86_64"))]
fn copy_streaming(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}
