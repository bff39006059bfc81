//! State dicts: what PyTorch wrote goes in, what goes out PyTorch can read, and what is wrong changes nothing.

mod common;

use std::collections::HashMap;
use std::path::Path;

use batchnorm_cuda::{
    BatchNorm2d, BatchNorm2dConfig, Epilogue, Error, Forward, Momentum, Result, Shape, StateDict, StateError,
};
use common::golden::{File, Tensor, folder};
use common::{Case, Device, Random, on_every_device};
use safetensors::tensor::{Dtype, TensorView};

on_every_device!(
    new_module_has_pytorchs_initial_state,
    round_trip_through_a_dict,
    round_trip_through_bytes_and_files,
    round_trip_keeps_special_numbers,
    file_of_pytorch,
    entries_of_a_network_by_prefix,
    missing_key,
    unexpected_key,
    wrong_shape,
    wrong_dtype,
    malformed_bytes,
    file_errors,
    loading_keeps_addresses,
    loading_sets_what_evaluation_uses,
    resetting,
    count_of_batches_goes_on,
    not_finite_batches_can_be_kept_out,
    an_infinite_variance_is_kept_out,
);

const CHANNELS: usize = 5;
const NAMES: [&str; 5] = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"];

fn some_state(seed: u64) -> StateDict<f32> {
    Case::<f32>::random(
        &mut Random::new(seed),
        Shape::nchw(1, CHANNELS, 1, 2),
        Epilogue::Identity,
    )
    .state
}

fn module<B: Device>(device: &B) -> BatchNorm2d<B> {
    let mut module = BatchNorm2d::new(device, BatchNorm2dConfig::new(CHANNELS)).unwrap();
    module.load_state_dict(&some_state(1)).unwrap();
    module
}

