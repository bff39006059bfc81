//! Synchronised batch norm: ranks that share a batch get what one module gets from the whole of it, all of them the same
//! bits, and an error where they do not fit together.

mod common;

use std::cell::Cell;
use std::time::{Duration, Instant};

use batchnorm_cuda::half::{bf16, f16};
use batchnorm_cuda::{
    AsTensor, AsTensorMut, Backward, BatchNorm2d, BatchNorm2dConfig, Collective, Cpu, Element, Epilogue, Error,
    Forward, Layout, Momentum, Real, Result, Shape, StateDict, SyncBackend, SyncBatchNorm, ThreadRank,
};
use common::golden::{Description, File, Part, files};
use common::{
    Case, Device, Outcome, Random, assert_near_reference, assert_same_bits, by_channel, on_every_device, run, sum,
    with_element,
};

/// Longer than any test takes: what waits this long waits in vain.
const PATIENCE: Duration = Duration::from_secs(300);

/// What one rank has after a step.
struct RankOutcome<T: Element> {
    outcome: Outcome<T>,
    values: u64,
}

/// A device that ranks can share a batch on.
trait Ranked: Device + SyncBackend {}
impl<B: Device + SyncBackend> Ranked for B {}

/// Runs `work(rank, collective)` in a thread for every rank, and gives the results in the order of the ranks.
fn on_ranks<R: Send>(ranks: usize, patience: Duration, work: impl Fn(usize, ThreadRank) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadRank::group(ranks, patience)
            .into_iter()
            .enumerate()
            .map(|(number, rank)| {
                let work = &work;
                scope.spawn(move || work(number, rank))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The images that a rank gets of a tensor: in both layouts they lie together.
fn part<T: Copy>(tensor: &[T], shape: Shape, images: &[usize], rank: usize) -> Vec<T> {
    let image = tensor.len() / shape.batch.max(1);
    let first: usize = images[..rank].iter().sum();
    tensor[first * image..(first + images[rank]) * image].to_vec()
}

/// A step of a case over ranks with so many images each.
fn synchronised<B: Ranked, T: Element>(device: &B, case: &Case<T>, images: &[usize]) -> Vec<RankOutcome<T>> {
    assert_eq!(images.iter().sum::<usize>(), case.shape.batch);
    on_ranks(images.len(), PATIENCE, |rank, collective| {
        rank_step(&device.with_own_stream(), case, images, rank, collective)
            .unwrap_or_else(|error| panic!("{}, rank {rank} of {images:?}: {error}", B::NAME))
    })
}

fn rank_step<B: Ranked, T: Element>(
    device: &B,
    case: &Case<T>,
    images: &[usize],
    rank: usize,
    collective: ThreadRank,
) -> Result<RankOutcome<T>> {
    let mut module = BatchNorm2d::<B, T::Param>::new(device, case.config.clone())?;
    module.load_state_dict(&case.state)?;
    let mut bn = SyncBatchNorm::new(module, collective)?;
    let shape = Shape {
        batch: images[rank],
        ..case.shape
    };
    let mut saved = bn.prepare_fused::<T>(shape, case.epilogue)?;
    let upload = |tensor: &[T]| device.upload(&part(tensor, case.shape, images, rank));
    let x = upload(&case.x)?;
    let z = case.z.as_deref().map(upload).transpose()?;
    let dy = upload(case.dy.as_ref().unwrap())?;
    let mut y = device.zeros::<T>(shape.len()?)?;
    let mut dx = device.zeros::<T>(shape.len()?)?;
    let mut dz = device.zeros::<T>(shape.len()?)?;

    let forward = Forward::new(&x, &mut y);
    let forward = match (case.epilogue, &z) {
        (Epilogue::AddRelu, Some(z)) => forward.add_relu(z),
        (Epilogue::Relu, _) => forward.relu(),
        _ => forward,
    };
    bn.forward_train_with(forward, &mut saved)?;
    let mut gradients = case.config.affine.then(|| bn.module().gradients()).transpose()?;
    let mut backward = Backward::new(&x, &dy).dx(&mut dx);
    backward = match case.epilogue {
        Epilogue::Identity => backward,
        Epilogue::Relu => backward.relu(),
        Epilogue::AddRelu => backward.add_relu(&y).dz(&mut dz)?,
    };
    if let Some(gradients) = &mut gradients {
        backward = backward.parameters(gradients);
    }
    bn.backward_with(backward, &mut saved)?;
    let values = saved.values_per_channel()?;
    let vector = |buffer: &B::Buffer<T::Param>| device.read(buffer);
    Ok(RankOutcome {
        outcome: Outcome {
            y: device.read(&y)?,
            dx: Some(device.read(&dx)?),
            dz: (case.epilogue == Epilogue::AddRelu)
                .then(|| device.read(&dz))
                .transpose()?,
            dweight: gradients
                .as_ref()
                .map(|gradients| vector(&gradients.weight))
                .transpose()?,
            dbias: gradients
                .as_ref()
                .map(|gradients| vector(&gradients.bias))
                .transpose()?,
            save_mean: Some(saved.mean()?),
            save_invstd: Some(saved.invstd()?),
            state: bn.module().state_dict()?,
        },
        values,
    })
}

/// The whole batch's results: the ranks' images one after another, and the sums of their parameter gradients.
fn joined<T: Element>(ranks: &[RankOutcome<T>]) -> Outcome<T> {
    let total = |of: fn(&Outcome<T>) -> &Option<Vec<T::Param>>| {
        of(&ranks[0].outcome).as_ref().map(|first| {
            let of_channel = |channel: usize| {
                let each = ranks.iter().map(|rank| of(&rank.outcome).as_ref().unwrap());
                T::Param::from_f64(sum(each.map(|sums| sums[channel].to_f64())))
            };
            (0..first.len()).map(of_channel).collect()
        })
    };
    let mut all = Outcome {
        dweight: total(|outcome| &outcome.dweight),
        dbias: total(|outcome| &outcome.dbias),
        ..ranks[0].outcome.clone()
    };
    for rank in &ranks[1..] {
        all.y.extend(&rank.outcome.y);
        for (to, from) in [(&mut all.dx, &rank.outcome.dx), (&mut all.dz, &rank.outcome.dz)] {
            if let (Some(to), Some(from)) = (to, from) {
                to.extend(from);
            }
        }
    }
    all
}

/// What all ranks must have in common, to the bit.
fn assert_ranks_agree<T: Element>(ranks: &[RankOutcome<T>]) {
    let first = &ranks[0].outcome;
    for rank in ranks {
        let Outcome {
            save_mean,
            save_invstd,
            state,
            ..
        } = &rank.outcome;
        assert_same_bits("mean", save_mean.as_ref().unwrap(), first.save_mean.as_ref().unwrap());
        assert_same_bits(
            "invstd",
            save_invstd.as_ref().unwrap(),
            first.save_invstd.as_ref().unwrap(),
        );
        if let (Some(mean), Some(var)) = (&state.running_mean, &state.running_var) {
            assert_same_bits("running_mean", mean, first.state.running_mean.as_ref().unwrap());
            assert_same_bits("running_var", var, first.state.running_var.as_ref().unwrap());
        }
        assert_eq!(state.num_batches_tracked, first.state.num_batches_tracked);
        assert_eq!(rank.values, ranks[0].values);
    }
}

/// Everything that is promised of a step over ranks.
fn check<B: Ranked, T: Element>(device: &B, case: &Case<T>, images: &[usize]) {
    let what = format!("{} over {images:?}", B::NAME);
    let ranks = synchronised(device, case, images);
    assert_ranks_agree(&ranks);
    assert_eq!(
        ranks[0].values,
        case.shape.values_per_channel().unwrap() as u64,
        "{what}"
    );

    let all = joined(&ranks);
    assert_near_reference(&what, case, &all);

    // And near what one module gets, by the same measure.
    let one = run(device, case);
    let (_, scales) = common::reference(case);
    common::assert_near::<T>(&what, case.shape, &all.values(), &one.values(), &scales, 2.0);

    let again = synchronised(device, case, images);
    for (first, second) in ranks.iter().zip(&again) {
        common::assert_same(&first.outcome, &second.outcome);
    }
}

fn ranks_get_what_one_module_gets_from_the_whole_batch<B: Ranked>(device: &B) {
    fn with<B: Ranked, T: Element>(device: &B, seed: u64) {
        let mut random = Random::new(seed);
        for (images, epilogue, layout) in [
            (&[3][..], Epilogue::Identity, Layout::Nchw),
            (&[2, 2], Epilogue::Relu, Layout::Nchw),
            (&[1, 4, 0], Epilogue::AddRelu, Layout::Nhwc),
            (&[0, 3, 1, 2], Epilogue::Identity, Layout::Nhwc),
            (&[1, 1, 2, 1, 1, 2, 1, 3], Epilogue::AddRelu, Layout::Nchw),
        ] {
            let shape = Shape {
                layout,
                ..Shape::nchw(images.iter().sum(), 5, 3, 4)
            };
            let case = Case::<T>::random(&mut random, shape, epilogue);
            check(device, &case, images);
        }
    }
    with::<B, f32>(device, 1);
    with::<B, f16>(device, 2);
    with::<B, bf16>(device, 3);
    with::<B, f64>(device, 4);
}

/// One to eight ranks, cut in many ways.
fn any_cut_of_a_batch_will_do<B: Ranked>(device: &B) {
    let mut random = Random::new(5);
    for ranks in 1..=8 {
        let images: Vec<usize> = (0..ranks)
            .map(|rank| random.below(4) + usize::from(rank == 0))
            .collect();
        let shape = Shape::nchw(images.iter().sum(), 3, 2, 3);
        let case = Case::<f32>::random(&mut random, shape, Epilogue::Identity);
        check(device, &case, &images);
        check(device, &case.in_layout(Layout::Nhwc), &images);
    }
}

/// More channels than a block has threads, and enough values that several blocks share a channel.
fn large_tensors_are_cut_as_small_ones_are<B: Ranked>(device: &B) {
    let mut random = Random::new(6);
    let case = Case::<f32>::random(&mut random, Shape::nchw(3, 300, 2, 2), Epilogue::Identity);
    check(device, &case, &[2, 1]);
    let images = B::size(40, 4);
    let case = Case::<f16>::random(&mut random, Shape::nchw(2 * images, 2, 60, 60), Epilogue::Relu);
    check(device, &case, &[images, images]);
}

fn every_configuration_is_synchronised<B: Ranked>(device: &B) {
    let mut random = Random::new(7);
    let shape = Shape::nchw(5, 4, 3, 3);
    let mut case = |change: fn(Case<f32>) -> Case<f32>| change(Case::random(&mut random, shape, Epilogue::Identity));
    check(device, &case(|case| case.affine(false)), &[3, 2]);
    check(device, &case(|case| case.track_running_stats(false)), &[3, 2]);
    let cumulative = |mut case: Case<f32>| {
        case.config = case.config.momentum(Momentum::CumulativeAverage);
        case
    };
    check(device, &case(cumulative), &[0, 3, 2]);
}

/// A large mean costs no digits, whichever rank has which pivot; and constant channels give exactly the bias.
fn statistics_are_taken_about_a_pivot<B: Ranked>(device: &B) {
    let mut random = Random::new(8);
    let shape = Shape::nchw(6, 2, 4, 4);
    let mut case = Case::<f32>::random(&mut random, shape, Epilogue::Identity);
    case.x = by_channel(shape, |_| 1e4 + 0.1 * random.normal());
    check(device, &case, &[1, 2, 3]);

    case.x = by_channel(shape, |channel| 1e7 + channel as f64);
    let ranks = synchronised(device, &case, &[1, 0, 5]);
    assert_ranks_agree(&ranks);
    let all = joined(&ranks);
    let bias = case.state.bias.as_ref().unwrap();
    let expected: Vec<f32> = by_channel(shape, |channel| bias[channel].into());
    assert_same_bits("y", &all.y, &expected);
}

/// Each rank's own values are close together, yet far from the others'.
fn ranks_may_see_very_different_values<B: Ranked>(device: &B) {
    let mut random = Random::new(9);
    let shape = Shape::nchw(4, 2, 3, 5);
    let mut case = Case::<f64>::random(&mut random, shape, Epilogue::Identity);
    let image = case.x.len() / shape.batch;
    for (at, x) in case.x.iter_mut().enumerate() {
        *x = [0.0, 100.0, -3.0, 100.5][at / image] + 0.01 * random.normal();
    }
    check(device, &case, &[1, 1, 1, 1]);
}

fn one_value_on_each_rank_is_enough<B: Ranked>(device: &B) {
    let mut random = Random::new(10);
    let case = Case::<f32>::random(&mut random, Shape::nchw(3, 4, 1, 1), Epilogue::Identity);
    check(device, &case, &[1, 1, 1]);
    check(device, &case, &[2, 0, 1]);
}

fn nan_stays_in_its_channel_on_every_rank<B: Ranked>(device: &B) {
    let mut random = Random::new(11);
    let shape = Shape::nchw(4, 3, 2, 2);
    for skip in [false, true] {
        let mut case = Case::<f32>::random(&mut random, shape, Epilogue::Identity);
        case.config = case.config.skip_non_finite(skip);
        let second_channel = shape.height * shape.width;
        case.x[3 * shape.channels * second_channel + second_channel] = f32::NAN;
        let ranks = synchronised(device, &case, &[2, 2]);
        assert_ranks_agree(&ranks);
        assert_near_reference(B::NAME, &case, &joined(&ranks));
        let kept = ranks[0].outcome.state.running_mean.as_ref().unwrap()[1];
        assert_eq!(kept.is_nan(), !skip);
    }
}

/// Nothing is counted, nothing moves, and gradients are zero.
fn a_batch_that_is_empty_everywhere_changes_nothing<B: Ranked>(device: &B) {
    let shape = Shape::nchw(0, 3, 2, 2);
    let mut case = Case::<f32>::random(&mut Random::new(12), shape, Epilogue::Identity);
    case.config = case.config.momentum(Momentum::CumulativeAverage);
    let outcomes = on_ranks(2, PATIENCE, |rank, collective| {
        rank_step(&device.with_own_stream(), &case, &[0, 0], rank, collective)
    });
    for outcome in outcomes {
        let RankOutcome { outcome, values } = outcome.unwrap();
        assert_eq!(values, 0);
        assert_eq!(outcome.state, case.state);
        assert_eq!(
            (outcome.dweight, outcome.dbias),
            (Some(vec![0.0; 3]), Some(vec![0.0; 3]))
        );
    }
}

/// A step of a rank by itself, as small as can be.
fn small_step<B: Ranked>(
    device: &B,
    config: BatchNorm2dConfig,
    shape: Shape,
    collective: ThreadRank,
) -> (Result<()>, Result<()>, Vec<f32>, StateDict<f32>) {
    let module = BatchNorm2d::<B, f32>::new(device, config).unwrap();
    let mut bn = SyncBatchNorm::new(module, collective).unwrap();
    let mut saved = bn.prepare::<f32>(shape).unwrap();
    let x = device.upload(&vec![2.0f32; shape.len().unwrap()]).unwrap();
    let mut y = device.zeros::<f32>(shape.len().unwrap()).unwrap();
    let done = bn.forward_train(&x, &mut y, &mut saved);
    let check = saved.check();
    (done, check, device.read(&y).unwrap(), bn.module().state_dict().unwrap())
}

/// On the CPU the pass says so, on CUDA the check does; the running statistics are as they were either way.
fn one_value_on_all_ranks_together_is_too_little<B: Ranked>(device: &B) {
    let shape = |rank| Shape::nchw(if rank == 1 { 1 } else { 0 }, 2, 1, 1);
    let untouched = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(2))
        .unwrap()
        .state_dict()
        .unwrap();
    let outcomes = on_ranks(3, PATIENCE, |rank, collective| {
        small_step(
            &device.with_own_stream(),
            BatchNorm2dConfig::new(2),
            shape(rank),
            collective,
        )
    });
    for (rank, (done, check, y, state)) in outcomes.into_iter().enumerate() {
        let error = Error::OneValuePerChannel { shape: shape(rank) };
        assert!(
            done == Err(error.clone()) || (done == Ok(()) && check == Err(error)),
            "{done:?}"
        );
        assert_eq!(state, untouched);
        assert!(y.iter().all(|y| y.is_finite()));
    }
    // A rank that is alone knows it before anything is launched.
    let one = Shape::nchw(1, 2, 1, 1);
    let alone = ThreadRank::group(1, PATIENCE).pop().unwrap();
    let (done, ..) = small_step(device, BatchNorm2dConfig::new(2), one, alone);
    assert_eq!(done, Err(Error::OneValuePerChannel { shape: one }));
}

fn modules_that_differ_are_refused_on_every_rank<B: Ranked>(device: &B) {
    let plain = || BatchNorm2dConfig::new(4);
    for (what, expected, got, other) in [
        ("num_features", "4", "5", BatchNorm2dConfig::new(5)),
        ("eps", "0.00001", "0.001", plain().eps(1e-3)),
        ("momentum", "0.1", "the cumulative average", plain().momentum(None)),
        ("affine", "true", "false", plain().affine(false)),
        (
            "track_running_stats",
            "true",
            "false",
            plain().track_running_stats(false),
        ),
        ("skip_non_finite", "false", "true", plain().skip_non_finite(true)),
    ] {
        let errors = on_ranks(3, PATIENCE, |rank, collective| {
            let config = if rank == 2 { other.clone() } else { plain() };
            let module = BatchNorm2d::<B, f32>::new(&device.with_own_stream(), config).unwrap();
            SyncBatchNorm::new(module, collective).err()
        });
        for error in errors {
            assert_eq!(
                error,
                Some(Error::RanksDisagree {
                    what,
                    rank: 2,
                    expected: expected.into(),
                    got: got.into()
                })
            );
        }
    }
    let errors = on_ranks(2, PATIENCE, |rank, collective| {
        let device = &device.with_own_stream();
        match rank {
            0 => SyncBatchNorm::new(BatchNorm2d::<B, f32>::new(device, plain()).unwrap(), collective).err(),
            _ => SyncBatchNorm::new(BatchNorm2d::<B, f64>::new(device, plain()).unwrap(), collective).err(),
        }
    });
    for error in errors {
        assert!(matches!(
            error,
            Some(Error::RanksDisagree {
                what: "bytes per parameter",
                rank: 1,
                ..
            })
        ));
    }
}

/// One rank goes forward while the other goes backward.
fn ranks_in_different_passes_are_found_out<B: Ranked>(device: &B) {
    let shape = Shape::nchw(2, 3, 2, 2);
    let outcomes = on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let module = BatchNorm2d::<B, f32>::new(&device, BatchNorm2dConfig::new(3)).unwrap();
        let mut bn = SyncBatchNorm::new(module, collective).unwrap();
        let mut saved = bn.prepare::<f32>(shape).unwrap();
        let x = device.upload(&(0..24).map(|x| x as f32).collect::<Vec<_>>()).unwrap();
        let mut y = device.zeros::<f32>(24).unwrap();
        bn.forward_train(&x, &mut y, &mut saved).unwrap();
        let before = bn.module().state_dict().unwrap();
        let done = match rank {
            0 => bn.forward_train(&x, &mut y, &mut saved),
            _ => bn.backward_with(Backward::new(&x, &x).dx(&mut y), &mut saved),
        };
        let check = saved.check();
        let after = bn.module().state_dict().unwrap();
        (done, check, device.read(&y).unwrap(), before == after)
    });
    for (rank, (done, check, y, unchanged)) in outcomes.into_iter().enumerate() {
        let disagree = |result: &Result<()>| matches!(result, Err(Error::RanksDisagree { what: "pass", .. }));
        assert!(unchanged, "rank {rank}");
        assert!(disagree(&check), "rank {rank}: {check:?}");
        match done {
            Ok(()) => assert!(y.iter().all(|y| y.is_nan()), "rank {rank}: {y:?}"),
            error => assert!(disagree(&error), "rank {rank}: {error:?}"),
        }
    }
}

