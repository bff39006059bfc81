//! What the backend's parts promise each other, and what no test from outside can force: instruction sets below the best.
//! Numbers are held against the reference in `tests/`.

use std::cell::RefCell;
use std::marker::PhantomData;

use half::{bf16, f16};
use rayon::ThreadPoolBuilder;

use super::coefficients::{Coefficients, Table, coarse};
use super::elementwise::{Order, Visitor, visit};
use super::geometry::{Geometry, STRIP, Task};
use super::memory::{Sink, Source};
use super::reduce::{Block, Tree, pairwise};
use super::simd::{Kernel, LANES, LINE, LaneOrder, Level, Simd, blocks, narrow, widen};
use super::{Cpu, forward, gradients};
use crate::BatchNorm2d;
use crate::backend::{
    Backend, BackwardEpilogue, BackwardPass, BackwardStatistics, BatchStatistics, ForwardEpilogue, ForwardPass,
    ForwardStatistics, GradientFlow, InputOutput, ParameterGradients, RunningUpdate,
};
use crate::config::{BatchNorm2dConfig, Momentum};
use crate::element::{Element, Real};
use crate::epilogue::Epilogue;
use crate::shape::Shape;

/// Shapes on both sides of every threshold of the geometry.
fn shapes() -> Vec<Shape> {
    let planar = [
        Shape::nchw(1, 1, 1, 2),
        Shape::nchw(2, 3, 1, 1),
        Shape::nchw(3, 5, 7, 7),
        Shape::nchw(2, 300, 2, 2),
        Shape::nchw(40, 2, 14, 14),
        Shape::nchw(6, 3, 9, 9),
        Shape::nchw(5, 2, 80, 81),
        Shape::nchw(2, 2, 70, 71),
        Shape::nchw(1, 1, 257, 301),
    ];
    let interleaved = [
        Shape::nchw(700, 1, 3, 3),
        Shape::nchw(5, 3, 17, 31),
        Shape::nchw(2, 16, 50, 50),
        Shape::nchw(3, 17, 25, 5),
        Shape::nchw(1, 64, 33, 9),
        Shape::nchw(2, 257, 6, 7),
        Shape::nchw(1, 530, 9, 11),
    ];
    let other_layouts = planar.map(Shape::channels_last);
    planar
        .into_iter()
        .chain(interleaved.map(Shape::channels_last))
        .chain(other_layouts)
        .collect()
}

fn len(shape: Shape) -> usize {
    shape.len().unwrap()
}

fn channel_of(shape: Shape, index: usize) -> usize {
    match shape.layout {
        crate::Layout::Nchw => index / (shape.height * shape.width) % shape.channels,
        crate::Layout::Nhwc => index % shape.channels,
    }
}

/// The elements of a task, each with the channel whose coefficients it gets: first as they are summed up, then as they are
/// visited one by one.
fn elements_of(geometry: &Geometry, task: &Task) -> [Vec<(usize, usize)>; 2] {
    let [mut summed, mut visited] = [vec![], vec![]];
    match geometry {
        Geometry::Planar(planar) => {
            for chunk in task.chunks.clone() {
                for channel in task.channels.clone() {
                    let runs = planar.runs(channel, chunk);
                    for run in 0..runs.count {
                        summed.extend((0..runs.len).map(|at| (runs.start(run) + at, channel)));
                    }
                }
                for image in 0..planar.images(chunk) {
                    let runs = planar.image_runs(&task.channels, chunk, image);
                    for run in 0..runs.count {
                        visited.extend((0..runs.len).map(|at| (runs.start(run) + at, task.channels.start + run)));
                    }
                }
            }
        }
        Geometry::Interleaved(interleaved) => {
            let channel = |at: usize| task.channels.start + at % task.channels.len();
            for chunk in task.chunks.clone() {
                let pixels = interleaved.pixels(&(chunk..chunk + 1));
                for runs in [
                    interleaved.full_runs(&task.channels, &pixels),
                    interleaved.last_run(&task.channels, &pixels),
                ] {
                    assert!(runs.len <= STRIP && runs.len <= interleaved.repeats() * task.channels.len());
                    for run in 0..runs.count {
                        summed.extend((0..runs.len).map(|at| (runs.start(run) + at, channel(at))));
                    }
                }
            }
            let rows = interleaved.rows(&task.channels, &task.chunks);
            for row in 0..rows.count {
                visited.extend((0..rows.len).map(|at| (rows.start(row) + at, channel(at))));
            }
        }
    }
    [summed, visited]
}

