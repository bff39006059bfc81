//! What all modules of one context share: its limits, its loaded kernels, its plans.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use cudarc::driver::sys::CUfunction_attribute_enum as FunctionAttribute;
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use super::compile::{Compiled, compile};
use super::disk_cache::DiskCache;
use super::driver_error::driver_error;
use super::kernel::Instantiation;
use super::limits::{DeviceLimits, largest_cluster};
use super::plan::{Choice, KernelLaunch, Plan, Problem, Resident};
use super::resident::even_teams;
use crate::error::{OLDEST_ARCHITECTURE, Result, Unavailable};

/// Plans kept per context. A program that meets more shapes than this plans some of them again.
const PLANS_KEPT: usize = 1024;

/// Blocks of a cluster that every device with clusters allows.
const LARGEST_PORTABLE_CLUSTER: u32 = 8;

/// Bytes per second, of a device whose driver does not say: some share the host's memory.
const UNKNOWN_BANDWIDTH: u64 = 250_000_000_000;

/// What compiling and loading kernels has cost so far in a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompileReport {
    /// Kernels compiled by NVRTC: a cold start.
    pub compiled: usize,
    /// Kernels that the disk cache had: a warm start.
    pub from_disk: usize,
    /// Time spent in NVRTC and the disk cache.
    pub compile_time: Duration,
    /// Time the driver took to load the kernels.
    pub load_time: Duration,
}

/// A plan with its kernels loaded.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) plan: Plan,
    /// One per launch of the plan.
    pub(super) functions: Vec<CudaFunction>,
}

/// A kernel that is loaded, or being compiled by whoever holds the lock.
type Slot = Arc<Mutex<Option<CudaFunction>>>;

/// The shared half of a [`Cuda`](super::Cuda).
#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) limits: DeviceLimits,
    cache: DiskCache,
    kernels: Mutex<HashMap<Instantiation, Slot>>,
    prepared: RwLock<HashMap<(Problem, Choice), Arc<Prepared>>>,
    report: Mutex<CompileReport>,
}

