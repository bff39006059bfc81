//! Times the CPU backend beside candle-nn's `BatchNorm` and burn-flex: the same tensors, the same threads, in turns.
//!
//!     cargo bench -p peers                                      all shapes, all threads
//!     cargo bench -p peers -- --threads 1 --json                JSON, one line for each implementation, op and shape
//!
//! This crate writes into the caller's buffer; the others allocate their results, as they are made to be used. `step` is a
//! forward pass in training and the gradients at x, weight and bias. NCHW and `f32`, which all of them have. Before anything is
//! timed, what they compute from the same small tensors is compared.

use std::time::{Duration, Instant};

use batchnorm_cuda::Shape;
use clap::Parser;
use peers::{Inputs, Peer, on_cpu};
use serde_json::json;

const SHAPES: [[usize; 4]; 3] = [[32, 64, 56, 56], [32, 256, 14, 14], [8, 64, 112, 112]];

/// How long each runs before it is timed.
const WARM_UP: Duration = Duration::from_millis(40);

/// Times the CPU backend beside candle's and burn's.
#[derive(Parser)]
struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,

    /// Threads of all. [default: as many as the machine has]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,

    /// How many times each is timed.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A pass of whoever is timed.
type Op = (&'static str, fn(&mut dyn Peer));

const OPS: [Op; 3] = [
    ("train", |peer| peer.train()),
    ("eval", |peer| peer.eval()),
    ("step", |peer| peer.step()),
];

fn main() {
    let arguments = Arguments::parse();
    // The pool that all of them use.
    rayon::ThreadPoolBuilder::new()
        .num_threads(arguments.threads)
        .build_global()
        .expect("no pool before this one");
    let rounds = arguments.rounds as usize;
    compare_results();
    if !arguments.json {
        println!("{} threads, {rounds} rounds, f32, NCHW", rayon::current_num_threads());
        println!("op    shape          implementation   median ms     p10     p90  times ours");
    }
    for size in SHAPES {
        let shape = size.map(|size| size.to_string()).join("x");
        let mut peers = on_cpu(&inputs(size));
        for (op, run) in OPS {
            let mut times = vec![Vec::new(); peers.len()];
            for _ in 0..rounds {
                for (peer, times) in peers.iter_mut().zip(&mut times) {
                    // Untimed for a while, so that each finds the caches and the allocator as it left them itself, and cores
                    // that were idle are at their speed.
                    let start = Instant::now();
                    while start.elapsed() < WARM_UP {
                        run(peer.as_mut());
                    }
                    let start = Instant::now();
                    run(peer.as_mut());
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
            let mut ours = None;
            for (peer, times) in peers.iter().zip(&mut times) {
                times.sort_by(f64::total_cmp);
                let [p10, median, p90] =
                    [0.1, 0.5, 0.9].map(|share| times[((rounds - 1) as f64 * share).round() as usize]);
                let ours = *ours.get_or_insert(median);
                if arguments.json {
                    let line = json!({
                        "peer": peer.name(), "op": op, "shape": shape, "layout": "nchw", "element": "f32",
                        "threads": rayon::current_num_threads(), "rounds": rounds,
                        "median_ms": median, "p10_ms": p10, "p90_ms": p90,
                    });
                    println!("{line}");
                } else {
                    println!(
                        "{op:<5} {shape:<14} {:<16} {median:>9.3} {p10:>7.3} {p90:>7.3} {:>11.2}",
                        peer.name(),
                        median / ours
                    );
                }
            }
        }
    }
}

/// Panics if one of them computes something else than this crate, so that no wrong pass is timed.
fn compare_results() {
    let mut peers = on_cpu(&inputs([4, 8, 7, 7]));
    let [ours, others @ ..] = peers.as_mut_slice() else {
        unreachable!("this crate is the first");
    };
    let expected = ours.outputs();
    for peer in others {
        let found = peer.outputs();
        for (what, expected, found) in [
            ("y", &expected.y, &found.y),
            ("dx", &expected.dx, &found.dx),
            ("dweight", &expected.dweight, &found.dweight),
            ("dbias", &expected.dbias, &found.dbias),
        ] {
            let largest = expected
                .iter()
                .fold(0.0, |largest: f32, value| largest.max(value.abs()));
            assert_eq!(expected.len(), found.len(), "{what} of {}", peer.name());
            for (expected, found) in expected.iter().zip(found) {
                let near = (expected - found).abs() <= 1e-4 * largest;
                assert!(near, "{what} of {}: {found} instead of {expected}", peer.name());
            }
        }
    }
}

/// Numbers without a pattern, and parameters that are not the default ones.
fn inputs(size: [usize; 4]) -> Inputs {
    let [batch, channels, height, width] = size;
    let noise = |len: usize, seed: usize| -> Vec<f32> {
        (0..len)
            .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 65536.0 - 0.5)
            .collect()
    };
    let len = size.iter().product();
    Inputs {
        shape: Shape::nchw(batch, channels, height, width),
        x: noise(len, 0),
        dy: noise(len, 1),
        weight: noise(channels, 2),
        bias: noise(channels, 3),
    }
}