/// A safetensors file of these entries, made without the library.
fn file(entries: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = entries
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Loads bytes that must be refused with this error, and change nothing.
#[track_caller]
fn refuses<B: Device>(device: &B, expected: StateError, bytes: &[u8], prefix: &str) {
    let mut module = module(device);
    let refused = module.load_safetensors(bytes, prefix).unwrap_err();
    assert_eq!(refused, Error::State(expected));
    assert_eq!(module.state_dict().unwrap(), some_state(1));
}

fn new_module_has_pytorchs_initial_state<B: Device>(device: &B) {
    let state = |config| {
        BatchNorm2d::<B, f32>::new(device, config)
            .unwrap()
            .state_dict()
            .unwrap()
    };
    let config = BatchNorm2dConfig::new(3);
    let full = StateDict {
        weight: Some(vec![1.0; 3]),
        bias: Some(vec![0.0; 3]),
        running_mean: Some(vec![0.0; 3]),
        running_var: Some(vec![1.0; 3]),
        num_batches_tracked: Some(0),
    };
    assert_eq!(state(config.clone()), full);
    let no_affine = StateDict {
        weight: None,
        bias: None,
        ..full.clone()
    };
    assert_eq!(state(config.clone().affine(false)), no_affine);
    let no_track = StateDict {
        weight: full.weight,
        bias: full.bias,
        ..StateDict::default()
    };
    assert_eq!(state(config.clone().track_running_stats(false)), no_track);
    assert_eq!(
        state(config.affine(false).track_running_stats(false)),
        StateDict::default()
    );
}

fn round_trip_through_a_dict<B: Device>(device: &B) {
    for affine in [false, true] {
        for track in [false, true] {
            let config = BatchNorm2dConfig::new(CHANNELS)
                .affine(affine)
                .track_running_stats(track);
            let shape = Shape::nchw(1, CHANNELS, 1, 2);
            let state = Case::<f64>::random(&mut Random::new(2), shape, Epilogue::Identity)
                .affine(affine)
                .track_running_stats(track)
                .state;
            let mut module = BatchNorm2d::<B, f64>::new(device, config).unwrap();
            module.load_state_dict(&state).unwrap();
            assert_eq!(module.state_dict().unwrap(), state);
            assert_eq!(module.num_batches_tracked().unwrap(), state.num_batches_tracked);
        }
    }
}

fn round_trip_through_bytes_and_files<B: Device>(device: &B) {
    let folder = tempfile::tempdir().unwrap();
    for prefix in ["", "bn1.", "layer1.0.bn1."] {
        let state = some_state(3);
        let bytes = state.to_safetensors(prefix).unwrap();
        assert_eq!(StateDict::from_safetensors(&bytes, prefix).unwrap(), state);
        let mut module = module(device);
        module.load_safetensors(&bytes, prefix).unwrap();
        assert_eq!(module.state_dict().unwrap(), state);
        assert_eq!(
            module.to_safetensors(prefix).unwrap(),
            bytes,
            "the same state, the same bytes"
        );

        let path = folder.path().join(format!("{prefix}safetensors"));
        // Over a file that is there, too.
        std::fs::write(&path, "something else, and longer than the state dict".repeat(100)).unwrap();
        module.save_safetensors_file(&path, prefix).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let mut other = self::module(device);
        other.load_safetensors_file(&path, prefix).unwrap();
        assert_eq!(other.state_dict().unwrap(), state);
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 3, "temporary files are gone: {names:?}");
}

fn round_trip_keeps_special_numbers<B: Device>(device: &B) {
    let mut state = some_state(4);
    let special = [
        -0.0,
        f32::INFINITY,
        f32::MIN_POSITIVE / 4.0,
        f32::MAX,
        f32::NEG_INFINITY,
    ];
    state.running_mean = Some(special.into());
    state.weight = Some(vec![f32::NAN; CHANNELS]);
    state.num_batches_tracked = Some(i64::MAX);
    let mut module = module(device);
    module.load_safetensors(&state.to_safetensors("").unwrap(), "").unwrap();
    let got = module.state_dict().unwrap();
    let bits = |values: &Option<Vec<f32>>| {
        values
            .as_ref()
            .unwrap()
            .iter()
            .map(|value| value.to_bits())
            .collect::<Vec<_>>()
    };
    assert_eq!(bits(&got.running_mean), bits(&state.running_mean));
    assert!(got.weight.unwrap().iter().all(|weight| weight.is_nan()));
    assert_eq!(got.num_batches_tracked, Some(i64::MAX));
}

/// `torch.nn.BatchNorm2d(8).state_dict()` after three steps, as `safetensors.torch.save_file` wrote it.
fn file_of_pytorch<B: Device>(device: &B) {
    let path = folder().join("state_dict_bn8.safetensors");
    let mut module = BatchNorm2d::<B>::new(device, BatchNorm2dConfig::new(8)).unwrap();
    module.load_safetensors_file(&path, "").unwrap();
    assert_eq!(module.num_batches_tracked().unwrap(), Some(3));

    let written = tempfile::NamedTempFile::new().unwrap();
    module.save_safetensors_file(written.path(), "").unwrap();
    let (ours, theirs) = (File::read(written.path()).unwrap(), File::read(&path).unwrap());
    assert_eq!(ours.tensors, theirs.tensors);
    let names: Vec<_> = ours.tensors.keys().map(String::as_str).collect();
    let mut expected = NAMES;
    expected.sort_unstable();
    assert_eq!(names, expected);
    let count = &ours.tensors["num_batches_tracked"];
    assert_eq!(
        *count,
        Tensor {
            dtype: "i64".into(),
            shape: vec![],
            bytes: 3i64.to_le_bytes().into()
        }
    );
    // By this entry PyTorch's tools know whose file it is.
    assert_eq!(ours.metadata, HashMap::from([("format".into(), "pt".into())]));

    // The golden evaluation from that very state.
    let case: Case<f32> = {
        let file = File::named("state_dict_bn8_eval");
        file.case(&file.describe().unwrap()).unwrap()
    };
    assert_eq!(module.state_dict().unwrap(), case.state);
}

fn entries_of_a_network_by_prefix<B: Device>(device: &B) {
    let (first, second) = (some_state(5), some_state(6));
    let parts = [
        first.to_safetensors("layer1.bn1.").unwrap(),
        second.to_safetensors("layer1.bn10.").unwrap(),
    ];
    let opened = parts
        .each_ref()
        .map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
    let convolution = f32s(&[1.0; 6]);
    let mut entries: Vec<_> = opened.iter().flat_map(|file| file.tensors()).collect();
    entries.push((
        "layer1.conv1.weight".into(),
        TensorView::new(Dtype::F32, vec![1, 2, 3, 1], &convolution).unwrap(),
    ));
    let network = safetensors::serialize(entries, None).unwrap();

    let mut module = module(device);
    module.load_safetensors(&network, "layer1.bn1.").unwrap();
    assert_eq!(module.state_dict().unwrap(), first);
    module.load_safetensors(&network, "layer1.bn10.").unwrap();
    assert_eq!(module.state_dict().unwrap(), second);

    // Names are under a prefix as they stand: without it the network's other entries are this module's.
    refuses(
        device,
        StateError::UnexpectedKey {
            key: "layer1.bn1.bias".into(),
        },
        &network,
        "",
    );
    refuses(
        device,
        StateError::MissingKey {
            key: "layer2.weight".into(),
        },
        &network,
        "layer2.",
    );
    refuses(
        device,
        StateError::UnexpectedKey {
            key: "layer1.bn1.bias".into(),
        },
        &network,
        "layer1.bn1",
    );
}

fn missing_key<B: Device>(device: &B) {
    for missing in NAMES {
        let state = without(some_state(7), missing);
        for prefix in ["", "bn."] {
            let expected = StateError::MissingKey {
                key: format!("{prefix}{missing}"),
            };
            refuses(device, expected, &state.to_safetensors(prefix).unwrap(), prefix);
        }
        let mut module = module(device);
        let refused = module.load_state_dict(&state).unwrap_err();
        assert_eq!(refused, Error::State(StateError::MissingKey { key: missing.into() }));
        assert_eq!(module.state_dict().unwrap(), some_state(1));
    }
}

fn unexpected_key<B: Device>(device: &B) {
    // An entry that no batch normalisation has.
    let state = some_state(8).to_safetensors("bn.").unwrap();
    let opened = safetensors::SafeTensors::deserialize(&state).unwrap();
    let mut entries = opened.tensors();
    let one = f32s(&[1.0]);
    entries.push((
        "bn.running_std".into(),
        TensorView::new(Dtype::F32, vec![1], &one).unwrap(),
    ));
    let bytes = safetensors::serialize(entries, None).unwrap();
    let key = "bn.running_std".to_owned();
    refuses(device, StateError::UnexpectedKey { key }, &bytes, "bn.");

    // Entries that this module has no place for.
    for (config, name) in [
        (BatchNorm2dConfig::new(CHANNELS).affine(false), "weight"),
        (
            BatchNorm2dConfig::new(CHANNELS).track_running_stats(false),
            "running_mean",
        ),
    ] {
        let mut module = BatchNorm2d::<B>::new(device, config).unwrap();
        let before = module.state_dict().unwrap();
        let expected = |key: &str| Error::State(StateError::UnexpectedKey { key: key.into() });
        assert_eq!(module.load_state_dict(&some_state(8)), Err(expected(name)));
        assert_eq!(
            module.load_safetensors(&state, "bn."),
            Err(expected(&format!("bn.{name}")))
        );
        assert_eq!(module.state_dict().unwrap(), before);
    }
}

fn wrong_shape<B: Device>(device: &B) {
    for len in [0, 1, CHANNELS - 1, CHANNELS + 1] {
        for name in &NAMES[..4] {
            let mut state = some_state(9);
            *vector(&mut state, name) = Some(vec![1.0; len]);
            let expected = |key: &str| StateError::Shape {
                key: key.into(),
                expected: vec![CHANNELS],
                got: vec![len],
            };
            let mut module = module(device);
            assert_eq!(module.load_state_dict(&state), Err(Error::State(expected(name))));
            assert_eq!(module.state_dict().unwrap(), some_state(1));
            let bytes = state.to_safetensors("a.").unwrap();
            refuses(device, expected(&format!("a.{name}")), &bytes, "a.");
        }
    }
    // The right number of values in the wrong number of dimensions.
    let bytes = file(&[("weight", Dtype::F32, &[CHANNELS, 1], f32s(&[1.0; CHANNELS]))]);
    let expected = StateError::Shape {
        key: "weight".into(),
        expected: vec![CHANNELS],
        got: vec![CHANNELS, 1],
    };
    refuses(device, expected, &bytes, "");
    for shape in [&[1][..], &[2], &[1, 1], &[0]] {
        let len: usize = shape.iter().product();
        let bytes = file(&[("num_batches_tracked", Dtype::I64, shape, vec![0; 8 * len])]);
        let expected = StateError::Shape {
            key: "num_batches_tracked".into(),
            expected: vec![],
            got: shape.into(),
        };
        refuses(device, expected, &bytes, "");
    }
}

fn wrong_dtype<B: Device>(device: &B) {
    let dtypes = [
        (Dtype::F16, "f16", 2),
        (Dtype::BF16, "bf16", 2),
        (Dtype::F64, "f64", 8),
        (Dtype::I64, "i64", 8),
    ];
    for (dtype, got, size) in dtypes {
        for name in &NAMES[..4] {
            let bytes = file(&[(name, dtype, &[CHANNELS], vec![0; CHANNELS * size])]);
            let expected = StateError::Dtype {
                key: (*name).into(),
                expected: "f32".into(),
                got: got.into(),
            };
            refuses(device, expected, &bytes, "");
        }
    }
    for (dtype, got, size) in [(Dtype::I32, "i32", 4), (Dtype::F32, "f32", 4), (Dtype::U64, "u64", 8)] {
        let bytes = file(&[("num_batches_tracked", dtype, &[], vec![0; size])]);
        let expected = StateError::Dtype {
            key: "num_batches_tracked".into(),
            expected: "i64".into(),
            got: got.into(),
        };
        refuses(device, expected, &bytes, "");
    }

    let mut double = BatchNorm2d::<B, f64>::new(device, BatchNorm2dConfig::new(CHANNELS)).unwrap();
    let before = double.state_dict().unwrap();
    let expected = StateError::Dtype {
        key: "bias".into(),
        expected: "f64".into(),
        got: "f32".into(),
    };
    let single = some_state(10).to_safetensors("").unwrap();
    assert_eq!(double.load_safetensors(&single, ""), Err(Error::State(expected)));
    assert_eq!(double.state_dict().unwrap(), before);
}

fn malformed_bytes<B: Device>(device: &B) {
    let whole = some_state(11).to_safetensors("").unwrap();
    let refused = |bytes: &[u8]| {
        let mut module = module(device);
        let refused = module.load_safetensors(bytes, "").unwrap_err();
        assert!(
            matches!(refused, Error::State(StateError::Malformed { .. })),
            "{refused}"
        );
        assert_eq!(module.state_dict().unwrap(), some_state(1));
    };
    // Cut short wherever: in the length, in the header, in the data.
    for len in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        refused(&whole[..len]);
    }
    refused(&[&whole[..], &[0]].concat());
    refused(b"no safetensors at all, just text");
    // A header that says more than there is.
    let mut long_header = whole.clone();
    long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&long_header);
    let mut broken_header = whole;
    broken_header[8] = b'[';
    refused(&broken_header);
}

