//! The order of work: which tasks run when, and on which threads.

use std::ops::Range;

use rayon::prelude::*;

use super::geometry::{Geometry, Task};

/// A pass over tensors. A method touches only what belongs to the channels and the chunks that it is called for.
pub(super) trait Pass: Sync {
    /// Bytes of all tensors for one channel's values.
    fn bytes_per_channel(&self) -> usize;

    /// Sums up a task's values; its chunks are those of a part.
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
    /// What the pass yields per channel, of sums that are there.
    Finish,
}

/// Runs a pass. Which thread does what changes no bit of the result.
pub(super) fn run(geometry: &Geometry, phases: Phases, pass: &impl Pass) {
    let bytes = pass.bytes_per_channel() * geometry.channels();
    let threads = if bytes < BYTES_WORTH_A_THREAD {
        1
    } else {
        rayon::current_num_threads()
    };
    let groups = geometry.groups();
    let part_tasks = geometry.parts() * groups;
    let part_task = |number: usize| Task {
        channels: geometry.group(number % groups),
        chunks: geometry.part(number / groups),
    };
    let finish = || for_each(threads, groups, &|group| pass.finish(geometry.group(group)));
    match phases {
        Phases::Apply => for_each(threads, apply_tasks(geometry), &|number| {
            pass.apply(&apply_task(geometry, number));
        }),
        Phases::Reduce => {
            for_each(threads, part_tasks, &|number| pass.reduce(&part_task(number)));
            finish();
        }
        Phases::Finish => finish(),
        Phases::Both => {
            for_each(threads, part_tasks, &|number| {
                let task = part_task(number);
                pass.reduce(&task);
                pass.apply(&task);
            });
            finish();
        }
        Phases::ReduceThenApply if keeps_groups_cached(geometry, pass, threads) => {
            for_each(threads, groups, &|group| group_by_group(geometry, pass, group));
        }
        Phases::ReduceThenApply => {
            for_each(threads, part_tasks, &|number| pass.reduce(&part_task(number)));
            finish();
            // What was read last is read first: it may still be in a cache.
            let last = apply_tasks(geometry) - 1;
            for_each(threads, last + 1, &|number| {
                pass.apply(&apply_task(geometry, last - number));
            });
        }
    }
}

/// Below this, waking other threads takes longer than they save: 4 to 10 µs for each of up to three phases, in which one
/// core passes over 100 to 250 KB (measured on two cores of an EPYC of 2024).
const BYTES_WORTH_A_THREAD: usize = 512 << 10;

/// Second-level cache that may be counted on, per core.
const CACHE: usize = 1 << 20;

/// Whether one task should take a group of channels from its sums to its elements, so that the values are read from memory
/// once: where they fit a core's cache and there is a group for every thread.
fn keeps_groups_cached(geometry: &Geometry, pass: &impl Pass, threads: usize) -> bool {
    let group = pass.bytes_per_channel() * geometry.group(0).len();
    group <= CACHE && geometry.groups() >= threads
}

fn group_by_group(geometry: &Geometry, pass: &impl Pass, group: usize) {
    let channels = geometry.group(group);
    let task = |part| Task {
        channels: channels.clone(),
        chunks: geometry.part(part),
    };
    for part in 0..geometry.parts() {
        pass.reduce(&task(part));
    }
    pass.finish(channels.clone());
    for part in (0..geometry.parts()).rev() {
        pass.apply(&task(part));
    }
}

/// Number of tasks for work that needs no sums.
fn apply_tasks(geometry: &Geometry) -> usize {
    geometry.chunks().div_ceil(geometry.adjacent_chunks()) * geometry.groups()
}

/// The tasks for work that needs no sums, in the order of memory as far as there is one.
fn apply_task(geometry: &Geometry, number: usize) -> Task {
    let adjacent = geometry.adjacent_chunks();
    let first = number / geometry.groups() * adjacent;
    Task {
        channels: geometry.group(number % geometry.groups()),
        chunks: first..geometry.chunks().min(first + adjacent),
    }
}

fn for_each(threads: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
    if threads == 1 {
        (0..count).for_each(work);
    } else {
        (0..count).into_par_iter().for_each(work);
    }
}
