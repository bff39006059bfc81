//! The kernels and their instantiations: which source, and the constants it is compiled with.

use super::resident::{self, Resident};
use super::tiling::{self, Walk};
use super::tuning;
use crate::element::Dtype;
use crate::epilogue::Epilogue;

/// A kernel's source with its headers, and the SHA-256 of it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) text: &'static str,
    pub(super) hash: &'static str,
}

mod sources {
    use super::Source;
    include!(concat!(env!("OUT_DIR"), "/kernel_sources.rs"));
}

/// A kernel under `kernels/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Mean and variance per channel.
    Statistics,
    /// Normalise, scale, shift, epilogue; running statistics.
    Apply,
    /// Sums over the gradient per channel.
    BackwardReduce,
    /// Gradient at the input.
    BackwardApply,
    /// A whole forward pass by batch statistics, with each strip of channels held on chip.
    ResidentForward,
    /// A whole backward pass by batch statistics, likewise.
    ResidentBackward,
    /// Statistics of all ranks from those of each.
    MergeStatistics,
    /// Sums over the gradient of all ranks from those of each.
    MergeSums,
    /// Running statistics by those of all ranks.
    UpdateRunning,
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Kernel; 9] = [
        Kernel::Statistics,
        Kernel::Apply,
        Kernel::BackwardReduce,
        Kernel::BackwardApply,
        Kernel::ResidentForward,
        Kernel::ResidentBackward,
        Kernel::MergeStatistics,
        Kernel::MergeSums,
        Kernel::UpdateRunning,
    ];

    /// The name of the file under `kernels/`, and of the function in it.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::Statistics => "statistics",
            Kernel::Apply => "apply",
            Kernel::BackwardReduce => "backward_reduce",
            Kernel::BackwardApply => "backward_apply",
            Kernel::ResidentForward => "resident_forward",
            Kernel::ResidentBackward => "resident_backward",
            Kernel::MergeStatistics => "merge_statistics",
            Kernel::MergeSums => "merge_sums",
            Kernel::UpdateRunning => "update_running",
        }
    }

    /// Tensors that it reads.
    pub(super) fn tensors_read(self, epilogue: Epilogue, batch_statistics: bool) -> u64 {
        let residual = u64::from(epilogue == Epilogue::AddRelu);
        match self {
            Kernel::Statistics => 1,
            Kernel::Apply | Kernel::ResidentForward => 1 + residual,
            Kernel::BackwardReduce | Kernel::ResidentBackward => 2 + residual,
            // Without statistics x is needed only to compute a relu's mask again.
            Kernel::BackwardApply => 1 + residual + u64::from(batch_statistics || epilogue == Epilogue::Relu),
            Kernel::MergeStatistics | Kernel::MergeSums | Kernel::UpdateRunning => 0,
        }
    }

    /// Whether it walks no tensor, and has one thread per channel: the kernels that join what ranks tell each other.
    pub const fn per_channel(self) -> bool {
        matches!(
            self,
            Kernel::MergeStatistics | Kernel::MergeSums | Kernel::UpdateRunning
        )
    }

    /// What it can be told at compile time beside its walk: epilogue, `stores_gradient`, `batch_statistics`.
    fn variants(self) -> Vec<(Epilogue, bool, bool)> {
        let each = |variants: &[(bool, bool)]| {
            Epilogue::ALL
                .iter()
                .flat_map(|&epilogue| variants.iter().map(move |&(stores, batch)| (epilogue, stores, batch)))
                .collect()
        };
        match self {
            Kernel::Statistics | Kernel::MergeStatistics | Kernel::MergeSums | Kernel::UpdateRunning => {
                vec![(Epilogue::Identity, false, false)]
            }
            Kernel::Apply | Kernel::ResidentForward | Kernel::ResidentBackward => each(&[(false, false)]),
            Kernel::BackwardReduce => each(&[(false, false), (true, false)]),
            Kernel::BackwardApply => each(&[(false, false), (false, true)]),
        }
    }

    /// Block sizes, vectors under way, and what only resident kernels have.
    fn launches(
        self,
        dtype: Dtype,
        walk: Walk,
        vector: u32,
        wide_index: bool,
        epilogue: Epilogue,
        batch_statistics: bool,
    ) -> Vec<(u32, u32, Option<Resident>)> {
        let tensors_read = self.tensors_read(epilogue, batch_statistics);
        match self {
            Kernel::ResidentForward | Kernel::ResidentBackward => {
                let variants = resident::variants(dtype, walk, vector, wide_index);
                let unroll = resident::unroll(tensors_read);
                variants
                    .map(|(threads, resident)| (threads, unroll, Some(resident)))
                    .collect()
            }
            _ => tuning::BLOCK_SIZES
                .map(|threads| (threads as u32, tiling::unroll(tensors_read), None))
                .into(),
        }
    }

    pub(super) const fn source(self) -> &'static Source {
        match self {
            Kernel::Statistics => &sources::STATISTICS,
            Kernel::Apply => &sources::APPLY,
            Kernel::BackwardReduce => &sources::BACKWARD_REDUCE,
            Kernel::BackwardApply => &sources::BACKWARD_APPLY,
            Kernel::ResidentForward => &sources::RESIDENT_FORWARD,
            Kernel::ResidentBackward => &sources::RESIDENT_BACKWARD,
            Kernel::MergeStatistics => &sources::MERGE_STATISTICS,
            Kernel::MergeSums => &sources::MERGE_SUMS,
            Kernel::UpdateRunning => &sources::UPDATE_RUNNING,
        }
    }
}