/// Two modules of one size, which the ranks run in different orders; and then in the same one.
fn ranks_in_different_modules_are_found_out<B: Ranked>(device: &B) {
    let shape = Shape::nchw(2, 3, 2, 2);
    let outcomes = on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let collective = &collective;
        let module = || BatchNorm2d::<B, f32>::new(&device, BatchNorm2dConfig::new(3)).unwrap();
        let mut modules = [(); 2].map(|()| SyncBatchNorm::new(module(), collective).unwrap());
        let x = device.upload(&(0..24).map(|x| x as f32).collect::<Vec<_>>()).unwrap();
        let mut y = device.zeros::<f32>(24).unwrap();
        let mut saved = [0, 1].map(|number| modules[number].prepare::<f32>(shape).unwrap());
        let first = modules[rank].forward_train(&x, &mut y, &mut saved[rank]);
        let check = saved[rank].check();
        let unchanged = modules[rank].module().num_batches_tracked().unwrap() == Some(0);
        for (module, saved) in modules.iter_mut().zip(&mut saved) {
            module.forward_train(&x, &mut y, saved).unwrap();
            saved.check().unwrap();
        }
        (first.and(check), unchanged)
    });
    for (rank, (found_out, unchanged)) in outcomes.into_iter().enumerate() {
        let disagree = matches!(found_out, Err(Error::RanksDisagree { what: "pass", .. }));
        assert!(disagree && unchanged, "rank {rank}: {found_out:?}");
    }
}