fn file_errors<B: Device>(device: &B) {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing").join("file.safetensors");
    let mut module = module(device);
    let names_path = |refused: Result<()>, path: &Path| match refused {
        Err(Error::State(StateError::File { path: named, message })) => {
            assert_eq!(named, path.display().to_string());
            assert!(!message.is_empty());
        }
        other => panic!("{other:?}"),
    };
    names_path(module.load_safetensors_file(&missing, ""), &missing);
    names_path(module.save_safetensors_file(&missing, ""), &missing);
    // A folder is no file, neither to read nor to write.
    names_path(module.load_safetensors_file(folder.path(), ""), folder.path());
    let occupied = folder.path().join("occupied");
    std::fs::create_dir_all(occupied.join("by something")).unwrap();
    names_path(module.save_safetensors_file(&occupied, ""), &occupied);
    assert_eq!(module.state_dict().unwrap(), some_state(1));
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "no temporary file is left behind"
    );

    // A file that breaks off is refused like its bytes.
    let broken = folder.path().join("broken.safetensors");
    let bytes = some_state(12).to_safetensors("").unwrap();
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    let refused = module.load_safetensors_file(&broken, "").unwrap_err();
    assert!(
        matches!(refused, Error::State(StateError::Malformed { .. })),
        "{refused}"
    );
    assert_eq!(module.state_dict().unwrap(), some_state(1));
}