/// Every shape, cut in both ways.
fn geometries() -> impl Iterator<Item = (Shape, Geometry)> {
    shapes()
        .into_iter()
        .flat_map(|shape| [Geometry::new, Geometry::elementwise].map(|cut| (shape, cut(shape))))
}

#[test]
fn tasks_have_every_element_once_with_its_channel() {
    for (shape, geometry) in geometries() {
        assert_eq!(geometry.channels(), shape.channels);
        let mut count = vec![[0; 2]; len(shape)];
        for part in 0..geometry.parts() {
            for group in 0..geometry.groups() {
                let task = Task {
                    channels: geometry.group(group),
                    chunks: geometry.part(part),
                };
                assert_eq!(Geometry::part_of(&task.chunks), part);
                let both = elements_of(&geometry, &task);
                assert_eq!(
                    both[0].len(),
                    geometry.part_values(part) * task.channels.len(),
                    "{shape}"
                );
                for (kind, elements) in both.iter().enumerate() {
                    for &(index, channel) in elements {
                        assert_eq!(channel_of(shape, index), channel, "{shape} at {index}");
                        count[index][kind] += 1;
                    }
                }
            }
        }
        assert!(count.iter().all(|count| *count == [1, 1]), "{shape}");
        for channel in 0..shape.channels {
            let first = (0..len(shape)).find(|&index| channel_of(shape, index) == channel);
            assert_eq!(Some(geometry.first_value(channel)), first, "{shape}");
        }
    }
}

/// Notes which elements it is shown, each with its coefficient, and where aligned blocks begin.
#[derive(Default)]
struct Recorder {
    /// Which element of a block each lane has in [`LaneOrder::Quickest`].
    quickest: [usize; LANES],
    shown: RefCell<Vec<(usize, f32)>>,
    aligned: RefCell<Vec<usize>>,
}

impl Visitor<f32> for Recorder {
    fn visit(&self, block: Block, coefficients: &impl Coefficients<f32>, aligned: bool) {
        let values = coefficients.at(0, block.position);
        for (lane, value) in values.into_iter().enumerate() {
            let element = match block.lanes {
                LaneOrder::Natural => lane,
                LaneOrder::Quickest => self.quickest[lane],
            };
            if element < block.count {
                self.shown.borrow_mut().push((block.at + element, value));
            }
        }
        if aligned {
            assert_eq!(block.count, LANES);
            self.aligned.borrow_mut().push(block.at);
        }
    }
}

/// Which element of a block each lane has.
struct Quickest<T>(PhantomData<T>);

impl<T: Element<Param = f32>> Kernel for Quickest<T> {
    type Output = [usize; LANES];

    #[inline(always)]
    fn run<S: Level>(self, level: S) -> [usize; LANES] {
        let numbers: [T; LANES] = std::array::from_fn(|i| T::from_param(i as f32));
        widen(level, &numbers, LaneOrder::Quickest).map(|element| element as usize)
    }
}

/// Visits all tasks, each channel's number being its coefficient.
struct VisitAll<'a, T> {
    geometry: &'a Geometry,
    aligned: Option<Sink<'a, T>>,
    order: Order,
    recorder: &'a Recorder,
}

impl<T: Element<Param = f32>> Kernel for VisitAll<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        for part in 0..self.geometry.parts() {
            for group in 0..self.geometry.groups() {
                let task = Task {
                    channels: self.geometry.group(group),
                    chunks: self.geometry.part(part),
                };
                let mut table = Table::<f32, 1>::new();
                for (at, _) in blocks(task.channels.len()) {
                    let channel = |lane: usize| (task.channels.start + at + lane) as f32;
                    table.set(0, at, &std::array::from_fn(channel));
                }
                visit(
                    level,
                    self.geometry,
                    &task,
                    &mut table,
                    self.aligned,
                    self.order,
                    self.recorder,
                );
            }
        }
    }
}

#[test]
fn both_orders_visit_every_element_with_its_channel() {
    for (shape, geometry) in geometries() {
        // Of these sinks at most one begins with a line.
        for skipped in [None, Some(0), Some(1)] {
            visits_every_element_with_its_channel::<f32>(shape, geometry, skipped);
            visits_every_element_with_its_channel::<bf16>(shape, geometry, skipped);
        }
    }
}

