//! The resident path: a team of blocks holds a strip of channels on chip, so that every tensor crosses memory once. Which
//! teams, block sizes and ways of copying there are for a shape. Pure arithmetic; the words are those of
//! `kernels/resident.cuh`.

use super::kernel::Kernel;
use super::limits::DeviceLimits;
use super::tiling::{self, Alignment, Cut, Tiling, VECTOR_BYTES, Walk, Widths};
use super::tuning::{
    CLUSTER_SIZES, GRID_TEAMS, RESIDENT_BLOCK_SIZES, RESIDENT_COLUMN_VECTORS, RESIDENT_THREADS_OTHERS,
    RESIDENT_THREADS_PLANES, RESIDENT_VECTOR_BYTES, VECTORS_IN_FLIGHT,
};
use crate::element::Dtype;
use crate::shape::Shape;

/// First compute capability with clusters and bulk copies.
const ARCHITECTURE_OF_CLUSTERS: u32 = 90;

/// Bytes at the beginning of shared memory that hold the mbarriers.
const BARRIER_BYTES: u64 = 16;

/// The blocks that hold one strip together, and by what they agree on its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Team {
    /// One block, by itself.
    Block,
    /// So many blocks of a cluster, through distributed shared memory.
    Cluster(u32),
    /// A share of the blocks of a cooperative launch, through global memory.
    Grid,
}

impl Team {
    /// Blocks of the clusters that the kernel is launched in.
    pub const fn cluster(self) -> u32 {
        match self {
            Team::Cluster(blocks) => blocks,
            Team::Block | Team::Grid => 1,
        }
    }
}

impl std::fmt::Display for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Team::Block => f.write_str("block"),
            Team::Cluster(blocks) => write!(f, "cluster{blocks}"),
            Team::Grid => f.write_str("grid"),
        }
    }
}

impl std::str::FromStr for Team {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let clusters = CLUSTER_SIZES.map(Team::Cluster);
        [Team::Block, Team::Grid]
            .into_iter()
            .chain(clusters)
            .find(|team| team.to_string() == text)
            .ok_or_else(|| {
                format!("unknown team {text:?}: expected block, cluster2, cluster4, cluster8, cluster16 or grid")
            })
    }
}

/// The compile-time constants that only resident kernels have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Resident {
    /// Who holds a strip.
    pub team: Team,
    /// Buffers per block: with two, the next strip is copied while this one is worked on.
    pub stages: u32,
    /// Whether strips are copied by bulk copies, rather than by each thread for itself.
    pub bulk: bool,
    /// Blocks that share a multiprocessor as far as registers go: the launch bound. A plan may have room for fewer.
    pub blocks: u32,
}

impl Resident {
    /// Whether devices of this compute capability, times ten, have clusters and bulk copies, if they are needed.
    pub(super) fn runs_on(&self, architecture: u32) -> bool {
        architecture >= ARCHITECTURE_OF_CLUSTERS || (self.team.cluster() == 1 && !self.bulk)
    }

    /// The compiler's options.
    pub(super) fn definitions(&self) -> [String; 5] {
        let team = match self.team {
            Team::Block => 0,
            Team::Cluster(_) => 1,
            Team::Grid => 2,
        };
        [
            format!("-DTEAM={team}"),
            format!("-DCLUSTER={}", self.team.cluster()),
            format!("-DSTAGES={}", self.stages),
            format!("-DBULK={}", u8::from(self.bulk)),
            format!("-DBLOCKS={}", self.blocks),
        ]
    }
}

impl std::fmt::Display for Resident {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let copies = if self.bulk { "bulk" } else { "own" };
        write!(f, "{}, {} x {copies} copies", self.team, self.stages)
    }
}

/// A legal way to run a pass on chip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) resident: Resident,
    pub(super) walk: Walk,
    pub(super) vector: u32,
    pub(super) threads: u32,
    pub(super) tiling: Tiling,
    pub(super) shared_bytes: u32,
    pub(super) grid: u32,
}

/// What a kernel keeps in shared memory.
#[derive(Clone, Copy, Debug)]
struct Keeps {
    /// Tensors.
    tensors: u64,
    /// Numbers per channel of a strip: forward pivot, offset and variance beside what is staged, backward the rest of the mean,
    /// the mean gradient and the slope.
    numbers: u64,
}

fn keeps(kernel: Kernel) -> Keeps {
    Keeps {
        tensors: if kernel == Kernel::ResidentBackward { 2 } else { 1 },
        numbers: STAGED_NUMBERS + 3,
    }
}

/// Numbers of the parameter type that `kernels/normalise.cuh` stages per channel.
pub(super) const STAGED_NUMBERS: u64 = 4;

/// Vectors of each tensor that a thread has under way at a time.
pub(super) fn unroll(tensors_read: u64) -> u32 {
    (VECTORS_IN_FLIGHT / tensors_read).max(2) as u32
}