/// A rank by itself, whose collective fails when it is told to.
struct Failing<'a> {
    rank: &'a ThreadRank,
    fails: &'a Cell<bool>,
}

impl<B: Ranked> Collective<B> for Failing<'_> {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_gather(&self, backend: &B, own: B::View<'_, i64>, gathered: B::ViewMut<'_, i64>) -> Result<()> {
        if self.fails.get() {
            let message = "on purpose".into();
            return Err(Error::Collective { rank: 0, message });
        }
        self.rank.all_gather(backend, own, gathered)
    }
}

/// Statistics and gradients, also those that are added up, are as they were; and the same pass works the next time.
fn a_failed_meeting_changes_nothing<B: Ranked>(device: &B) {
    let shape = Shape::nchw(2, 3, 2, 2);
    let rank = ThreadRank::group(1, PATIENCE).pop().unwrap();
    let fails = Cell::new(false);
    let module = BatchNorm2d::<B, f32>::new(device, BatchNorm2dConfig::new(3)).unwrap();
    let mut bn = SyncBatchNorm::new(
        module,
        Failing {
            rank: &rank,
            fails: &fails,
        },
    )
    .unwrap();
    let mut saved = bn.prepare::<f32>(shape).unwrap();
    let case = Case::<f32>::random(&mut Random::new(14), shape, Epilogue::Identity);
    let (x, dy) = (
        device.upload(&case.x).unwrap(),
        device.upload(case.dy.as_ref().unwrap()).unwrap(),
    );
    let mut y = device.zeros::<f32>(24).unwrap();
    let mut dx = device.zeros::<f32>(24).unwrap();
    let mut gradients = bn.module().gradients().unwrap();

    let before = bn.module().state_dict().unwrap();
    fails.set(true);
    let failed = bn.forward_train(&x, &mut y, &mut saved);
    assert!(matches!(failed, Err(Error::Collective { .. })), "{failed:?}");
    assert_eq!(bn.module().state_dict().unwrap(), before);
    assert_eq!(saved.mean(), Err(Error::SavedEmpty));
    fails.set(false);
    bn.forward_train(&x, &mut y, &mut saved).unwrap();
    assert_eq!(bn.module().num_batches_tracked().unwrap(), Some(1));

    let mut add = || {
        let backward = Backward::new(&x, &dy).dx(&mut dx).accumulate_parameters(&mut gradients);
        let done = bn.backward_with(backward, &mut saved);
        (
            done,
            device.read(&gradients.weight).unwrap(),
            device.read(&gradients.bias).unwrap(),
        )
    };
    let (done, weight, bias) = add();
    done.unwrap();
    fails.set(true);
    let (failed, weight_after, bias_after) = add();
    assert!(matches!(failed, Err(Error::Collective { .. })), "{failed:?}");
    assert_eq!((&weight_after, &bias_after), (&weight, &bias));
    fails.set(false);
    let (done, weight_after, _) = add();
    done.unwrap();
    let twice: Vec<f32> = weight.iter().map(|gradient| 2.0 * gradient).collect();
    assert_same_bits("dweight, added twice", &weight_after, &twice);
}