/// Short planes behind each other, and rows of a part of the channels, which start in one place of a line or not.
#[test]
fn both_orders_visit_what_begins_anywhere_in_a_line() {
    let planes = (1..=70).map(|len| Shape::nchw(2, 5, 1, len));
    let rows = [257, 272, 288, 320, 513, 768].map(|channels| Shape::nchw(1, channels, 1, 3).channels_last());
    for shape in planes.chain(rows) {
        for skipped in [0, 3, 8, 15, 16, 24, 31] {
            visits_every_element_with_its_channel::<f32>(shape, Geometry::new(shape), Some(skipped));
            visits_every_element_with_its_channel::<bf16>(shape, Geometry::new(shape), Some(skipped));
        }
    }
}

/// In a tensor that begins so many elements behind where memory was allocated, if lines are to be streamed.
fn visits_every_element_with_its_channel<T: Element<Param = f32>>(
    shape: Shape,
    geometry: Geometry,
    skipped: Option<usize>,
) {
    let expected: Vec<(usize, f32)> = (0..len(shape))
        .map(|index| (index, channel_of(shape, index) as f32))
        .collect();
    let mut memory = vec![T::default(); len(shape) + skipped.unwrap_or(0)];
    let aligned = skipped.map(|skipped| Sink::from(&mut memory[skipped..]));
    for simd in Simd::all() {
        for order in [Order::Ascending, Order::Descending] {
            let case = format!("{shape} {} {simd:?} {order:?} {skipped:?}", T::DTYPE);
            let recorder = Recorder {
                quickest: simd.run(Quickest::<T>(PhantomData)),
                ..Recorder::default()
            };
            simd.run(VisitAll {
                geometry: &geometry,
                aligned,
                order,
                recorder: &recorder,
            });
            let mut visited = recorder.shown.into_inner();
            visited.sort_by_key(|&(index, _)| index);
            assert!(visited == expected, "{case}");
            let mut streamed = recorder.aligned.into_inner();
            streamed.sort();
            for line in streamed.chunks((LINE / size_of::<[T; LANES]>()).max(1)) {
                let whole = line.len() * size_of::<[T; LANES]>() >= LINE;
                let adjacent = line.windows(2).all(|pair| pair[1] - pair[0] == LANES);
                assert!(whole && adjacent, "a line is streamed in part: {case}");
                assert_eq!(aligned.unwrap().until_line(line[0]), 0, "{case}");
            }
        }
    }
}

#[test]
fn a_store_just_ahead_of_the_loads_turns_the_order() {
    let mut memory = vec![0.0f32; 4096];
    // 4096 bytes apart, so that the distance within a page is that of the slices' starts.
    let (x, y) = memory.split_at_mut(1024);
    let mut order_at = |offset: usize| Order::of(Some(Sink::from(&mut y[offset..])), &[Source::from(&*x)]);
    assert_eq!(order_at(0), Order::Ascending);
    assert_eq!(order_at(8), Order::Descending);
    assert_eq!(order_at(1024 - 8), Order::Ascending);
    assert_eq!(Order::of::<f32>(None, &[]), Order::Ascending);
}

#[test]
fn shapes_reach_several_groups_parts_and_pieces() {
    let geometries: Vec<Geometry> = shapes().into_iter().map(Geometry::new).collect();
    let any = |what: &dyn Fn(&Geometry) -> bool| geometries.iter().any(what);
    let planar = |geometry: &Geometry| matches!(geometry, Geometry::Planar(_));
    for kind in [true, false] {
        assert!(any(&|geometry| planar(geometry) == kind && geometry.groups() > 1));
        assert!(any(&|geometry| planar(geometry) == kind && geometry.parts() > 1));
    }
    assert!(any(&|geometry| planar(geometry) && geometry.group(0).len() > 1));
    assert!(any(&|geometry| planar(geometry) && geometry.adjacent_chunks() > 1));
}

#[test]
fn blocks_cover_a_length() {
    for len in 0..3 * LANES + 2 {
        let mut next = 0;
        for (at, count) in blocks(len) {
            assert_eq!(at, next);
            assert!(count == LANES || at + count == len);
            next += count;
        }
        assert_eq!(next, len);
    }
}