/// Block sizes and constants that a kernel with this walk is compiled for.
pub(super) fn variants(
    dtype: Dtype,
    walk: Walk,
    vector: u32,
    wide_index: bool,
) -> impl Iterator<Item = (u32, Resident)> {
    let clusters = CLUSTER_SIZES.map(Team::Cluster);
    let bytes = u64::from(vector) * dtype.size() as u64;
    let block_sizes = RESIDENT_BLOCK_SIZES
        .into_iter()
        .filter(move |_| dtype != Dtype::F64)
        .filter_map(move |threads| Some((threads, blocks(walk, wide_index, threads)?)));
    block_sizes.flat_map(move |(threads, blocks)| {
        let teams = [Team::Block, Team::Grid].into_iter().chain(clusters);
        teams.flat_map(move |team| {
            copies(walk, bytes).map(move |(stages, bulk)| {
                (
                    threads as u32,
                    Resident {
                        team,
                        stages,
                        bulk,
                        blocks,
                    },
                )
            })
        })
    })
}

/// Numbers of stages, each with and without bulk copies where these can be used: they move whole 16 bytes.
fn copies(walk: Walk, vector_bytes: u64) -> impl Iterator<Item = (u32, bool)> {
    let bulk = vector_bytes == VECTOR_BYTES && walk != Walk::PlanesWithEdges;
    [(1, false), (2, false), (1, true), (2, true)]
        .into_iter()
        .filter(move |&(_, needs_bulk)| bulk || !needs_bulk)
}

/// Blocks of this size that share a multiprocessor, as far as registers go.
fn blocks(walk: Walk, wide_index: bool, threads: u64) -> Option<u32> {
    let most = match walk {
        Walk::Planes if !wide_index => RESIDENT_THREADS_PLANES,
        _ => RESIDENT_THREADS_OTHERS,
    };
    (threads <= most).then_some((most / threads) as u32)
}

/// Every legal candidate. The shape is not empty and has been checked for overflow.
pub(super) fn candidates(
    kernel: Kernel,
    shape: Shape,
    dtype: Dtype,
    alignment: Alignment,
    limits: &DeviceLimits,
) -> Vec<Candidate> {
    let mut found = Vec::new();
    if dtype == Dtype::F64 {
        return found;
    }
    for threads in RESIDENT_BLOCK_SIZES {
        for cut in cuts(shape, dtype, alignment, threads) {
            let wide_index = tiling::needs_wide_index(&cut.tiling, cut.vector);
            let Some(blocks) = blocks(cut.walk, wide_index, threads) else {
                continue;
            };
            for (stages, bulk) in copies(cut.walk, cut.vector * dtype.size() as u64) {
                if bulk && limits.architecture < ARCHITECTURE_OF_CLUSTERS {
                    continue;
                }
                let chip = Chip {
                    cut,
                    blocks: u64::from(blocks),
                    dtype,
                    threads,
                    stages: u64::from(stages),
                    keeps: keeps(kernel),
                    limits,
                };
                chip.teams(|team, splits, teams| {
                    if teams * splits > u64::from(limits.grid) {
                        return;
                    }
                    let share = cut.work().div_ceil(splits);
                    let tiling = Tiling {
                        splits,
                        share,
                        ..cut.tiling
                    };
                    let candidate = Candidate {
                        resident: Resident {
                            team,
                            stages,
                            bulk,
                            blocks,
                        },
                        walk: cut.walk,
                        vector: cut.vector as u32,
                        threads: threads as u32,
                        tiling,
                        shared_bytes: chip.shared_bytes(team, share) as u32,
                        grid: (teams * splits) as u32,
                    };
                    if !found.contains(&candidate) {
                        found.push(candidate);
                    }
                });
            }
        }
    }
    found
}

/// The ways to cut a tensor into strips, each once.
fn cuts(shape: Shape, dtype: Dtype, alignment: Alignment, threads: u64) -> Vec<Cut> {
    let mut cuts: Vec<Cut> = Vec::new();
    for vector_bytes in RESIDENT_VECTOR_BYTES {
        for column_vectors in RESIDENT_COLUMN_VECTORS {
            let widths = Widths {
                vector_bytes,
                column_vectors,
            };
            let cut = tiling::cut(shape, dtype, alignment, threads, widths);
            if cut.tiling.width <= threads && !cuts.contains(&cut) {
                cuts.push(cut);
            }
        }
    }
    cuts
}

/// What fits a device's shared memory, for one cut and one way of copying.
struct Chip<'a> {
    cut: Cut,
    /// Blocks of a multiprocessor, as far as registers go.
    blocks: u64,
    dtype: Dtype,
    threads: u64,
    stages: u64,
    keeps: Keeps,
    limits: &'a DeviceLimits,
}