/// Who holds a view of the parameters (an optimiser, a captured graph) holds the new values after loading.
fn loading_keeps_addresses<B: Device>(device: &B) {
    let mut module = module(device);
    let addresses = |module: &BatchNorm2d<B>| {
        let buffers = [
            module.weight(),
            module.bias(),
            module.running_mean(),
            module.running_var(),
        ];
        buffers.map(|buffer| B::address(buffer.unwrap()))
    };
    let before = addresses(&module);
    module.load_state_dict(&some_state(13)).unwrap();
    module
        .load_safetensors(&some_state(14).to_safetensors("").unwrap(), "")
        .unwrap();
    module.reset_running_stats().unwrap();
    module.reset_parameters().unwrap();
    assert_eq!(addresses(&module), before);
}

fn loading_sets_what_evaluation_uses<B: Device>(device: &B) {
    let shape = Shape::nchw(2, CHANNELS, 3, 2);
    let case = Case::<f32>::random(&mut Random::new(15), shape, Epilogue::Identity)
        .evaluation()
        .forward_only();
    let mut module = module(device);
    module
        .load_safetensors(&case.state.to_safetensors("bn.").unwrap(), "bn.")
        .unwrap();
    let x = device.upload(&case.x).unwrap();
    let y = module.forward_eval_alloc(shape, &x).unwrap();
    let want = common::reference(&case).0.y.unwrap();
    for (got, want) in B::download(device, &y).unwrap().into_iter().zip(want) {
        approx::assert_relative_eq!(f64::from(got), want, max_relative = 1e-5, epsilon = 1e-6);
    }
}