#[test]
fn a_table_starts_anywhere() {
    let channels = 24;
    let mut table = Table::<f64, 1>::new();
    for (at, _) in blocks(channels) {
        table.set(0, at, &std::array::from_fn(|i| (at + i) as f64));
    }
    table.repeat(channels, 3);
    table.start_at(5, 3 * channels);
    let whole = &table.row(0)[..3 * channels + LANES];
    let expected: Vec<f64> = (0..whole.len())
        .map(|position| ((position + 5) % channels) as f64)
        .collect();
    assert_eq!(whole, expected);

    table.start_at(0, 3 * channels);
    table.fold(channels, 3);
    let sums: Vec<f64> = (0..channels)
        .map(|position| 3.0 * ((position + 5) % channels) as f64)
        .collect();
    assert_eq!(&table.row(0)[..channels], sums);
}

#[test]
fn values_lie_at_exact_distances_from_a_coarse_mean() {
    let noise: Vec<f64> = tensor(Shape::nchw(1, 1, 100, 100), 5);
    let mut inexact = [0, 0];
    for mean in [0.31f32, -0.77, 1.3e-3] {
        let rounded = coarse(mean, 1.0, 1.0);
        assert!((rounded - mean).abs() <= 1e-6);
        // Values of all magnitudes.
        for x in noise.iter().map(|value| (4.0 * value.powi(3)) as f32 + mean) {
            for (inexact, centre) in inexact.iter_mut().zip([rounded, mean]) {
                *inexact += usize::from(f64::from(x - centre) != f64::from(x) - f64::from(centre));
            }
        }
    }
    assert!(4 * inexact[0] < inexact[1], "{inexact:?} of {}", 3 * noise.len());
    // Nothing is to be had of a mean far away, or of a deviation that is none.
    for (mean, offset, invstd) in [
        (1e7f32, 1.0, 1.0),
        (0.01, 0.0, 300.0),
        (0.5, 1.0, 0.0),
        (0.5, 1.0, f32::NAN),
    ] {
        assert_eq!(coarse(mean, offset, invstd), mean);
    }
}

struct Parentheses;

impl Tree for Parentheses {
    type Node = String;

    fn leaf(&self, part: usize) -> String {
        part.to_string()
    }

    fn join(&self, first: String, second: String) -> String {
        format!("({first} {second})")
    }
}

#[test]
fn pairs_are_joined_in_a_fixed_order() {
    let joined = |count| pairwise(&Parentheses, count);
    assert_eq!(joined(1), "0");
    assert_eq!(joined(2), "(0 1)");
    assert_eq!(joined(3), "((0 1) 2)");
    assert_eq!(joined(7), "(((0 1) (2 3)) ((4 5) 6))");
    assert_eq!(joined(8), "(((0 1) (2 3)) ((4 5) (6 7)))");
}

/// A function of a level, as a kernel.
macro_rules! kernel {
    ($name:ident { $($field:ident: $type:ty),* } -> $output:ty, |$this:ident, $level:ident| $body:expr) => {
        struct $name<'a> { $($field: $type),* }
        impl Kernel for $name<'_> {
            type Output = $output;
            #[inline(always)]
            fn run<S: Level>(self, $level: S) -> $output {
                let $this = self;
                $body
            }
        }
    };
}