impl Chip<'_> {
    /// Bytes that one item of work takes: a vector, or a row of a strip of columns.
    fn item_bytes(&self) -> u64 {
        let vectors = self.cut.tiling.width * self.keeps.tensors * self.stages;
        vectors * self.cut.vector * self.dtype.size() as u64
    }

    /// Bytes beside the buffers, whatever the share.
    fn fixed_bytes(&self, team: Team) -> u64 {
        const WEIGHT_BYTES: u64 = 8;
        let real = self.dtype.param().size() as u64;
        let channels = self.cut.tiling.strip_channels;
        let peers = match team {
            Team::Cluster(_) => channels * (WEIGHT_BYTES + 2 * real),
            Team::Block | Team::Grid => 0,
        };
        let exchange = tiling::exchange_bytes(&self.cut, self.dtype, self.threads);
        BARRIER_BYTES + peers + channels * self.keeps.numbers * real + exchange
    }

    fn shared_bytes(&self, team: Team, share: u64) -> u64 {
        (share * self.item_bytes()).next_multiple_of(VECTOR_BYTES) + self.fixed_bytes(team)
    }

    /// The largest share with which so many blocks fit a multiprocessor.
    fn largest_share(&self, team: Team, blocks: u64) -> u64 {
        let limits = self.limits;
        let reserved = u64::from(limits.shared_memory_reserved_per_block);
        let of_multiprocessor = (u64::from(limits.shared_memory_per_multiprocessor) / blocks).saturating_sub(reserved);
        let room = of_multiprocessor.min(u64::from(limits.shared_memory_per_block));
        // Buffers are rounded up to whole 16 bytes.
        (room & !(VECTOR_BYTES - 1)).saturating_sub(self.fixed_bytes(team).next_multiple_of(VECTOR_BYTES))
            / self.item_bytes()
    }

    /// Blocks that fit a multiprocessor with this share; 0 if none does.
    fn occupancy(&self, team: Team, share: u64) -> u64 {
        (1..=self.most_blocks())
            .rev()
            .find(|&blocks| self.largest_share(team, blocks) >= share)
            .unwrap_or(0)
    }

    /// Blocks that fit a multiprocessor as far as registers, threads and the device's own limit go.
    fn most_blocks(&self) -> u64 {
        let limits = self.limits;
        let by_threads = u64::from(limits.threads_per_multiprocessor) / self.threads;
        self.blocks
            .min(by_threads)
            .min(u64::from(limits.blocks_per_multiprocessor))
    }

    /// Gives each team that can hold a strip, with its blocks and the number of such teams.
    fn teams(&self, mut give: impl FnMut(Team, u64, u64)) {
        let limits = self.limits;
        let (work, strips) = (self.cut.work(), self.cut.tiling.strips);
        let multiprocessors = u64::from(limits.multiprocessors);
        let clusters = CLUSTER_SIZES.into_iter().filter(|&size| size <= limits.largest_cluster);
        for team in std::iter::once(Team::Block).chain(clusters.map(Team::Cluster)) {
            let splits = u64::from(team.cluster());
            let blocks = self.occupancy(team, work.div_ceil(splits)) * multiprocessors;
            // A cluster that is larger than what the device can run at a time would never begin.
            if blocks >= splits {
                let most = (blocks.min(u64::from(limits.grid)) / splits).max(1);
                give(team, splits, even_teams(strips, most));
            }
        }
        if !limits.cooperative_launch {
            return;
        }
        for per_multiprocessor in 1..=self.most_blocks() {
            let blocks = (per_multiprocessor * multiprocessors).min(u64::from(limits.grid));
            let share = self.largest_share(Team::Grid, per_multiprocessor);
            if share == 0 {
                continue;
            }
            let fewest = work.div_ceil(share).max(2);
            let most = strips.min(blocks / fewest);
            for teams in GRID_TEAMS
                .into_iter()
                .chain([most])
                .filter(|&teams| teams >= 1 && teams <= most)
            {
                let share = work.div_ceil((blocks / teams).min(work));
                let splits = work.div_ceil(share);
                if splits > 1 {
                    give(Team::Grid, splits, even_teams(strips, teams));
                }
            }
        }
    }
}

/// As many teams as needed for every one of them to take as many strips as the busiest of `most` would have to.
pub(super) fn even_teams(strips: u64, most: u64) -> u64 {
    strips.div_ceil(strips.div_ceil(most.min(strips)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_share_the_strips_evenly() {
        assert_eq!(even_teams(64, 66), 64);
        assert_eq!(even_teams(64, 33), 32);
        assert_eq!(even_teams(100, 66), 50);
        assert_eq!(even_teams(1, 8), 1);
        assert_eq!(even_teams(7, 3), 3);
    }

    #[test]
    fn names_are_read_back() {
        for team in [Team::Block, Team::Cluster(16), Team::Grid] {
            assert_eq!(team.to_string().parse(), Ok(team));
        }
        assert!("cluster3".parse::<Team>().is_err());
    }
}