/// A wrong argument is found before the others are met: they wait, and the rank may try again.
fn a_rank_may_call_again_after_a_wrong_argument<B: Ranked>(device: &B) {
    let shape = Shape::nchw(2, 3, 2, 2);
    let means = on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let module = BatchNorm2d::<B, f32>::new(&device, BatchNorm2dConfig::new(3)).unwrap();
        let mut bn = SyncBatchNorm::new(module, collective).unwrap();
        let mut saved = bn.prepare::<f32>(shape).unwrap();
        let x = device.upload(&[rank as f32; 24]).unwrap();
        let mut y = device.zeros::<f32>(24).unwrap();
        if rank == 0 {
            let short = device.upload(&[0.0f32; 23]).unwrap();
            let error = bn.forward_train(&short, &mut y, &mut saved).unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Length {
                        argument: "x",
                        got: 23,
                        ..
                    }
                ),
                "{error}"
            );
            let relu = bn.forward_train_with(Forward::new(&x, &mut y).relu(), &mut saved);
            assert!(matches!(relu, Err(Error::SavedMismatch { what: "epilogue", .. })));
            let backward = bn.backward_with(Backward::in_place(&x, &mut y), &mut saved);
            assert_eq!(backward, Err(Error::SavedEmpty));
        }
        bn.forward_train(&x, &mut y, &mut saved).unwrap();
        saved.mean().unwrap()
    });
    assert_eq!(means, [vec![0.5; 3], vec![0.5; 3]]);
}