/// One kernel with its compile-time constants: what is compiled, cached and loaded as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Instantiation {
    /// The kernel.
    pub kernel: Kernel,
    /// What tensors hold.
    pub dtype: Dtype,
    /// How it walks a tensor.
    pub walk: Walk,
    /// Elements per vector.
    pub vector: u32,
    /// Vectors a thread has under way at a time.
    pub unroll: u32,
    /// Threads per block.
    pub threads: u32,
    /// Whether offsets need 64 bits.
    pub wide_index: bool,
    /// What is fused.
    pub epilogue: Epilogue,
    /// Backward reduce: whether it writes dx (and dz) too.
    pub stores_gradient: bool,
    /// Backward apply: whether the gradient flows through the statistics.
    pub batch_statistics: bool,
    /// Resident kernels: how blocks work together.
    pub resident: Option<Resident>,
}

impl Instantiation {
    /// Every instantiation that a plan can ask for.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for kernel in Kernel::ALL {
            if kernel.per_channel() {
                all.extend([Dtype::F32, Dtype::F64].map(|dtype| Self::per_channel(kernel, dtype)));
                continue;
            }
            for (epilogue, stores_gradient, batch_statistics) in kernel.variants() {
                for dtype in Dtype::ALL {
                    for ((walk, vector), wide_index) in
                        walks(dtype).flat_map(|walk| [false, true].map(|wide_index| (walk, wide_index)))
                    {
                        let launches = kernel.launches(dtype, walk, vector, wide_index, epilogue, batch_statistics);
                        all.extend(launches.into_iter().map(|(threads, unroll, resident)| Instantiation {
                            kernel,
                            dtype,
                            walk,
                            vector,
                            unroll,
                            threads,
                            wide_index,
                            epilogue,
                            stores_gradient,
                            batch_statistics,
                            resident,
                        }));
                    }
                }
            }
        }
        all
    }

    /// A kernel that walks no tensor, for parameters of this type.
    pub(super) const fn per_channel(kernel: Kernel, param: Dtype) -> Self {
        Instantiation {
            kernel,
            dtype: param,
            walk: Walk::Planes,
            vector: 1,
            unroll: 1,
            threads: tuning::BLOCK_SIZES[0] as u32,
            wide_index: false,
            epilogue: Epilogue::Identity,
            stores_gradient: false,
            batch_statistics: false,
            resident: None,
        }
    }

    /// Whether devices of this compute capability, times ten, have what it is made of: clusters and bulk copies need 9.0.
    pub fn runs_on(&self, architecture: u32) -> bool {
        self.resident.is_none_or(|resident| resident.runs_on(architecture))
    }

    /// The CUDA C++ that is compiled: the kernel's file and its headers in one text.
    pub const fn source(&self) -> &'static str {
        self.kernel.source().text
    }

    /// The compiler's options that make this instantiation of the source.
    pub fn definitions(&self) -> Vec<String> {
        let element = match self.dtype {
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "float",
            Dtype::F64 => "double",
        };
        let real = match (self.kernel, self.dtype.param()) {
            // What ranks tell each other is joined in double precision: see kernels/message.cuh.
            (Kernel::MergeStatistics | Kernel::MergeSums, _) | (_, Dtype::F64) => "double",
            _ => "float",
        };
        let epilogue = match self.epilogue {
            Epilogue::Identity => 0,
            Epilogue::Relu => 1,
            Epilogue::AddRelu => 2,
        };
        vec![
            format!("-DELEMENT={element}"),
            format!("-DREAL={real}"),
            format!("-DINDEX={}", if self.wide_index { "u64" } else { "u32" }),
            format!("-DVECTOR={}", self.vector),
            format!("-DUNROLL={}", self.unroll),
            format!("-DTHREADS={}", self.threads),
            format!("-DWALK_COLUMNS={}", u8::from(self.walk == Walk::Columns)),
            format!("-DEDGES={}", u8::from(self.walk == Walk::PlanesWithEdges)),
            format!("-DEPILOGUE={epilogue}"),
            format!("-DSTORES_GRADIENT={}", u8::from(self.stores_gradient)),
            format!("-DBATCH_STATISTICS={}", u8::from(self.batch_statistics)),
        ]
        .into_iter()
        .chain(self.resident.iter().flat_map(Resident::definitions))
        .collect()
    }
}

/// The walks over tensors of this type, each with the vectors it is used with.
fn walks(dtype: Dtype) -> impl Iterator<Item = (Walk, u32)> {
    let widest = tiling::VECTOR_BYTES as u32 / dtype.size() as u32;
    let vectors = move || std::iter::successors(Some(widest), |&vector| (vector > 1).then_some(vector / 2));
    let with_edges = vectors().filter(|&vector| vector > 1);
    (vectors().map(|vector| (Walk::Planes, vector)))
        .chain(with_edges.map(|vector| (Walk::PlanesWithEdges, vector)))
        .chain(vectors().map(|vector| (Walk::Columns, vector)))
}

impl std::fmt::Display for Instantiation {
    /// The kernel's name and what tells this instantiation from others, in a few words.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.kernel.per_channel() {
            return write!(f, "{} <{}>", self.kernel.name(), self.dtype);
        }
        write!(
            f,
            "{} <{}, {} x {}, {}",
            self.kernel.name(),
            self.walk.name(),
            self.vector,
            self.dtype,
            self.epilogue
        )?;
        if let Some(resident) = &self.resident {
            write!(f, ", {resident}")?;
        }
        write!(f, ">")
    }
}