impl Device {
    /// The device of a context, shared with everyone who has asked for it before with the same cache.
    pub(super) fn shared(context: &Arc<CudaContext>, cache: &DiskCache) -> Result<Arc<Self>> {
        static DEVICES: Mutex<Vec<(Weak<CudaContext>, Weak<Device>)>> = Mutex::new(Vec::new());
        let mut devices = lock(&DEVICES);
        devices.retain(|(_, device)| device.strong_count() > 0);
        // Contexts are told apart by address: two of one device compare equal, but do not order each other's work. Nobody
        // else's device is held even for a moment, or this thread might be the last to hold it and have to unload it.
        let known = devices
            .iter()
            .filter(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(context)))
            .filter_map(|(_, device)| device.upgrade())
            .find(|device| device.cache == *cache);
        match known {
            Some(device) => Ok(device),
            None => {
                let device = Arc::new(Device::new(context, cache)?);
                devices.push((Arc::downgrade(context), Arc::downgrade(&device)));
                Ok(device)
            }
        }
    }

    fn new(context: &Arc<CudaContext>, cache: &DiskCache) -> Result<Self> {
        let limits = read_limits(context)?;
        if limits.architecture < OLDEST_ARCHITECTURE {
            return Err(Unavailable::DeviceTooOld {
                name: limits.name,
                architecture: limits.architecture,
            }
            .into());
        }
        Ok(Self {
            context: context.clone(),
            limits,
            cache: cache.clone(),
            kernels: Mutex::default(),
            prepared: RwLock::default(),
            report: Mutex::default(),
        })
    }

    pub(super) fn report(&self) -> CompileReport {
        *lock(&self.report)
    }

    /// The plan for a problem, with its kernels compiled and loaded.
    pub(super) fn prepare(&self, problem: &Problem, choice: &Choice) -> Result<Arc<Prepared>> {
        let key = (*problem, *choice);
        if let Some(prepared) = self.prepared.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(prepared.clone());
        }
        let mut prepared = self.load_plan(problem, choice)?;
        if !self.fit(&mut prepared)? {
            prepared = self.load_plan(problem, &Choice::GENERAL)?;
        }
        let prepared = Arc::new(prepared);
        let mut all = self.prepared.write().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= PLANS_KEPT {
            all.clear();
        }
        all.insert(key, prepared.clone());
        Ok(prepared)
    }

    fn load_plan(&self, problem: &Problem, choice: &Choice) -> Result<Prepared> {
        let plan = Plan::chosen(problem, &self.limits, choice)?;
        let functions = plan
            .kernels
            .iter()
            .map(|launch| self.function(&launch.instantiation))
            .collect::<Result<_>>()?;
        Ok(Prepared { plan, functions })
    }

    /// Teams of a resident launch that run at the same time. Plans go by the device's limits, but only the driver knows how
    /// its multiprocessors are grouped, and what of it is left to this program.
    fn running_teams(&self, launch: &KernelLaunch, function: &CudaFunction, resident: &Resident) -> Result<u64> {
        let shared = launch.shared_bytes as usize;
        let teams = self.context.bind_to_thread().and_then(|()| {
            if resident.team.cluster() > 1 {
                let stream = self.context.default_stream();
                return function
                    .occupancy_max_active_clusters(launch.config(), &stream)
                    .map(u64::from);
            }
            function
                .occupancy_max_active_blocks_per_multiprocessor(launch.block(), shared, None)
                .map(|blocks| u64::from(blocks) * u64::from(self.limits.multiprocessors) / launch.tiling.splits)
        });
        teams.map_err(|error| driver_error("asking how many blocks run at a time", error))
    }

    /// Launches as many teams as run at the same time: more would begin when the others are done with all of their strips.
    /// Whether there is room for one at all.
    fn fit(&self, prepared: &mut Prepared) -> Result<bool> {
        for (launch, function) in prepared.plan.kernels.iter_mut().zip(&prepared.functions) {
            let Some(resident) = launch.instantiation.resident else {
                continue;
            };
            let running = self.running_teams(launch, function, &resident)?;
            if running == 0 {
                return Ok(false);
            }
            let teams = u64::from(launch.grid) / launch.tiling.splits;
            if running < teams {
                launch.grid = (even_teams(launch.tiling.strips, running) * launch.tiling.splits) as u32;
            }
        }
        Ok(true)
    }

    /// A loaded kernel. Different kernels may be compiled at the same time, each only once.
    fn function(&self, instantiation: &Instantiation) -> Result<CudaFunction> {
        let slot = lock(&self.kernels).entry(*instantiation).or_default().clone();
        let mut loaded = lock(&slot);
        if let Some(function) = &*loaded {
            return Ok(function.clone());
        }
        let function = self.compile_and_load(instantiation)?;
        *loaded = Some(function.clone());
        Ok(function)
    }

    fn compile_and_load(&self, instantiation: &Instantiation) -> Result<CudaFunction> {
        let compiled = self.compile(instantiation, &self.cache)?;
        let from_disk = compiled.from_disk;
        match self.load(instantiation, compiled) {
            // The file was what we once wrote, yet this driver does not take it.
            Err(_) if from_disk => self.load(instantiation, self.compile(instantiation, &DiskCache::Off)?),
            loaded => loaded,
        }
    }

    fn compile(&self, instantiation: &Instantiation, cache: &DiskCache) -> Result<Compiled> {
        let start = Instant::now();
        let compiled = compile(instantiation, self.limits.architecture, cache)?;
        let mut report = lock(&self.report);
        report.compile_time += start.elapsed();
        if compiled.from_disk {
            report.from_disk += 1;
        } else {
            report.compiled += 1;
        }
        Ok(compiled)
    }

    fn load(&self, instantiation: &Instantiation, compiled: Compiled) -> Result<CudaFunction> {
        let start = Instant::now();
        let module = self
            .context
            .load_module(Ptx::from_binary(compiled.image))
            .map_err(|error| driver_error("loading a kernel", error))?;
        let function = module
            .load_function(instantiation.kernel.name())
            .map_err(|error| driver_error("looking up a kernel", error))?;
        if let Some(resident) = &instantiation.resident {
            self.allow_resident(&function, resident)?;
        }
        lock(&self.report).load_time += start.elapsed();
        Ok(function)
    }
}

impl Device {
    /// A resident kernel takes more shared memory than a block gets unasked, and its cluster may be larger than every device
    /// allows.
    fn allow_resident(&self, function: &CudaFunction, resident: &Resident) -> Result<()> {
        let shared = self.limits.shared_memory_per_block as i32;
        let mut attributes = vec![
            (
                FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared,
            ),
            // Percent of a multiprocessor's own memory that is shared memory and not cache.
            (
                FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                100,
            ),
        ];
        if resident.team.cluster() > LARGEST_PORTABLE_CLUSTER {
            attributes.push((
                FunctionAttribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
                1,
            ));
        }
        // Setting an attribute does not bind the context by itself.
        self.context
            .bind_to_thread()
            .and_then(|()| {
                attributes
                    .into_iter()
                    .try_for_each(|(attribute, value)| function.set_attribute(attribute, value))
            })
            .map_err(|error| driver_error("setting a kernel's attributes", error))
    }
}

