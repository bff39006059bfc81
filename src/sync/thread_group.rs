//! Ranks that are threads of one process: a collective for every backend, through the host's memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::collective::Collective;
use crate::backend::{AsTensor, Backend};
use crate::error::{Error, Result};

/// One of several threads that share a batch.
///
/// The messages go through the host's memory. On the CPU that is all there is to do; on CUDA it means that every pass waits
/// for the device and allocates, and cannot be captured in a graph: it serves where there is no NCCL, and for tests.
///
/// A rank waits for the others, so each needs a thread of its own (`std::thread`): on the workers of a `rayon` pool that
/// is smaller than the group the ranks would wait for each other in vain, until the time is up. When a rank is dropped, or its
/// thread panics, the others learn of it at once.
///
/// ```
/// use std::time::Duration;
/// use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Shape, SyncBatchNorm, ThreadRank};
///
/// // Two ranks with one image of two values each: normalised as one batch of four.
/// let batches = [vec![1.0f32, 3.0], vec![5.0, 7.0]];
/// std::thread::scope(|scope| {
///     for (rank, x) in ThreadRank::group(2, Duration::from_secs(10)).into_iter().zip(&batches) {
///         scope.spawn(move || -> batchnorm_cuda::Result<()> {
///             let module: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(1))?;
///             let mut bn = SyncBatchNorm::new(module, rank)?;
///             let mut saved = bn.prepare::<f32>(Shape::nchw(1, 1, 1, 2))?;
///             let mut y = vec![0.0; 2];
///             bn.forward_train(x, &mut y, &mut saved)?;
///             assert_eq!(saved.mean()?, [4.0]);
///             Ok(())
///         });
///     }
/// });
/// ```
#[derive(Debug)]
pub struct ThreadRank {
    group: Arc<Group>,
    rank: usize,
}

#[derive(Debug)]
struct Group {
    ranks: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many times all ranks have met.
    rounds: u64,
    /// What they have brought to the next meeting.
    brought: Vec<Option<Vec<i64>>>,
    /// What they took from the last one.
    gathered: Arc<Vec<i64>>,
    /// Why they will not meet again.
    broken: Option<Error>,
}

impl ThreadRank {
    /// The ranks of a group, in their order: one for each thread. `timeout` is how long a rank waits for the others.
    pub fn group(ranks: usize, timeout: Duration) -> Vec<Self> {
        let group = Arc::new(Group {
            ranks,
            timeout,
            state: Mutex::new(State {
                brought: vec![None; ranks],
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        (0..ranks)
            .map(|rank| Self {
                group: group.clone(),
                rank,
            })
            .collect()
    }

    /// Every rank's words, in the order of the ranks.
    fn meet(&self, own: Vec<i64>) -> Result<Arc<Vec<i64>>> {
        let Group {
            ranks,
            timeout,
            changed,
            ..
        } = &*self.group;
        let mut state = self.group.lock();
        if let Some(error) = &state.broken {
            return Err(error.clone());
        }
        state.brought[self.rank] = Some(own);
        let round = state.rounds;
        if state.brought.iter().all(Option::is_some) {
            state.finish_round();
            changed.notify_all();
        } else {
            let waiting = |state: &mut State| state.rounds == round && state.broken.is_none();
            (state, _) = changed
                .wait_timeout_while(state, *timeout, waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.rounds == round && state.broken.is_none() {
            let missing: Vec<usize> = (0..*ranks).filter(|&rank| state.brought[rank].is_none()).collect();
            state.broken = Some(Error::Collective {
                rank: self.rank,
                message: format!("waited {timeout:?} for ranks {missing:?}"),
            });
            changed.notify_all();
        }
        match &state.broken {
            // A round that came to its end counts, whatever happened after it.
            Some(error) if state.rounds == round => Err(error.clone()),
            _ => Ok(state.gathered.clone()),
        }
    }
}

impl Group {
    /// No state under this lock is left half-made by a panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Everybody is there.
    fn finish_round(&mut self) {
        let messages: Vec<Vec<i64>> = self.brought.iter_mut().flat_map(Option::take).collect();
        let expected = messages[0].len();
        match messages.iter().position(|message| message.len() != expected) {
            Some(rank) => {
                self.broken = Some(Error::RanksDisagree {
                    what: "length of a message",
                    rank,
                    expected: format!("{expected} words"),
                    got: format!("{} words", messages[rank].len()),
                });
            }
            None => {
                self.gathered = Arc::new(messages.concat());
                self.rounds += 1;
            }
        }
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        state.broken.get_or_insert(Error::Collective {
            rank: self.rank,
            message: "this rank has left the group".into(),
        });
        self.group.changed.notify_all();
    }
}

impl<B: Backend> Collective<B> for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.group.ranks
    }

    fn all_gather(&self, backend: &B, own: B::View<'_, i64>, gathered: B::ViewMut<'_, i64>) -> Result<()> {
        let all = self.meet(backend.to_vec(own)?)?;
        let staged = backend.upload(&all)?;
        backend.copy(staged.view(), gathered)
    }
}
