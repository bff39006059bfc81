//! Synchronised batch norm over GPUs, of one machine or several: one process for each GPU, with NCCL between them.
//!
//!     cargo build --release --features nccl --example nccl_ranks
//!     torchrun --no-python --nproc-per-node 4 target/release/examples/nccl_ranks
//!     mpirun -n 4 target/release/examples/nccl_ranks
//!     srun -n 4 --gpus-per-task 1 target/release/examples/nccl_ranks
//!     target/release/examples/nccl_ranks --spawn 4      # starts the processes itself, on this machine
//!     target/release/examples/nccl_ranks                # one rank alone
//!
//! Each rank takes a batch of its own size, and every rank checks its part of y and dx, and the gradients at weight and bias
//! added up over the ranks, against one module on the CPU that has the whole batch.
//!
//! Ranks find each other by the environment variables of torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
//! `MASTER_PORT`), Open MPI or Slurm; over several machines `MASTER_ADDR` must name rank 0's. Rank 0 makes NCCL's unique id
//! and hands it to the others over TCP, at the port after `MASTER_PORT`, because torchrun may listen at that one itself.
//!
//! A rank that never comes is no error to NCCL: the others' GPUs would wait for good. So each process has a watchdog that ends
//! it when a step is not done in time.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, ExitCode};
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use batchnorm_cuda::cudarc::driver::CudaContext;
use batchnorm_cuda::cudarc::nccl::safe::{Comm, Id, ReduceOp};
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cpu, Cuda, Shape, SyncBatchNorm, cuda};
use clap::Parser;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long ranks wait for each other, to meet first and then for each step.
const PATIENCE: Duration = Duration::from_secs(60);

/// Largest difference from the whole batch on the CPU; the numbers are of size 1.
const LIMIT: f32 = 1e-5;

/// By what a launcher numbers the ranks.
const LAUNCHED: [&str; 4] = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"];

/// Runs synchronised batch norm over GPUs.
#[derive(Parser)]
struct Arguments {
    /// Start so many ranks on this machine, one for each GPU.
    #[arg(long)]
    spawn: Option<usize>,
}