fn resetting<B: Device>(device: &B) {
    let initial = BatchNorm2d::<B>::new(device, BatchNorm2dConfig::new(CHANNELS))
        .unwrap()
        .state_dict()
        .unwrap();
    let mut module = module(device);
    module.reset_running_stats().unwrap();
    let expected = StateDict {
        weight: some_state(1).weight,
        bias: some_state(1).bias,
        ..initial.clone()
    };
    assert_eq!(module.state_dict().unwrap(), expected);
    module.load_state_dict(&some_state(1)).unwrap();
    module.reset_parameters().unwrap();
    assert_eq!(module.state_dict().unwrap(), initial);

    for config in [
        BatchNorm2dConfig::new(CHANNELS).affine(false),
        BatchNorm2dConfig::new(CHANNELS).track_running_stats(false),
    ] {
        let mut module = BatchNorm2d::<B>::new(device, config).unwrap();
        let before = module.state_dict().unwrap();
        module.reset_parameters().unwrap();
        assert_eq!(module.state_dict().unwrap(), before);
    }
}

/// The cumulative average goes on from a loaded count: the factor is 1 / (count + 1).
fn count_of_batches_goes_on<B: Device>(device: &B) {
    let shape = Shape::nchw(2, CHANNELS, 3, 2);
    for counted in [0, 1, 99, i64::from(u32::MAX)] {
        let mut case = Case::<f32>::random(&mut Random::new(16), shape, Epilogue::Identity).forward_only();
        case.config = case.config.momentum(Momentum::CumulativeAverage);
        case.state.num_batches_tracked = Some(counted);
        let outcome = common::run(device, &case);
        assert_eq!(outcome.state.num_batches_tracked, Some(counted + 1));
        common::assert_near_reference(B::NAME, &case, &outcome);
    }
}