/// The gradients at weight and bias need no other rank, and do not wait for one.
fn parameter_gradients_alone_meet_nobody<B: Ranked>(device: &B) {
    let shape = Shape::nchw(1, 2, 2, 2);
    let biases = on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let module = BatchNorm2d::<B, f32>::new(&device, BatchNorm2dConfig::new(2)).unwrap();
        let mut bn = SyncBatchNorm::new(module, collective).unwrap();
        let mut saved = bn.prepare::<f32>(shape).unwrap();
        let x = device.upload(&(0..8).map(|x| x as f32).collect::<Vec<_>>()).unwrap();
        let mut y = device.zeros::<f32>(8).unwrap();
        bn.forward_train(&x, &mut y, &mut saved).unwrap();
        let mut gradients = bn.module().gradients().unwrap();
        if rank == 0 {
            let backward = Backward::new(&x, &x).parameters(&mut gradients);
            bn.backward_with(backward, &mut saved).unwrap();
        }
        device.read(&gradients.bias).unwrap()
    });
    assert_eq!(biases, [vec![6.0, 22.0], vec![0.0, 0.0]]);
}

/// As PyTorch's evaluation: by the running statistics, without the other ranks.
fn evaluation_is_the_modules_own<B: Ranked>(device: &B) {
    let shape = Shape::nchw(1, 2, 1, 1);
    let means = on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let module = BatchNorm2d::<B, f32>::new(&device, BatchNorm2dConfig::new(2).eps(0.0)).unwrap();
        let mut bn = SyncBatchNorm::new(module, collective).unwrap();
        bn.module_mut()
            .load_state_dict(&StateDict {
                weight: Some(vec![1.0, 2.0]),
                bias: Some(vec![rank as f32, 0.0]),
                running_mean: Some(vec![1.0, 1.0]),
                running_var: Some(vec![4.0, 4.0]),
                num_batches_tracked: Some(1),
            })
            .unwrap();
        let x = device.upload(&[5.0f32, 3.0]).unwrap();
        let y = bn.into_module().forward_eval_alloc(shape, &x).unwrap();
        device.read(&y).unwrap()
    });
    assert_eq!(means, [vec![2.0, 2.0], vec![3.0, 2.0]]);
}

