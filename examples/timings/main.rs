//! Times the CPU backend beside a copy of the same tensor, the least that any pass can cost.
//!
//! In each round, for one element after the other, a memcpy, a copy with streaming stores and one pass are timed on the same
//! threads. With `--json` every op, shape, layout and element gives a line: median, 10th and 90th percentile of the pass, and the
//! median of the faster copy. With `--serve` another program says, line by line on standard input, what to time next, and so can
//! alternate with a library of its own: `scripts/pytorch-cpu` does. With `--crossover` tensors of growing size are timed on one
//! thread and on all.
//!
//! ```text
//! cargo run --release --example timings -- --json --threads 2
//! cargo run --release --example timings -- --shape 32x64x56x56 --element f32 --op train --bar 3
//! cargo run --release --example timings -- --crossover
//! ```

mod copies;
mod crossover;
mod pass;

use std::io::BufRead;
use std::process::ExitCode;

use batchnorm_cuda::{Cpu, Dtype, Layout, Result, Shape};
use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};

use pass::{Op, Passes, passes};

/// What is timed unless the command line says otherwise: N x C x H x W.
const SHAPES: [&str; 3] = ["32x64x56x56", "32x256x14x14", "8x64x112x112"];
const ELEMENTS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
const LAYOUTS: [Layout; 2] = [Layout::Nchw, Layout::Nhwc];

/// Times the CPU backend beside a copy of the same tensor.
#[derive(Parser)]
#[command(name = "timings", max_term_width = 100)]
struct Arguments {
    /// Print JSON, one line for each op, shape, layout and element.
    #[arg(long)]
    json: bool,

    /// Threads of passes and copies. [default: as many as the machine has]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,

    /// How many times each is timed.
    #[arg(long, default_value_t = 51, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Only these passes.
    #[arg(long, default_values = Op::REPORTED.map(Op::name), value_parser = named(Op::ALL, Op::name))]
    op: Vec<Op>,

    /// Only these shapes, N x C x H x W whatever the layout.
    #[arg(long, default_values = SHAPES, value_parser = dimensions)]
    shape: Vec<[usize; 4]>,

    /// Only these layouts.
    #[arg(long, default_values = LAYOUTS.map(Layout::name), value_parser = named(LAYOUTS, Layout::name))]
    layout: Vec<Layout>,

    /// Only these elements.
    #[arg(long, default_values = ELEMENTS.map(Dtype::name), value_parser = named(Dtype::ALL, Dtype::name))]
    element: Vec<Dtype>,

    /// Fail if a pass takes more than so many times the copy.
    #[arg(long)]
    bar: Option<f64>,

    /// Measure from which size on several threads are faster than one, instead.
    #[arg(long)]
    crossover: bool,