fn read_limits(context: &Arc<CudaContext>) -> Result<DeviceLimits> {
    let attribute = |attribute| {
        context
            .attribute(attribute)
            .map(|value| value as u32)
            .map_err(|error| driver_error("reading a device attribute", error))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let architecture = major * 10 + minor;
    let clusters = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? != 0;
    // In kHz and bits; memory moves data at both edges of its clock.
    let memory_clock = u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?) * 1000;
    let memory_bus = u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?) / 8;
    Ok(DeviceLimits {
        name: context
            .name()
            .map_err(|error| driver_error("reading the device's name", error))?,
        architecture,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        threads_per_multiprocessor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_memory_per_multiprocessor: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        shared_memory_reserved_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?,
        blocks_per_multiprocessor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR)?,
        largest_cluster: largest_cluster(architecture, clusters),
        cooperative_launch: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        memory_bandwidth: match 2 * memory_clock * memory_bus {
            0 => UNKNOWN_BANDWIDTH,
            known => known,
        },
        l2_cache: u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        grid: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
    })
}

/// No state under these locks is left half-made by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::cuda::plan::{Alignment, Operation};
    use crate::{BatchNorm2d, BatchNorm2dConfig, Cuda, Dtype, Saved, Shape};

    /// A context of the stand-in, with a device that nobody else has.
    fn cuda() -> Cuda {
        emulator::install();
        let context = CudaContext::new(emulator::ordinal("small-75")).expect("the stand-in's device");
        let stream = context.default_stream();
        Cuda::with_cache(stream, DiskCache::Off).expect("the stand-in's device")
    }

    /// From now on the device runs these operations with 64-bit offsets, which it would for 2^31 elements and more.
    fn widen(cuda: &Cuda, shape: Shape) {
        for operation in [Operation::Train, Operation::Eval, Operation::Backward] {
            let problem = Problem {
                alignment: Alignment::FULL,
                ..Problem::new(operation, shape, Dtype::F32)
            };
            let mut plan = Plan::chosen(&problem, &cuda.device.limits, &cuda.choice).expect("a plan");
            for launch in &mut plan.kernels {
                assert!(!launch.instantiation.wide_index);
                launch.instantiation.wide_index = true;
            }
            let functions = plan
                .kernels
                .iter()
                .map(|launch| cuda.device.function(&launch.instantiation).expect("a kernel"))
                .collect();
            let mut prepared = cuda.device.prepared.write().expect("no test has panicked here");
            prepared.insert((problem, cuda.choice), Arc::new(Prepared { plan, functions }));
        }
    }

    /// Forward, evaluation and backward: all their results.
    fn results(cuda: &Cuda, shape: Shape) -> Vec<Vec<f32>> {
        let values: Vec<f32> = (0..shape.len().unwrap()).map(|i| (i * 31 % 97) as f32 - 40.0).collect();
        let mut bn: BatchNorm2d<Cuda> = BatchNorm2d::new(cuda, BatchNorm2dConfig::new(shape.channels)).unwrap();
        let mut saved: Saved<Cuda, f32> = bn.prepare(shape).unwrap();
        let mut gradients = bn.gradients().unwrap();
        let x = cuda.upload(&values).unwrap();
        let mut dx = cuda.zeros::<f32>(values.len()).unwrap();
        let y = bn.forward_train_alloc(&x, &mut saved).unwrap();
        let evaluated = bn.forward_eval_alloc(shape, &x).unwrap();
        bn.backward(&x, &evaluated, &mut saved, &mut dx, &mut gradients)
            .unwrap();
        [&y, &evaluated, &dx, &gradients.weight, &gradients.bias]
            .map(|buffer| cuda.to_vec(buffer.as_view()).unwrap())
            .into()
    }

    #[test]
    fn wide_offsets_give_the_same_bits() {
        for shape in [
            Shape::nchw(3, 4, 8, 8),                  // planes
            Shape::nchw(2, 3, 11, 7),                 // planes with edges
            Shape::nchw(5, 8, 7, 7),                  // columns of planes
            Shape::nchw(3, 12, 5, 5).channels_last(), // columns of pixels
        ] {
            let narrow = results(&cuda(), shape);
            let wide_device = cuda();
            widen(&wide_device, shape);
            let compiled = wide_device.compile_report().compiled;
            assert_eq!(results(&wide_device, shape), narrow, "{shape}");
            // The pass ran what was put there: nothing else was compiled for it.
            assert_eq!(wide_device.compile_report().compiled, compiled, "{shape}");
        }
    }

    #[test]
    fn plans_are_kept_up_to_a_bound() {
        let cuda = cuda();
        let problem = |height| Problem::new(Operation::Eval, Shape::nchw(1, 1, height, 4), Dtype::F32);
        for height in 1..=PLANS_KEPT + 3 {
            cuda.device.prepare(&problem(height), &cuda.choice).unwrap();
        }
        let kept = cuda.device.prepared.read().unwrap().len();
        assert!((1..=PLANS_KEPT).contains(&kept), "{kept}");
    }
}
