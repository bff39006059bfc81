//! The kernels and their instantiations: which source, and the constants it is compiled with.

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
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Kernel; 4] = [
        Kernel::Statistics,
        Kernel::Apply,
        Kernel::BackwardReduce,
        Kernel::BackwardApply,
    ];

    /// The name of the file under `kernels/`, and of the function in it.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::Statistics => "statistics",
            Kernel::Apply => "apply",
            Kernel::BackwardReduce => "backward_reduce",
            Kernel::BackwardApply => "backward_apply",
        }
    }

    pub(super) const fn source(self) -> &'static Source {
        match self {
            Kernel::Statistics => &sources::STATISTICS,
            Kernel::Apply => &sources::APPLY,
            Kernel::BackwardReduce => &sources::BACKWARD_REDUCE,
            Kernel::BackwardApply => &sources::BACKWARD_APPLY,
        }
    }
}

/// How a kernel walks a tensor: see `kernels/tensor.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// Along the planes of one channel, each a whole number of vectors.
    Planes,
    /// Along the planes of one channel, each of which may begin and end inside a vector.
    PlanesWithEdges,
    /// Down a column of vectors, a fixed set of channels.
    Columns,
}

impl Walk {
    /// `planes`, `planes with edges` or `columns`.
    pub const fn name(self) -> &'static str {
        match self {
            Walk::Planes => "planes",
            Walk::PlanesWithEdges => "planes with edges",
            Walk::Columns => "columns",
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
}

impl Instantiation {
    /// The compiler's options that make this instantiation of the source.
    pub fn definitions(&self) -> Vec<String> {
        let element = match self.dtype {
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "float",
            Dtype::F64 => "double",
        };
        let real = match self.dtype.param() {
            Dtype::F64 => "double",
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
    }
}

impl std::fmt::Display for Instantiation {
    /// The kernel's name and what tells this instantiation from others, in a few words.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} <{}, {} x {}, {}>",
            self.kernel.name(),
            self.walk.name(),
            self.vector,
            self.dtype,
            self.epilogue
        )
    }
}