fn main() -> ExitCode {
    if let Err(reason) = cuda::is_available().and_then(|()| cuda::is_nccl_available()) {
        println!("Nothing was computed, because this machine lacks what NCCL needs:\n{reason}");
        // A launcher must not take a rank that is missing for one that is done.
        let alone = !LAUNCHED.iter().any(|name| std::env::var_os(name).is_some());
        return if alone { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let done = match Arguments::parse().spawn {
        Some(ranks) => spawn(ranks),
        None => Place::of_this_process().and_then(|place| run(&place)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nccl_ranks: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program once for each rank, as torchrun would.
fn spawn(ranks: usize) -> Outcome<()> {
    let program = std::env::current_exe()?;
    let started = (0..ranks)
        .map(|rank| {
            Command::new(&program)
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.to_string())
                .spawn()
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut failed = Vec::new();
    for (rank, mut process) in started.into_iter().enumerate() {
        if !process.wait()?.success() {
            failed.push(rank);
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("ranks {failed:?} failed").into()),
    }
}

/// Where a process stands among the ranks.
struct Place {
    rank: usize,
    ranks: usize,
    /// Number of the GPU on this machine.
    device: usize,
    /// Where rank 0 hands out the unique id.
    address: (String, u16),
}

impl Place {
    fn of_this_process() -> Outcome<Self> {
        let variable = |names: &[&str]| names.iter().find_map(|name| std::env::var(name).ok());
        let number = |names: &[&str], default: usize| -> Outcome<usize> {
            let Some(text) = variable(names) else {
                return Ok(default);
            };
            text.parse()
                .map_err(|_| format!("{names:?}: expected a number, got {text:?}").into())
        };
        let rank = number(&LAUNCHED, 0)?;
        let ranks = number(&["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"], 1)?;
        let devices = CudaContext::device_count()? as usize;
        let local = number(
            &[
                "LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "MPI_LOCALRANKID",
                "SLURM_LOCALID",
            ],
            rank,
        )?;
        let port = number(&["MASTER_PORT"], 29_500)? + 1;
        Ok(Self {
            rank,
            ranks,
            // A launcher may show each process its own GPU alone.
            device: local % devices.max(1),
            address: (
                variable(&["MASTER_ADDR"]).unwrap_or_else(|| "127.0.0.1".into()),
                u16::try_from(port).map_err(|_| format!("MASTER_PORT: {port} is no port"))?,
            ),
        })
    }

    /// NCCL's unique id, the same for every rank.
    fn unique_id(&self) -> Outcome<Id> {
        let end = Instant::now() + PATIENCE;
        if self.rank == 0 {
            let id = Id::new().map_err(|error| format!("ncclGetUniqueId: {:?}", error.0))?;
            self.hand_out(&id.internal().map(|byte| byte as u8), end)?;
            return Ok(id);
        }
        let mut bytes = [0; 128];
        loop {
            match TcpStream::connect((&*self.address.0, self.address.1)) {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.read_exact(&mut bytes)?;
                    return Ok(Id::uninit(bytes.map(|byte| byte as _)));
                }
                // Rank 0 may not be there yet.
                Err(error) if Instant::now() > end => {
                    return Err(format!("no rank 0 at {:?} within {PATIENCE:?}: {error}", self.address).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Sends the id to as many ranks as there are beside this one.
    fn hand_out(&self, bytes: &[u8], end: Instant) -> Outcome<()> {
        if self.ranks == 1 {
            return Ok(());
        }
        let listener = TcpListener::bind(("0.0.0.0", self.address.1))?;
        listener.set_nonblocking(true)?;
        let mut missing = self.ranks - 1;
        while missing > 0 {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.write_all(bytes)?;
                    missing -= 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(format!("{missing} ranks did not ask for the unique id: {error}").into()),
            }
        }
        Ok(())
    }
}

/// Ends the process unless it hears something within [`PATIENCE`] each time, until it is dropped.
fn watchdog(rank: usize) -> Sender<()> {
    let (alive, heard) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(()) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    eprintln!("rank {rank}: no step within {PATIENCE:?}; another rank is gone or stuck");
                    std::process::exit(3);
                }
            }
        }
    });
    alive
}

const CHANNELS: usize = 8;

/// Rank r has r + 1 images.
fn shape(rank: usize) -> Shape {
    Shape::nchw(rank + 1, CHANNELS, 14, 14)
}

/// Numbers between -2 and 2, other ones for each rank and tensor.
fn values(rank: usize, seed: usize) -> Vec<f32> {
    (0..(rank + 1) * CHANNELS * 14 * 14)
        .map(|i| ((i * 7919 + (2 * rank + seed) * 104_729) as f64 * 0.618 % 4.0 - 2.0) as f32)
        .collect()
}

fn run(place: &Place) -> Outcome<()> {
    let &Place {
        rank, ranks, device, ..
    } = place;
    // Has a time limit of its own, and says whom it waited for.
    let id = place.unique_id()?;
    let alive = watchdog(rank);
    let stream = CudaContext::new(device)?.new_stream()?;
    let device = Cuda::on_stream(stream.clone())?;
    // On the very stream of the module, so that its work is ordered with the kernels'.
    let comm = Comm::from_rank(stream, rank, ranks, id).map_err(|error| format!("ncclCommInitRank: {:?}", error.0))?;
    println!("rank {rank} of {ranks}: {}", device.limits().name);
    alive.send(())?;

    // All layers of a network share the communicator, by a reference or an Rc.
    let module: BatchNorm2d<Cuda> = BatchNorm2d::new(&device, BatchNorm2dConfig::new(CHANNELS))?;
    let mut bn = SyncBatchNorm::new(module, &comm)?;
    let mut saved = bn.prepare::<f32>(shape(rank))?;
    let mut gradients = bn.module().gradients()?;
    let (x, dy) = (device.upload(&values(rank, 0))?, device.upload(&values(rank, 1))?);
    let mut y = device.zeros::<f32>(x.len())?;
    let mut dx = device.zeros::<f32>(x.len())?;
    bn.forward_train(&x, &mut y, &mut saved)?;
    bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)?;
    // These are sums over this rank's batch, as in PyTorch: the optimiser wants all ranks'.
    for gradient in [&mut gradients.weight, &mut gradients.bias] {
        comm.all_reduce_in_place(gradient, &ReduceOp::Sum)
            .map_err(|error| format!("ncclAllReduce: {:?}", error.0))?;
    }
    saved.check()?;
    alive.send(())?;

    let whole = whole_batch(ranks)?;
    let before: usize = (0..rank).map(|rank| values(rank, 0).len()).sum();
    let part = before..before + x.len();
    let mut far = false;
    for (what, got, expected) in [
        ("y", device.read(&y)?, &whole.y[part.clone()]),
        ("dx", device.read(&dx)?, &whole.dx[part]),
        ("weight's gradient", device.read(&gradients.weight)?, &whole.dweight),
        ("bias's gradient", device.read(&gradients.bias)?, &whole.dbias),
    ] {
        let size = expected.iter().fold(1.0f32, |size, value| size.max(value.abs()));
        let differences = got
            .iter()
            .zip(expected)
            .map(|(got, expected)| (got - expected).abs() / size);
        let difference = differences.fold(0.0, f32::max);
        println!("rank {rank}: {what} is off by {difference:.1e}");
        far |= got.len() != expected.len() || difference > LIMIT || difference.is_nan();
    }
    match far {
        false => Ok(()),
        true => Err(format!("rank {rank} differs from the whole batch by more than {LIMIT:e}").into()),
    }
}

struct WholeBatch {
    y: Vec<f32>,
    dx: Vec<f32>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

/// The same step on the CPU, by one module that has all ranks' images.
fn whole_batch(ranks: usize) -> Outcome<WholeBatch> {
    let all = |seed| (0..ranks).flat_map(|rank| values(rank, seed)).collect::<Vec<f32>>();
    let (x, dy) = (all(0), all(1));
    let images = (0..ranks).map(|rank| rank + 1).sum();
    let mut bn: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(CHANNELS))?;
    let mut saved = bn.prepare::<f32>(Shape {
        batch: images,
        ..shape(0)
    })?;
    let mut gradients = bn.gradients()?;
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    bn.forward_train(&x, &mut y, &mut saved)?;
    bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)?;
    Ok(WholeBatch {
        y,
        dx,
        dweight: gradients.weight,
        dbias: gradients.bias,
    })
}
