//! From which size on several threads are faster than one: what `Cpu::threads_from` decides.

use batchnorm_cuda::{Cpu, Dtype, Layout, Result, Shape};
use serde_json::json;

use crate::pass::{Op, passes};
use crate::{percentile, second_run};

/// Several threads are worth it where they take no more than so much of one thread's time.
const FASTER: f64 = 0.9;

/// Prints, for tensors of growing size, the median times of passes on one thread and on all threads of the current pool, and for
/// each pass the size from which on all threads are faster, by a tenth at least; as JSON only that, one line for each pass.
pub fn measure(rounds: usize, as_json: bool) -> Result<()> {
    let threads = rayon::current_num_threads();
    if !as_json {
        println!("f32; KiB are those of x forward, of x and dy backward; ms on 1 thread and on {threads}");
    }
    for layout in [Layout::Nchw, Layout::Nhwc] {
        for op in Op::REPORTED {
            let mut from = None;
            for batch in [1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128] {
                // 32 KiB of x for each image.
                let shape = Shape {
                    layout,
                    ..Shape::nchw(batch, 32, 16, 16)
                };
                let mut one = passes(Cpu::new().threads_from(usize::MAX), shape, Dtype::F32)?;
                let mut all = passes(Cpu::new().threads_from(0), shape, Dtype::F32)?;
                let mut times = [vec![], vec![]];
                for _ in 0..rounds {
                    times[0].push(second_run(|| one.run(op))?);
                    times[1].push(second_run(|| all.run(op))?);
                }
                let [one, all] = times.map(|mut times| {
                    times.sort_by(f64::total_cmp);
                    percentile(&times, 0.5)
                });
                let kib = 32 * batch * if op == Op::Backward { 2 } else { 1 };
                if !as_json {
                    println!("{:<8} {layout} {kib:>5} KiB {one:>8.4} {all:>8.4}", op.name());
                }
                from = match from {
                    None if all < FASTER * one => Some(kib),
                    Some(_) if all > one => None,
                    unchanged => unchanged,
                };
            }
            let op = op.name();
            if as_json {
                let row = json!({ "op": op, "layout": layout.name(), "threads": threads, "rounds": rounds, "from_kib": from });
                println!("{row}");
                continue;
            }
            match from {
                Some(kib) => println!("{op:<8} {layout}: {threads} threads are faster from {kib} KiB on"),
                None => println!("{op:<8} {layout}: one thread is the fastest"),
            }
        }
    }
    Ok(())
}