/// `dx` may lie over `dy`.
fn the_gradient_may_replace_that_at_the_output<B: Ranked>(device: &B) {
    let shape = Shape::nchw(2, 3, 2, 2);
    let case = Case::<f32>::random(&mut Random::new(13), shape, Epilogue::Identity);
    on_ranks(2, PATIENCE, |rank, collective| {
        let device = device.with_own_stream();
        let images = [1, 1];
        let module = BatchNorm2d::<B, f32>::new(&device, case.config.clone()).unwrap();
        let mut bn = SyncBatchNorm::new(module, collective).unwrap();
        let mut saved = bn.prepare::<f32>(Shape { batch: 1, ..shape }).unwrap();
        let upload = |tensor: &[f32]| device.upload(&part(tensor, shape, &images, rank)).unwrap();
        let (x, mut dy) = (upload(&case.x), upload(case.dy.as_ref().unwrap()));
        let mut y = device.zeros::<f32>(12).unwrap();
        let mut dx = device.zeros::<f32>(12).unwrap();
        bn.forward_train(&x, &mut y, &mut saved).unwrap();
        bn.backward_with(Backward::new(&x, &dy).dx(&mut dx), &mut saved)
            .unwrap();
        bn.backward_with(Backward::in_place(&x, &mut dy), &mut saved).unwrap();
        assert_same_bits("dx", &device.read(&dy).unwrap(), &device.read(&dx).unwrap());
    });
}

