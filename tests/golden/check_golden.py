#!/usr/bin/env python3
"""Check golden files against the formulas of batch normalisation, in numpy and without PyTorch.

    python check_golden.py DIR [DIR ...] [--extended] [--markdown]

Per file: the float64 truth must agree with the formulas evaluated here in float64 (--extended: in
numpy's longdouble), and PyTorch's own result must agree with that truth within LIMITS.
Prints the greatest errors per dtype; exits 1 if a file fails.

An error is also given scaled: per channel, divided by the size of the terms that the value is summed
from (see scales), so that cancellation in the data is not held against an implementation.
"""
import argparse
import collections
import json
import pathlib
import struct
import sys

import numpy as np

RAW = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "BF16": "<u2"}
# Of PyTorch's scaled error against the truth.
LIMITS = {"f16": 2e-3, "bf16": 1.6e-2, "f32": 5e-6, "f64": 1e-14}
TRUTH_LIMIT = 1e-13
ORDER = ("y", "dx", "dweight", "dbias", "running_mean_out", "running_var_out", "save_mean", "save_invstd")


def read(path):
    """Tensors (half types widened to float32, NHWC turned to NCHW), metadata and stored dtypes."""
    blob = path.read_bytes()
    size, = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8:8 + size])
    meta = header.pop("__metadata__", {})
    tensors, dtypes = {}, {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        a = np.frombuffer(blob[8 + size + begin:8 + size + end], RAW[entry["dtype"]])
        if entry["dtype"] == "BF16":
            a = (a.astype("<u4") << 16).view("<f4")
        a = a.reshape(entry["shape"])
        tensors[name] = a.transpose(0, 3, 1, 2) if a.ndim == 4 and meta["layout"] == "nhwc" else a
        dtypes[name] = entry["dtype"].lower()
    return tensors, meta, dtypes


def column(v):
    return v[None, :, None, None]


def formulas(t, meta, real):
    """Every output of the step, from its inputs, by the textbook formulas in dtype `real`."""
    t = {k: v.astype(real) if v.dtype.kind == "f" else v for k, v in t.items()}
    x = t["x"]
    n = x.size // x.shape[1]
    axes = (0, 2, 3)
    training = meta["training"] == "true"
    track = meta["track_running_stats"] == "true"
    eps = real(float(meta["eps"]))
    out = {}
    if training or not track:
        mean = x.sum(axes) / n
        d = x - column(mean)
        var = (d * d).sum(axes) / n
        invstd = 1 / np.sqrt(var + eps)
        out |= {"save_mean": mean, "save_invstd": invstd}
    else:
        mean, var = t["running_mean_in"], t["running_var_in"]
        invstd = 1 / np.sqrt(var + eps)
        d = x - column(mean)
    if track:
        seen = int(t["num_batches_tracked_in"]) + training
        out |= {"num_batches_tracked_out": seen, "running_mean_out": t["running_mean_in"],
                "running_var_out": t["running_var_in"]}
        if training:
            m = 1 / real(seen) if meta["momentum"] == "none" else real(float(meta["momentum"]))
            out["running_mean_out"] = (1 - m) * t["running_mean_in"] + m * mean
            out["running_var_out"] = (1 - m) * t["running_var_in"] + m * var * n / (n - 1)
    c = x.shape[1]
    weight, bias = t.get("weight", np.ones(c, real)), t.get("bias", np.zeros(c, real))
    xhat = d * column(invstd)
    pre = xhat * column(weight) + column(bias)
    if "z" in t:
        pre = pre + t["z"]
    out["y"] = pre if meta["activation"] == "none" else np.maximum(pre, 0)
    if "dy" in t:
        # PyTorch's relu stops the gradient where its result is <= 0: a NaN lets it pass.
        g = t["dy"] if meta["activation"] == "none" else np.where(pre <= 0, 0, t["dy"])
        sum_g, sum_gx = g.sum(axes), (g * xhat).sum(axes)
        batch = training or not track
        dx = g - column(sum_g) / n - xhat * column(sum_gx) / n if batch else g
        out |= {"dx": dx * column(weight * invstd), "dweight": sum_gx, "dbias": sum_g, "dz": g}
    return out, scales(t, mean, var, invstd, weight, bias)


def size(a):
    """Absolute values, with 0 for NaN and infinity, which are the size of nothing."""
    return np.where(np.isfinite(a), np.abs(a), 0)


def scales(t, mean, var, invstd, weight, bias):
    """Per channel, the size of the terms that each output is summed from.

    PyTorch normalises as x * (weight * invstd) + (bias - mean * weight * invstd). `reach` is the size
    of the terms of the normalised value in that form: a few for ordinary inputs, and large where the
    mean is far greater than the deviation. Maxima and sums over a tensor are those of its finite values.
    """
    axes = (0, 2, 3)
    reach = invstd * (size(t["x"]).max(axes) + np.abs(mean))
    square = mean * mean + var
    s = {"y": np.abs(weight) * reach + np.abs(bias) + (size(t["z"]).max(axes) if "z" in t else 0),
         "save_mean": np.sqrt(square), "save_invstd": invstd * np.maximum(reach, 1)}
    if "running_mean_in" in t:
        s |= {"running_mean_out": np.maximum(np.abs(t["running_mean_in"]), np.sqrt(square)),
              "running_var_out": np.maximum(t["running_var_in"], square)}
    if "dy" in t:
        dy = size(t["dy"])
        s |= {"dx": np.abs(weight) * invstd * dy.max(axes) * np.maximum(reach, 1),
              "dweight": dy.sum(axes) * reach, "dbias": dy.sum(axes)}
    return s


def errors(got, want, scale):
    """Greatest absolute and scaled difference; infinite where the non-finite values differ, or the scale is NaN."""
    got, want = np.asarray(got, np.longdouble), np.asarray(want, np.longdouble)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return np.inf, np.inf
    if not finite.any():
        return 0.0, 0.0
    scale = np.broadcast_to(column(scale) if want.ndim == 4 else scale, want.shape)[finite]
    diff = np.abs(got[finite] - want[finite])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(diff == 0, 0, diff / scale)
    ratio[np.isnan(ratio)] = np.inf
    return float(diff.max()), float(ratio.max())


def check_file(path, real, worst):
    t, meta, dtypes = read(path)
    problems = []
    if path.stem == "state_dict_bn8":
        want = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), "f32") | {"num_batches_tracked": "i64"}
        case, _, _ = read(path.with_stem("state_dict_bn8_eval"))
        same = all(np.array_equal(t[k], case[k if k in case else k + "_in"]) for k in want)
        return [] if dtypes == want and same and t["num_batches_tracked"] == 3 else ["state dict differs"]

    dtype = meta["dtype"]
    mine, scale = formulas(t, meta, real)
    group = (dtype, "offset, constant" if meta["input"] in ("offset", "constant") else "ordinary")
    for key, value in mine.items():
        if key not in t:
            if meta["part"] == "all" and not (key in ("dweight", "dbias") and meta["affine"] == "false") \
                    and not (key == "dz" and "z" not in t):
                problems.append(f"{key} is missing")
            continue
        if key == "num_batches_tracked_out":
            if t[key] != value:
                problems.append(key)
            continue
        if key == "dz":
            if not np.array_equal(t[key], value.astype(t[key].dtype), equal_nan=True):
                problems.append(key)
            continue
        if t[key].shape != value.shape or t[key + "64"].shape != value.shape:
            problems.append(f"shape of {key}")
            continue
        expected = dtype if key in ("y", "dx") else meta["param_dtype"]
        if dtypes[key] != expected or dtypes[key + "64"] != "f64":
            problems.append(f"dtype of {key}")
        truth_error = errors(t[key + "64"], value, scale[key])
        torch_error = errors(t[key], t[key + "64"], scale[key])
        if truth_error[1] > TRUTH_LIMIT:
            problems.append(f"{key}64 against the formulas: {truth_error[1]:.1e}")
        if torch_error[1] > LIMITS[expected]:
            problems.append(f"{key} against {key}64: {torch_error[1]:.1e}")
        entry = worst[group][key]
        for i, e in enumerate((*torch_error, *truth_error)):
            entry[i] = max(entry[i], e)

    if meta["activation"] != "none" and "y" in t and not np.array_equal(t["y"] > 0, t["y64"] > 0):
        problems.append("the relu masks of y and y64 differ")
    if meta["input"] == "non_finite":
        touched = sorted({c for k in ("y", "dx") for c in range(t["x"].shape[1]) if not np.isfinite(t[k][:, c]).all()})
        if touched != [1, 3] and not (meta["training"] == "false" and set(touched) <= {1, 3}):
            problems.append(f"non-finite values in channels {touched}")
    if int(meta["step"]) > 1:
        before, _, _ = read(path.with_stem(path.stem[:-1] + str(int(meta["step"]) - 1)))
        for k in ("running_mean", "running_var", "num_batches_tracked"):
            if not np.array_equal(t[k + "_in"], before[k + "_out"]):
                problems.append(f"{k} does not continue the step before")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--extended", action="store_true", help="evaluate the formulas in longdouble")
    parser.add_argument("--markdown", action="store_true", help="print PyTorch's errors as a table: absolute (scaled)")
    args = parser.parse_args()
    real = np.longdouble if args.extended else np.float64
    worst = collections.defaultdict(lambda: collections.defaultdict(lambda: [0.0] * 4))
    paths = sorted(p for d in args.dirs for p in d.glob("*.safetensors"))
    failed = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for path in paths:
            problems = check_file(path, real, worst)
            failed += bool(problems)
            for problem in problems:
                print(f"FAIL {path.name}: {problem}")
    if args.markdown:
        print("| dtype | inputs |", " | ".join(ORDER), "|")
        print("|---" * (len(ORDER) + 2) + "|")
    else:
        print(f"{'dtype':5} {'inputs':16} {'tensor':17} torch-truth: abs scaled  truth-formulas: abs scaled")
    for group in sorted(worst, key=lambda g: (list(LIMITS).index(g[0]), g[1] != "ordinary")):
        found = worst[group]
        if args.markdown:
            cells = (f"{found[k][0]:.0e} ({found[k][1]:.0e})" if k in found else "" for k in ORDER)
            print("|", " | ".join((*group, *cells)), "|")
            continue
        for key in (k for k in ORDER if k in found):
            e = found[key]
            print(f"{group[0]:5} {group[1]:16} {key:17} {e[0]:16.1e} {e[1]:.1e} {e[2]:19.1e} {e[3]:.1e}")
    if not args.markdown:
        print(f"{len(paths)} files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