kernel!(WidenF16 { block: &'a [f16; LANES] } -> [f32; LANES], |this, level| widen(level, this.block, LaneOrder::Natural));
kernel!(NarrowF16 { values: &'a [f32; LANES] } -> [f16; LANES],
    |this, level| narrow(level, this.values, LaneOrder::Natural));
kernel!(NarrowBf16 { values: &'a [f32; LANES] } -> [bf16; LANES],
    |this, level| narrow(level, this.values, LaneOrder::Natural));
kernel!(WidenBf16 { block: &'a [bf16; LANES] } -> [f32; LANES],
    |this, level| widen(level, this.block, LaneOrder::Natural));
kernel!(ThereAndBack { block: &'a [bf16; LANES] } -> [bf16; LANES], |this, level| {
    let wide = widen(level, this.block, LaneOrder::Quickest);
    narrow(level, &wide, LaneOrder::Quickest)
});
kernel!(NarrowOneByOne { values: &'a [f32; LANES] } -> [bf16; LANES], |this, level| {
    // Each value into the lane whose element has its number.
    let values = Quickest::<bf16>(PhantomData).run(level).map(|element| this.values[element]);
    narrow(level, &values, LaneOrder::Quickest)
});
kernel!(JoinBf16 { first: &'a [bf16; LANES], second: &'a [bf16; LANES], count: usize } -> [bf16; LANES], |this, level| {
    let [first, second] = [this.first, this.second].map(|block| widen(level, block, LaneOrder::Quickest));
    narrow(level, &level.join_bf16(first, second, this.count), LaneOrder::Quickest)
});

/// Around every rounding boundary, with every exponent, and NaN and infinity.
fn values_to_round() -> impl Iterator<Item = f32> {
    let upper = (0..=u16::MAX).map(u32::from);
    let lower = [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
    upper.flat_map(move |upper| lower.map(|lower| f32::from_bits(upper << 16 | lower)))
}

#[test]
fn every_instruction_set_converts_as_half_does() {
    for simd in Simd::all() {
        for start in (0..=u16::MAX).step_by(LANES) {
            let block: [f16; LANES] = std::array::from_fn(|i| f16::from_bits(start + i as u16));
            let wide = simd.run(WidenF16 { block: &block });
            for (half, wide) in block.iter().zip(wide) {
                let expected = half.to_f32();
                let same = expected.to_bits() == wide.to_bits() || expected.is_nan() && wide.is_nan();
                assert!(same, "{simd:?}: {half:?} became {wide}");
            }
        }
        for start in (0..=u16::MAX).step_by(LANES) {
            let block: [bf16; LANES] = std::array::from_fn(|i| bf16::from_bits(start + i as u16));
            let wide = simd.run(WidenBf16 { block: &block });
            let back = simd.run(ThereAndBack { block: &block });
            for i in 0..LANES {
                let same = wide[i].to_bits() == block[i].to_f32().to_bits() && back[i] == block[i];
                let nan = block[i].is_nan() && wide[i].is_nan() && back[i].is_nan();
                assert!(
                    same || nan,
                    "{simd:?}: {:?} became {} and {:?}",
                    block[i],
                    wide[i],
                    back[i]
                );
            }
        }
        let values: Vec<f32> = values_to_round().collect();
        let (chunks, []) = values.as_chunks::<LANES>() else {
            panic!("65536 times something is a multiple of 16");
        };
        for values in chunks {
            let to_f16 = simd.run(NarrowF16 { values });
            // Of NaNs, those that a bf16 can be.
            let for_bf16 = values.map(|value| {
                let bits = value.to_bits();
                f32::from_bits(if value.is_nan() { bits & 0xffff_0000 } else { bits })
            });
            let to_bf16 = simd.run(NarrowBf16 { values: &for_bf16 });
            let in_other_lanes = simd.run(NarrowOneByOne { values: &for_bf16 });
            assert_eq!(
                in_other_lanes.map(bf16::to_bits),
                to_bf16.map(bf16::to_bits),
                "{simd:?}"
            );
            for i in 0..LANES {
                let (f16, bf16) = (f16::from_f32(values[i]), bf16::from_f32(for_bf16[i]));
                let nan = values[i].is_nan();
                assert!(
                    to_f16[i].to_bits() == f16.to_bits() || nan && to_f16[i].is_nan(),
                    "{simd:?}: {}",
                    values[i]
                );
                assert!(
                    to_bf16[i].to_bits() == bf16.to_bits() || nan && to_bf16[i].is_nan(),
                    "{simd:?}: {}",
                    values[i]
                );
            }
        }
    }
}

kernel!(Copy16 { from: &'a [f16], to: Sink<'a, f16>, at: usize, count: usize } -> (), |this, level| {
    // SAFETY: the test keeps to the slices.
    unsafe {
        let values = Source::from(this.from).load(level, this.at, this.count);
        assert!(values[this.count..].iter().all(|&value| value == 0.0));
        this.to.store(level, this.at, this.count, &values);
    }
});
kernel!(Copy32 { from: &'a [f32], to: Sink<'a, f32>, at: usize, count: usize } -> (), |this, level| {
    // SAFETY: the test keeps to the slices.
    unsafe {
        let values = Source::from(this.from).load(level, this.at, this.count);
        assert!(values[this.count..].iter().all(|&value| value == 0.0));
        this.to.store(level, this.at, this.count, &values);
    }
});
kernel!(Copy64 { from: &'a [f64], to: Sink<'a, f64>, at: usize, count: usize } -> (), |this, level| {
    // SAFETY: the test keeps to the slices.
    unsafe {
        let values = Source::from(this.from).load(level, this.at, this.count);
        assert!(values[this.count..].iter().all(|&value| value == 0.0));
        this.to.store(level, this.at, this.count, &values);
    }
});

#[test]
fn partial_blocks_touch_their_elements_only() {
    const LEN: usize = 24;
    for simd in Simd::all() {
        for at in 0..3 {
            for count in 1..=LANES {
                macro_rules! check {
                    ($kernel:ident, $type:ty) => {
                        let from: Vec<$type> = (1..=LEN).map(|i| <$type>::from_param(i as _)).collect();
                        let mut to = vec![<$type>::from_param(-1.0); LEN];
                        let sink = Sink::from(to.as_mut_slice());
                        simd.run($kernel {
                            from: &from,
                            to: sink,
                            at,
                            count,
                        });
                        for (i, (&to, &from)) in to.iter().zip(&from).enumerate() {
                            let inside = (at..at + count).contains(&i);
                            assert_eq!(
                                to,
                                if inside {
                                    from
                                } else {
                                    <$type>::from_param(-1.0)
                                },
                                "{simd:?} {at} {count}"
                            );
                        }
                    };
                }
                check!(Copy16, f16);
                check!(Copy32, f32);
                check!(Copy64, f64);
            }
        }
    }
}

kernel!(Join32 { first: &'a [f32; LANES], second: &'a [f32; LANES], count: usize } -> [f32; LANES],
    |this, level| level.join(*this.first, *this.second, this.count));
kernel!(Join64 { first: &'a [f64; LANES], second: &'a [f64; LANES], count: usize } -> [f64; LANES],
    |this, level| level.join(*this.first, *this.second, this.count));

#[test]
fn lanes_are_joined_bit_by_bit() {
    for simd in Simd::all() {
        for count in 0..LANES {
            // Whatever there is in the others: a NaN is no number times 0.
            let first = std::array::from_fn(|i| if i < count { i as f64 + 1.0 } else { f64::NAN });
            let second = std::array::from_fn(|i| if i < count { f64::NAN } else { -(i as f64) });
            let expected: [f64; LANES] = std::array::from_fn(|i| if i < count { first[i] } else { second[i] });
            let single = simd.run(Join32 {
                first: &first.map(|value| value as f32),
                second: &second.map(|value| value as f32),
                count,
            });
            assert_eq!(single.map(f64::from), expected, "{simd:?} {count}");
            let [first_half, second_half] = [first, second].map(|values| values.map(bf16::from_f64));
            let halves = simd.run(JoinBf16 {
                first: &first_half,
                second: &second_half,
                count,
            });
            assert_eq!(halves.map(bf16::to_f64), expected, "{simd:?} {count}");
            let (first, second) = (&first, &second);
            assert_eq!(simd.run(Join64 { first, second, count }), expected, "{simd:?} {count}");
        }
    }
}

/// Numbers without a pattern around 0, a little larger in every channel, NaN and infinity in the second and third.
fn tensor<T: Element>(shape: Shape, seed: u64) -> Vec<T> {
    let mut state = seed;
    (0..len(shape))
        .map(|index| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let noise = (state >> 40) as f64 / f64::from(1 << 23) - 1.0;
            let value = match (channel_of(shape, index), index % 97) {
                (1, 5) => f64::NAN,
                (2, 5) => f64::INFINITY,
                (channel, _) => noise + channel as f64 * 0.01,
            };
            T::from_param(T::Param::from_f64(value))
        })
        .collect()
}

/// Less than the backend has, so that the larger shapes are cut for several threads.
const THREADS_FROM: usize = 512 << 10;

/// All that a training step writes, as bits.
fn step<T: Element>(simd: Simd, threads_from: usize, shape: Shape, epilogue: Epilogue) -> Vec<Vec<u64>> {
    let [x, z, dy] = [1, 2, 3].map(|seed| tensor::<T>(shape, seed));
    let params = |value: f64| vec![T::Param::from_f64(value); shape.channels];
    let (weight, bias) = (params(1.5), params(-0.125));
    let (mut running_mean, mut running_var, mut batches) = (params(0.5), params(2.0), [4]);
    let mut saved = BatchStatistics::<Cpu, T> {
        pivot: params(0.0),
        mean_offset: params(0.0),
        invstd: params(0.0),
    };
    let mut workspace = Cpu::new().prepare::<T>(shape, epilogue).unwrap();
    let mut y = vec![T::default(); x.len()];
    forward::forward(
        simd,
        threads_from,
        ForwardPass {
            shape,
            eps: 1e-5,
            tensors: InputOutput::Separate { x: &x, y: &mut y },
            epilogue: match epilogue {
                Epilogue::Identity => ForwardEpilogue::Identity,
                Epilogue::Relu => ForwardEpilogue::Relu,
                Epilogue::AddRelu => ForwardEpilogue::AddRelu { z: &z },
            },
            weight: Some(&weight),
            bias: Some(&bias),
            statistics: ForwardStatistics::Batch {
                saved: &mut saved,
                workspace: &mut workspace,
                update: Some(RunningUpdate {
                    mean: &mut running_mean,
                    variance: &mut running_var,
                    batches: &mut batches,
                    momentum: Momentum::CumulativeAverage,
                    skip_non_finite: true,
                }),
            },
        },
    );
    let [mut dx, mut dz] = [x.clone(), x.clone()];
    let [mut dweight, mut dbias] = [params(0.0), params(0.0)];
    gradients::backward(
        simd,
        threads_from,
        &mut BackwardPass {
            shape,
            eps: 1e-5,
            x: &x,
            flow: GradientFlow::Separate { dy: &dy, dx: &mut dx },
            epilogue: match epilogue {
                Epilogue::Identity => BackwardEpilogue::Identity,
                Epilogue::Relu => BackwardEpilogue::Relu,
                Epilogue::AddRelu => BackwardEpilogue::AddRelu {
                    y: &y,
                    dz: Some(&mut dz),
                },
            },
            weight: Some(&weight),
            bias: Some(&bias),
            parameters: Some(ParameterGradients {
                weight: &mut dweight,
                bias: &mut dbias,
                accumulate: false,
            }),
            statistics: BackwardStatistics::Batch(&saved),
            workspace: &mut workspace,
        },
        gradients::Part::Whole,
    );
    let tensors = [y, dx, dz].map(|tensor| bits(&tensor));
    let vectors = [
        saved.pivot,
        saved.mean_offset,
        saved.invstd,
        running_mean,
        running_var,
        dweight,
        dbias,
    ];
    tensors.into_iter().chain(vectors.map(|vector| bits(&vector))).collect()
}

/// A NaN among the parameters may have bits that no `bf16` has, and rounding would carry from them.
#[test]
fn every_nan_among_the_parameters_gives_nan() {
    let nans = [0x7fff_ffff, 0xffff_ffff, 0x7f80_0001, 0xff80_8000].map(f32::from_bits);
    for (simd, shape) in Simd::all().into_iter().flat_map(|simd| {
        let shape = Shape::nchw(3, 4, 5, 7);
        [(simd, shape), (simd, shape.channels_last())]
    }) {
        let x = tensor::<bf16>(Shape { channels: 1, ..shape }, 5).repeat(4);
        for spoilt in 0..4 {
            let mut parameters = [0.0, 1.0, 1.5, -0.125].map(|value| vec![value; 4]);
            parameters[spoilt] = nans.to_vec();
            let [mean, variance, weight, bias] = &parameters;
            let mut y = vec![bf16::ZERO; x.len()];
            forward::forward(
                simd,
                THREADS_FROM,
                ForwardPass {
                    shape,
                    eps: 1e-5,
                    tensors: InputOutput::Separate { x: &x, y: &mut y },
                    epilogue: ForwardEpilogue::Identity,
                    weight: Some(weight),
                    bias: Some(bias),
                    statistics: ForwardStatistics::Running { mean, variance },
                },
            );
            assert!(y.iter().all(|y| y.is_nan()), "{simd:?} {shape}: {y:?}");
        }
    }
}

/// Bits that are equal where the values are the same; a NaN's sign and payload are nobody's promise.
fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    let canonical = |value: f64| if value.is_nan() { f64::NAN } else { value };
    values
        .iter()
        .map(|value| canonical(value.to_param().to_f64()).to_bits())
        .collect()
}

fn agree_in_every_epilogue<T: Element>() {
    for shape in shapes() {
        for epilogue in Epilogue::ALL {
            let results: Vec<_> = Simd::all()
                .into_iter()
                .map(|simd| step::<T>(simd, THREADS_FROM, shape, epilogue))
                .collect();
            for result in &results[1..] {
                assert!(*result == results[0], "{shape} {epilogue} {}", T::DTYPE);
            }
        }
    }
}

#[test]
fn instruction_sets_agree_bit_for_bit_f16() {
    agree_in_every_epilogue::<f16>();
}

#[test]
fn instruction_sets_agree_bit_for_bit_bf16() {
    agree_in_every_epilogue::<bf16>();
}

#[test]
fn instruction_sets_agree_bit_for_bit_f32() {
    agree_in_every_epilogue::<f32>();
}

#[test]
fn instruction_sets_agree_bit_for_bit_f64() {
    agree_in_every_epilogue::<f64>();
}

#[test]
fn instruction_sets_agree_bit_for_bit_past_the_caches() {
    fn agree<T: Element>(shape: Shape, epilogue: Epilogue) {
        assert!(super::streams::<T>(&Geometry::new(shape)));
        let results: Vec<_> = Simd::all()
            .into_iter()
            .map(|simd| step::<T>(simd, THREADS_FROM, shape, epilogue))
            .collect();
        for result in &results[1..] {
            assert!(*result == results[0], "{shape} {}", T::DTYPE);
        }
    }
    // Rows that start anywhere in a line, with and without whole vectors.
    agree::<f32>(Shape::nchw(9, 3, 199, 201), Epilogue::Identity);
    agree::<f32>(Shape::nchw(9, 3, 199, 201).channels_last(), Epilogue::Identity);
    agree::<f16>(Shape::nchw(5, 512, 30, 30).channels_last(), Epilogue::Identity);
    agree::<f64>(Shape::nchw(5, 3, 199, 201).channels_last(), Epilogue::Identity);
    // Small planes, of which many share a line with the next one.
    agree::<bf16>(Shape::nchw(33, 180, 14, 14), Epilogue::AddRelu);
    // Rows of a part of the channels, each of which starts elsewhere in a line than the one before.
    agree::<f32>(Shape::nchw(4, 300, 30, 30).channels_last(), Epilogue::AddRelu);
    agree::<f16>(Shape::nchw(2200, 1000, 1, 1), Epilogue::Identity);
    agree::<f64>(Shape::nchw(2, 300, 30, 30).channels_last(), Epilogue::Identity);
}

/// The bits of y by running statistics.
fn evaluated<T: Element>(threads_from: usize, shape: Shape) -> Vec<u64> {
    let cpu = Cpu::new().threads_from(threads_from);
    let module: BatchNorm2d<Cpu, T::Param> = BatchNorm2d::new(&cpu, BatchNorm2dConfig::new(shape.channels)).unwrap();
    let x = tensor::<T>(shape, 1);
    let mut y = vec![T::default(); x.len()];
    module.forward_eval(shape, &x, &mut y).unwrap();
    y.iter().map(|y| y.to_param().to_f64().to_bits()).collect()
}

#[test]
fn numbers_of_threads_agree_bit_for_bit() {
    // Large and small, and groups too large or too few to be kept cached.
    threads_agree::<f32>([
        Shape::nchw(9, 3, 199, 201),
        Shape::nchw(16, 40, 28, 28),
        Shape::nchw(2, 3, 5, 7),
    ]);
    threads_agree::<f16>([Shape::nchw(5, 3, 99, 101), Shape::nchw(8, 40, 14, 14)]);
}

fn threads_agree<T: Element>(shapes: impl IntoIterator<Item = Shape>) {
    for shape in shapes.into_iter().flat_map(|shape| [shape, shape.channels_last()]) {
        let results = [1, 2, 3, 8].map(|threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            // Whatever the size: other threads always, and never.
            let step = |threads_from| {
                pool.install(|| {
                    let mut results = step::<T>(Simd::detect(), threads_from, shape, Epilogue::Relu);
                    results.push(evaluated::<T>(threads_from, shape));
                    results
                })
            };
            assert!(step(0) == step(usize::MAX), "{shape} on {threads} threads");
            step(0)
        });
        for result in &results[1..] {
            assert!(*result == results[0], "{shape}");
        }
    }
}