/// As PyTorch, a batch with an infinity spoils the statistics of its channel; unless they are told to skip it.
fn not_finite_batches_can_be_kept_out<B: Device>(device: &B) {
    let shape = Shape::nchw(2, CHANNELS, 3, 2);
    for not_finite in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for skip in [false, true] {
            let mut case = Case::<f32>::random(&mut Random::new(17), shape, Epilogue::Identity).forward_only();
            case.config = case.config.skip_non_finite(skip);
            case.x[common::channel_indices(shape, 3).nth(5).unwrap()] = not_finite;
            let outcome = common::run(device, &case);
            common::assert_near_reference(B::NAME, &case, &outcome);
            let (before, after) = (case.state, outcome.state);
            let kept = after.running_mean.as_ref().unwrap()[3] == before.running_mean.as_ref().unwrap()[3]
                && after.running_var.as_ref().unwrap()[3] == before.running_var.as_ref().unwrap()[3];
            assert_eq!(kept, skip);
            assert_eq!(after.num_batches_tracked, Some(8), "the batch is counted all the same");
        }
    }
}

/// A variance alone can be infinite: its values are finite, and so is their mean.
fn an_infinite_variance_is_kept_out<B: Device>(device: &B) {
    let shape = Shape::nchw(2, CHANNELS, 3, 2);
    let mut case = Case::<f32>::random(&mut Random::new(18), shape, Epilogue::Identity).forward_only();
    case.config = case.config.skip_non_finite(true);
    for (at, index) in common::channel_indices(shape, 3).enumerate() {
        case.x[index] = if at % 2 == 0 { 1e20 } else { -1e20 };
    }
    let outcome = common::run(device, &case);
    let (before, after) = (case.state, outcome.state);
    assert_eq!(after.running_mean.unwrap()[3], before.running_mean.unwrap()[3]);
    assert_eq!(after.running_var.unwrap()[3], before.running_var.unwrap()[3]);
}

fn vector<'a>(state: &'a mut StateDict<f32>, name: &str) -> &'a mut Option<Vec<f32>> {
    match name {
        "weight" => &mut state.weight,
        "bias" => &mut state.bias,
        "running_mean" => &mut state.running_mean,
        "running_var" => &mut state.running_var,
        _ => panic!("{name} is no vector"),
    }
}

fn without(mut state: StateDict<f32>, name: &str) -> StateDict<f32> {
    match name {
        "num_batches_tracked" => state.num_batches_tracked = None,
        name => *vector(&mut state, name) = None,
    }
    state
}

/// A saved file is an ordinary file, which others may read as far as the umask allows, not one for its owner's eyes alone.
#[cfg(unix)]
#[test]
fn saved_file_has_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (ours, ordinary) = (folder.path().join("ours"), folder.path().join("ordinary"));
    module(&common::cpu()).save_safetensors_file(&ours, "").unwrap();
    std::fs::write(&ordinary, "").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&ordinary));
}

/// One reader after the other finds a whole file, whenever it looks, while the file is written again and again.
#[test]
fn saved_file_is_never_half_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let (first, second) = (some_state(18), some_state(19));
    let write = |state: &StateDict<f32>| {
        let mut module = module(&common::cpu());
        module.load_state_dict(state).unwrap();
        module.save_safetensors_file(&path, "").unwrap();
    };
    write(&first);
    std::thread::scope(|threads| {
        let writer = threads.spawn(|| {
            for _ in 0..50 {
                write(&second);
                write(&first);
            }
        });
        let mut looks = 0;
        while looks == 0 || !writer.is_finished() {
            let found = StateDict::<f32>::from_safetensors(&std::fs::read(&path).unwrap(), "").unwrap();
            assert!(found == first || found == second);
            looks += 1;
        }
    });
}

#[test]
fn old_file_without_the_count_can_be_given_one() {
    let shape = Shape::nchw(2, CHANNELS, 1, 1);
    let mut trained = module(&common::cpu());
    let mut saved = trained.prepare::<f32>(shape).unwrap();
    let (x, mut y) = ([1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 8.0, 7.0, 6.0, 5.5], [0.0f32; 10]);
    trained
        .forward_train_with(Forward::new(&x, &mut y), &mut saved)
        .unwrap();
    let mut state = trained.state_dict().unwrap();
    assert_eq!(state.num_batches_tracked, Some(8));

    let old = without(state.clone(), "num_batches_tracked")
        .to_safetensors("")
        .unwrap();
    state = StateDict::from_safetensors(&old, "").unwrap();
    state.num_batches_tracked = Some(0);
    trained.load_state_dict(&state).unwrap();
    assert_eq!(trained.num_batches_tracked().unwrap(), Some(0));
}