    /// Answer requests on standard input, such as {"op": "train", "shape": "32x64x56x56", "layout": "nchw", "element":
    /// "f32", "calls": 5}, each with the milliseconds of so many calls; with "results": true also with what they computed.
    #[arg(long)]
    serve: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(arguments.threads)
        .build()
        .expect("threads");
    if arguments.serve {
        pool.install(serve);
        return ExitCode::SUCCESS;
    }
    if arguments.crossover && pool.current_num_threads() == 1 {
        eprintln!("--crossover compares one thread with several: there is only one");
        return ExitCode::FAILURE;
    }
    let outcome = if arguments.crossover {
        pool.install(|| crossover::measure(arguments.rounds as usize, arguments.json).map(|()| true))
    } else {
        pool.install(|| report(&arguments))
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("a pass takes longer than the bar");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Times all that was asked for. Whether all of it stays below the bar.
fn report(arguments: &Arguments) -> Result<bool> {
    let rounds = arguments.rounds as usize;
    if !arguments.json {
        println!("{} threads, {rounds} rounds", rayon::current_num_threads());
        println!("op       element layout shape            median ms   p10   p90    copy ms  times the copy");
    }
    let mut within = true;
    for &dimensions in &arguments.shape {
        for &layout in &arguments.layout {
            let mut all = arguments
                .element
                .iter()
                .map(|&element| passes(Cpu::new(), shape(dimensions, layout), element))
                .collect::<Result<Vec<_>>>()?;
            for &op in &arguments.op {
                // All elements in the same rounds: on a machine that is faster at times, only what is timed in turns compares.
                let figures = Figures::measure(&mut all, op, rounds)?;
                for (&element, figures) in arguments.element.iter().zip(figures) {
                    let case = Case {
                        op,
                        dimensions,
                        layout,
                        element,
                    };
                    if arguments.json {
                        println!("{}", case.json(&figures));
                    } else {
                        println!("{}", case.row(&figures));
                    }
                    within &= arguments.bar.is_none_or(|bar| figures.ratio() <= bar);
                }
            }
        }
    }
    Ok(within)
}

/// Reads requests until the end of standard input, and answers each with one line.
fn serve() {
    let mut prepared: Option<(Shape, Dtype, Box<dyn Passes>)> = None;
    for line in std::io::stdin().lock().lines() {
        let answer = line
            .map_err(|error| error.to_string())
            .and_then(|line| answer(&line, &mut prepared))
            .unwrap_or_else(|error| json!({ "error": error }));
        println!("{answer}");
    }
}

fn answer(request: &str, prepared: &mut Option<(Shape, Dtype, Box<dyn Passes>)>) -> std::result::Result<Value, String> {
    let request: Value = serde_json::from_str(request).map_err(|error| error.to_string())?;
    let text = |key: &str| request[key].as_str().ok_or(format!("no text under {key:?}"));
    let op: Op = text("op")?.parse()?;
    let element: Dtype = text("element")?.parse()?;
    let shape = shape(dimensions(text("shape")?)?, text("layout")?.parse()?);
    let calls = request["calls"].as_u64().ok_or("no number under \"calls\"")?;
    if prepared.as_ref().is_none_or(|(s, e, _)| (*s, *e) != (shape, element)) {
        // Freed before the next tensors are allocated.
        *prepared = None;
        let passes = passes(Cpu::new(), shape, element).map_err(|error| error.to_string())?;
        *prepared = Some((shape, element, passes));
    }
    let (_, _, passes) = prepared.as_mut().expect("prepared above");
    let times = (0..calls)
        .map(|_| pass::milliseconds(|| passes.run(op)).map_err(|error| error.to_string()))
        .collect::<std::result::Result<Vec<f64>, String>>()?;
    let mut answer = json!({ "ms": times });
    if request["results"] == true {
        let [y, dx, dweight, dbias] = passes.results();
        answer["results"] = json!({ "y": y, "dx": dx, "dweight": dweight, "dbias": dbias });
    }
    Ok(answer)
}

/// What is timed.
struct Case {
    op: Op,
    dimensions: [usize; 4],
    layout: Layout,
    element: Dtype,
}

impl Case {
    fn json(&self, figures: &Figures) -> Value {
        json!({
            "op": self.op.name(),
            "shape": self.dimensions.map(|size| size.to_string()).join("x"),
            "layout": self.layout.name(),
            "element": self.element.name(),
            "threads": rayon::current_num_threads(),
            "rounds": figures.pass.len(),
            "median_ms": percentile(&figures.pass, 0.5),
            "p10_ms": percentile(&figures.pass, 0.1),
            "p90_ms": percentile(&figures.pass, 0.9),
            "copy_ms": figures.copy_ms(),
            "memcpy_ms": percentile(&figures.memcpy, 0.5),
            "streaming_copy_ms": percentile(&figures.streaming, 0.5),
        })
    }

    fn row(&self, figures: &Figures) -> String {
        let shape = self.dimensions.map(|size| size.to_string()).join("x");
        let [p10, median, p90] = [0.1, 0.5, 0.9].map(|share| percentile(&figures.pass, share));
        format!(
            "{:<8} {:<7} {:<6} {shape:<16} {median:>9.3} {p10:>5.2} {p90:>5.2} {:>10.3} {:>15.2}",
            self.op.name(),
            self.element.name(),
            self.layout.name(),
            figures.copy_ms(),
            figures.ratio()
        )
    }
}

/// Milliseconds of each round, sorted.
#[derive(Default)]
struct Figures {
    pass: Vec<f64>,
    memcpy: Vec<f64>,
    streaming: Vec<f64>,
}

impl Figures {
    /// Times a pass and both copies of each element, in turns.
    fn measure(all: &mut [Box<dyn Passes>], op: Op, rounds: usize) -> Result<Vec<Self>> {
        let mut figures: Vec<Self> = all.iter().map(|_| Self::default()).collect();
        for _ in 0..rounds {
            for (passes, figures) in all.iter_mut().zip(&mut figures) {
                figures.memcpy.push(second_run(|| passes.memcpy())?);
                figures.streaming.push(second_run(|| passes.streaming_copy())?);
                figures.pass.push(second_run(|| passes.run(op))?);
            }
        }
        for Self {
            pass,
            memcpy,
            streaming,
        } in &mut figures
        {
            for times in [pass, memcpy, streaming] {
                times.sort_by(f64::total_cmp);
            }
        }
        Ok(figures)
    }

    /// The median of the faster copy.
    fn copy_ms(&self) -> f64 {
        percentile(&self.memcpy, 0.5).min(percentile(&self.streaming, 0.5))
    }

    fn ratio(&self) -> f64 {
        percentile(&self.pass, 0.5) / self.copy_ms()
    }
}

/// Runs twice and times the second run, which finds the caches as the first one left them and not as another program did.
fn second_run(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    pass::milliseconds(work)
}

/// The time that a `share` of all stay within; `sorted` has at least one.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn shape([batch, channels, height, width]: [usize; 4], layout: Layout) -> Shape {
    Shape {
        layout,
        ..Shape::nchw(batch, channels, height, width)
    }
}

/// Reads `32x64x56x56`.
fn dimensions(text: &str) -> std::result::Result<[usize; 4], String> {
    let sizes: Option<Vec<usize>> = text.split('x').map(|size| size.parse().ok()).collect();
    sizes
        .and_then(|sizes| sizes.try_into().ok())
        .ok_or("expected four numbers, such as 32x64x56x56".into())
}

/// Reads one of `values` by its name.
fn named<T, const N: usize>(values: [T; N], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + std::str::FromStr + Send + Sync + 'static,
{
    PossibleValuesParser::new(values.map(name)).map(move |text| {
        *values
            .iter()
            .find(|&&value| name(value) == text)
            .expect("the parser lets only known names pass")
    })
}
