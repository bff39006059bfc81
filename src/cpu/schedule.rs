//! The order of work: which tasks run when, and on which threads.

use std::ops::Range;

use rayon::prelude::*;

use super::geometry::{Geometry, Task};

/// A pass over tensors. A method touches only what belongs to the channels and the part that it is called for.
pub(super) trait Pass: Sync {
    /// Bytes of all tensors for one channel's values.
    fn bytes_per_channel(&self) -> usize;

    /// Sums up a task's values.
    fn reduce(&self, task: &Task);

    /// Makes what the pass yields per channel from the sums of all parts of `channels`.
    fn finish(&self, channels: Range<usize>);

    /// Computes a task's elements.
    fn apply(&self, task: &Task);
}

/// What a pass consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phases {
    /// Elements only.
    Apply,
    /// Sums only.
    Reduce,
    /// Elements, and sums that they do not depend on.
    Both,
    /// Elements that depend on the sums of all values of their channel.
    ReduceThenApply,
}

/// Runs a pass. Which thread does what changes no bit of the result.
pub(super) fn run(geometry: &Geometry, phases: Phases, pass: &impl Pass) {
    let bytes = pass.bytes_per_channel() * geometry.channels();
    let threads = if bytes < BYTES_WORTH_A_THREAD {
        1
    } else {
        rayon::current_num_threads()
    };
    let tasks = |work: &(dyn Fn(&Task) + Sync)| {
        for_each(threads, geometry.tasks(), &|number| {
            work(&geometry.task(number))
        });
    };
    let finish = || {
        for_each(threads, geometry.groups(), &|group| {
            pass.finish(geometry.group(group))
        })
    };
    match phases {
        Phases::Apply => tasks(&|task| pass.apply(task)),
        Phases::Reduce => {
            tasks(&|task| pass.reduce(task));
            finish();
        }
        Phases::Both => {
            tasks(&|task| {
                pass.reduce(task);
                pass.apply(task);
            });
            finish();
        }
        Phases::ReduceThenApply if keeps_groups_cached(geometry, pass, threads) => {
            for_each(threads, geometry.groups(), &|group| {
                group_by_group(geometry, pass, group)
            });
        }
        Phases::ReduceThenApply => {
            tasks(&|task| pass.reduce(task));
            finish();
            // What was read last is read first: it may still be in a cache.
            let last = geometry.tasks() - 1;
            for_each(threads, last + 1, &|number| {
                pass.apply(&geometry.task(last - number))
            });
        }
    }
}

/// Below this, waking another thread takes longer than it saves.
const BYTES_WORTH_A_THREAD: usize = 256 << 10;

/// Second-level cache that may be counted on, per core.
const CACHE: usize = 1 << 20;

/// Whether one task should take a group of channels from its sums to its elements, so that the values are read from memory
/// once: where they fit a core's cache and there is a group for every thread.
fn keeps_groups_cached(geometry: &Geometry, pass: &impl Pass, threads: usize) -> bool {
    let group = pass.bytes_per_channel() * geometry.group(0).len();
    threads == 1 && geometry.groups() == 1 || group <= CACHE && geometry.groups() >= threads
}

fn group_by_group(geometry: &Geometry, pass: &impl Pass, group: usize) {
    let channels = geometry.group(group);
    let task = |part| Task {
        channels: channels.clone(),
        part,
    };
    let parts = 0..geometry.parts();
    for part in parts.clone() {
        pass.reduce(&task(part));
    }
    pass.finish(channels.clone());
    for part in parts.rev() {
        pass.apply(&task(part));
    }
}

fn for_each(threads: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
    if threads == 1 {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().for_each(work);
    }
}