/// PyTorch's training steps, with the float64 truth: the first image on one rank, none on the next, the others on the last.
fn pytorchs_steps_are_right_when_cut_into_ranks<B: Ranked>(device: &B) {
    fn check_file<B: Ranked, T: Element>(device: &B, file: &File, about: &Description) {
        let case: Case<T> = file.case(about).unwrap();
        let truth = file.truth::<T>(about).unwrap();
        let ranks = synchronised(device, &case, &[1, 0, case.shape.batch - 1]);
        assert_ranks_agree(&ranks);
        let mut got = joined(&ranks).values();
        if about.part == Part::Backward {
            // The file says nothing of the forward pass.
            got.y = None;
        }
        let (_, scales) = common::reference(&case);
        let what = format!("{}, {}", B::NAME, file.name());
        common::assert_near::<T>(&what, case.shape, &got, &truth, &scales, 1.0);
    }
    let mut steps = 0;
    for path in files() {
        let file = File::read(&path).unwrap();
        if file.is_state_dict() {
            continue;
        }
        let about = file.describe().unwrap();
        if !about.training || about.part == Part::Forward || about.shape.batch < 2 {
            continue;
        }
        with_element!(about.dtype, T => check_file::<B, T>(device, &file, &about));
        steps += 1;
    }
    assert!(steps >= 50, "{steps} steps are not all of them");
}

