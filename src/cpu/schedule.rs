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

    /// Computes a task's elements. Other threads may be told of them only after [`Pass::publish`].
    fn apply(&self, task: &Task);

    /// Ends a thread's run of [`Pass::apply`].
    fn publish(&self);
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

/// Runs a pass, on one thread if its tensors have fewer bytes than `threads_from`. Which thread does what changes no bit of the
/// result.
pub(super) fn run(geometry: &Geometry, phases: Phases, threads_from: usize, pass: &impl Pass) {
    let bytes = pass.bytes_per_channel() * geometry.channels();
    let threads = if bytes < threads_from {
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
        Phases::Apply => apply_all(geometry, pass, threads, false),
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
                pass.publish();
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
            apply_all(geometry, pass, threads, true);
        }
    }
}

/// Cache that a core may count on: its second level with its share of the third, in which what the second drops stays at hand.
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
    pass.publish();
}

/// Computes all elements, `backwards` from the last task to the first.
fn apply_all(geometry: &Geometry, pass: &impl Pass, threads: usize, backwards: bool) {
    let tasks = geometry.chunks().div_ceil(geometry.adjacent_chunks()) * geometry.groups();
    // Publishing waits for all writes to arrive, so a job has many tasks; but every thread has some jobs, since they are not
    // equally fast.
    let bytes_per_task = (pass.bytes_per_channel() * geometry.channels()).div_ceil(tasks);
    let tasks_per_job = (JOB / bytes_per_task).min(tasks / (JOBS_PER_THREAD * threads)).max(1);
    for_each(threads, tasks.div_ceil(tasks_per_job), &|job| {
        for number in job * tasks_per_job..tasks.min((job + 1) * tasks_per_job) {
            let number = if backwards { tasks - 1 - number } else { number };
            pass.apply(&apply_task(geometry, number));
        }
        pass.publish();
    });
}

/// Bytes of the tensors that a job passes over, about.
const JOB: usize = 512 << 10;

/// Jobs that each thread has at least, if there are tasks enough.
const JOBS_PER_THREAD: usize = 8;

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