on_every_device!(
    pytorchs_steps_are_right_when_cut_into_ranks,
    ranks_get_what_one_module_gets_from_the_whole_batch,
    any_cut_of_a_batch_will_do,
    large_tensors_are_cut_as_small_ones_are,
    every_configuration_is_synchronised,
    statistics_are_taken_about_a_pivot,
    ranks_may_see_very_different_values,
    one_value_on_each_rank_is_enough,
    nan_stays_in_its_channel_on_every_rank,
    a_batch_that_is_empty_everywhere_changes_nothing,
    one_value_on_all_ranks_together_is_too_little,
    modules_that_differ_are_refused_on_every_rank,
    ranks_in_different_passes_are_found_out,
    ranks_in_different_modules_are_found_out,
    a_rank_may_call_again_after_a_wrong_argument,
    a_failed_meeting_changes_nothing,
    parameter_gradients_alone_meet_nobody,
    evaluation_is_the_modules_own,
    the_gradient_may_replace_that_at_the_output,
);

/// The words that a rank gathers, by the CPU.
fn gather(rank: &ThreadRank, own: &[i64], ranks: usize) -> Result<Vec<i64>> {
    let mut gathered = vec![0; own.len() * ranks];
    rank.all_gather(&Cpu::new(), own.view(), gathered.view_mut())?;
    Ok(gathered)
}

#[test]
fn threads_gather_in_the_order_of_the_ranks() {
    let rounds = on_ranks(4, PATIENCE, |rank, group| {
        (0..200)
            .map(|round| gather(&group, &[rank as i64, round], 4).unwrap())
            .collect::<Vec<_>>()
    });
    for rank in rounds {
        for (round, gathered) in rank.into_iter().enumerate() {
            let round = round as i64;
            assert_eq!(gathered, [0, round, 1, round, 2, round, 3, round]);
        }
    }
}

#[test]
fn messages_of_different_lengths_are_an_error_on_every_rank() {
    let errors = on_ranks(3, PATIENCE, |rank, group| {
        gather(&group, &[0, 0][..2 - rank / 2], 3).unwrap_err()
    });
    for error in errors {
        assert_eq!(
            error,
            Error::RanksDisagree {
                what: "length of a message",
                rank: 2,
                expected: "2 words".into(),
                got: "1 words".into()
            }
        );
    }
}

#[test]
fn a_rank_that_leaves_is_an_error_for_the_others_at_once() {
    let start = Instant::now();
    let outcomes = on_ranks(3, PATIENCE, |rank, group| {
        gather(&group, &[1], 3).unwrap();
        if rank == 1 {
            drop(group);
            return Ok(vec![]);
        }
        gather(&group, &[2], 3)
    });
    assert!(start.elapsed() < PATIENCE / 2);
    for rank in [0, 2] {
        assert!(
            matches!(outcomes[rank], Err(Error::Collective { rank: 1, .. })),
            "{:?}",
            outcomes[rank]
        );
    }
}

#[test]
fn a_rank_that_panics_is_an_error_for_the_others() {
    let outcome = std::thread::scope(|scope| {
        let mut group = ThreadRank::group(2, PATIENCE);
        let (second, first) = (group.pop().unwrap(), group.pop().unwrap());
        let panics = scope.spawn(move || {
            let _group = second;
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        let outcome = scope.spawn(move || gather(&first, &[0], 2)).join().unwrap();
        assert!(panics.join().is_err());
        outcome
    });
    assert!(matches!(outcome, Err(Error::Collective { rank: 1, .. })), "{outcome:?}");
}

#[test]
fn waiting_ends_when_the_time_is_up_for_all_ranks() {
    let limit = Duration::from_millis(50);
    let outcomes = on_ranks(3, limit, |rank, group| {
        if rank == 2 {
            // Alive, and silent for longer than the others wait.
            std::thread::sleep(20 * limit);
        }
        gather(&group, &[0], 3)
    });
    for outcome in outcomes {
        let Err(Error::Collective { message, .. }) = &outcome else {
            panic!("{outcome:?}");
        };
        assert!(message.contains("waited 50ms for ranks [2"), "{message}");
    }
}

#[test]
fn saved_of_another_group_is_refused() {
    let module = || BatchNorm2d::<Cpu>::new(&Cpu::new(), BatchNorm2dConfig::new(1)).unwrap();
    let alone = ThreadRank::group(1, PATIENCE).pop().unwrap();
    let bn = SyncBatchNorm::new(module(), alone).unwrap();
    let mut saved = bn.prepare::<f32>(Shape::nchw(1, 1, 1, 2)).unwrap();
    let pair = on_ranks(2, PATIENCE, |_, group| SyncBatchNorm::new(module(), group).unwrap());
    for mut bn in pair {
        let error = bn.forward_train(&[1.0f32, 2.0], &mut [0.0; 2], &mut saved).unwrap_err();
        assert!(matches!(error, Error::SavedMismatch { what: "group", .. }), "{error}");
    }
}
