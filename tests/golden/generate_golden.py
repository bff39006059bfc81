#!/usr/bin/env python3
"""Write golden reference files for two-dimensional batch normalisation, computed by PyTorch.

Reads a case list (JSON) and writes one safetensors file per case, plus the state dict of a small
trained `torch.nn.BatchNorm2d`. Every random number comes from the case's own seed, through numpy,
and PyTorch runs on one CPU thread, so that a second run writes the same tensors.

    python generate_golden.py --cases cases.json --out DIR

A case is a JSON object: a unique "name", a "seed", a "shape" [N, C, H, W], and whatever differs
from DEFAULTS. The README beside this script describes the files.

--only REGEX writes the cases whose name the expression matches, and no state dict unless it matches that too.

Needs torch, numpy and safetensors; no GPU.
"""
import argparse
import json
import pathlib
import re

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}

DEFAULTS = {
    "dtype": "f32",        # of x, z, y, dy, dx, dz
    "layout": "nchw",      # memory order of those: nchw or nhwc
    "training": True,
    "affine": True,
    "track": True,         # track_running_stats
    "eps": 1e-5,
    "momentum": 0.1,       # null: cumulative average
    "activation": "none",  # none, relu: relu(bn(x)), add_relu: relu(bn(x) + z)
    "steps": 1,            # successive training steps, one file each
    "input": "normal",     # see draw_x
    "mean": 0.0,           # of inputs "offset"
    "std": 1.0,            # of inputs "offset" and "denormal"
    "params": "random",    # weight and bias: random, default (1 and 0), no_bias, zero_weight (in channel 0)
    "stats": "random",     # running statistics before the step: random, init (0 and 1), near_input
    "part": "all",         # all, forward (no gradients), backward (no y)
}


def draw_x(rng, case):
    """The input in float64, logical order N, C, H, W."""
    n, c, h, w = shape = case["shape"]
    kind = case["input"]
    if kind == "arange":
        return np.arange(n * c * h * w, dtype=np.float64).reshape(shape)
    x = rng.standard_normal(shape)
    if kind in ("offset", "denormal"):
        return case["mean"] + case["std"] * x
    x = x * rng.uniform(0.5, 2.0, (1, c, 1, 1)) + rng.uniform(-2.0, 2.0, (1, c, 1, 1))
    if kind == "constant":      # channels of variance 0
        x[:, 0] = 0.7
        x[:, -1] = 1000.25
    elif kind == "non_finite":  # one NaN in channel 1, one infinity in channel 3
        x[n // 2, 1, 0, w - 1] = np.nan
        x[n - 1, 3, h - 1, 0] = np.inf
    elif kind == "non_finite_relu":  # and more beside x: see spoil
        x[n // 2, 1, 0, w - 1] = np.nan
        x[n - 1, 2, h - 1, 0] = np.inf
        x[0, 3, h // 2, w // 2] = -np.inf
    return x


def draw_params(rng, case):
    c = case["shape"][1]
    weight, bias = rng.normal(1.0, 0.5, c), rng.normal(0.0, 0.5, c)
    if case["params"] == "default":
        weight, bias = np.ones(c), np.zeros(c)
    elif case["params"] == "no_bias":
        bias = np.zeros(c)
    elif case["params"] == "zero_weight":
        weight[0] = 0.0
    return weight, bias


def draw_stats(rng, case, x):
    """Running mean, running variance and the batches seen, before the step."""
    c = case["shape"][1]
    mean, var, batches = rng.normal(0.0, 1.0, c), rng.uniform(0.5, 2.0, c), 7
    if case["stats"] == "init":
        mean, var, batches = np.zeros(c), np.ones(c), 0
    elif case["stats"] == "near_input":
        batch_var = x.var((0, 2, 3))
        mean = x.mean((0, 2, 3)) + 0.1 * np.sqrt(batch_var) * mean
        var = batch_var * var
    return mean, var, batches


def step(case, t, dtype, param_dtype):
    """One step of torch.nn.BatchNorm2d from the stored tensors t, with its gradients."""
    module = torch.nn.BatchNorm2d(case["shape"][1], case["eps"], case["momentum"], case["affine"],
                                  case["track"], dtype=param_dtype).train(case["training"])
    module.load_state_dict({name: t[key].to(param_dtype) if t[key].is_floating_point() else t[key]
                            for name, key in (("weight", "weight"), ("bias", "bias"),
                                              ("running_mean", "running_mean_in"),
                                              ("running_var", "running_var_in"),
                                              ("num_batches_tracked", "num_batches_tracked_in"))
                            if key in t})
    memory = torch.channels_last if case["layout"] == "nhwc" else torch.contiguous_format

    def leaf(value):
        return value.to(dtype, copy=True, memory_format=memory).requires_grad_()

    x, out = leaf(t["x"]), {}
    if case["training"] or not case["track"]:  # batch statistics are used
        copy = {k: v.detach().clone() for k, v in module.state_dict().items()}
        _, out["save_mean"], out["save_invstd"] = torch.native_batch_norm(
            x.detach(), copy.get("weight"), copy.get("bias"), copy.get("running_mean"),
            copy.get("running_var"), True, 0.0, case["eps"])

    pre = module(x)
    if case["activation"] == "add_relu":
        z = leaf(t["z"])
        pre = pre + z
    y = pre if case["activation"] == "none" else torch.relu(pre)
    y.backward(leaf(t["dy"]).detach())

    out |= {"pre": pre, "y": y, "dx": x.grad}
    if case["activation"] == "add_relu":
        out["dz"] = z.grad
    if case["affine"]:
        out |= {"dweight": module.weight.grad, "dbias": module.bias.grad}
    if case["track"]:
        out |= {"running_mean_out": module.running_mean, "running_var_out": module.running_var,
                "num_batches_tracked_out": module.num_batches_tracked}
    return {k: v.detach().clone() for k, v in out.items()}


def clear_of_zero(case, t):
    """Move what relu sees away from zero, so that rounding cannot turn its mask over.

    Changes z where there is one and otherwise the bias; returns the margin reached. NaN and infinity are on one side of
    zero for good, and do not count.
    """
    pre = step(case, t, torch.float64, torch.float64)["pre"]
    if case["activation"] == "add_relu":
        margin = 0.03 if case["dtype"] in ("f16", "bf16") else 1e-3
        t["z"] = t["z"] + (4 * margin * (pre.abs() < margin)).to(t["z"].dtype)
    else:
        shifts = torch.linspace(-0.25, 0.25, 501, dtype=torch.float64)
        for c in range(pre.shape[1]):
            finite = pre[:, c][pre[:, c].isfinite()]
            if finite.numel() == 0:
                continue
            gaps = (finite.reshape(1, -1) + shifts[:, None]).abs().amin(1)
            t["bias"][c] += shifts[gaps.argmax()].to(t["bias"].dtype)
    pre = step(case, t, torch.float64, torch.float64)["pre"]
    return pre[pre.isfinite()].abs().min().item()


def spoil(case, t):
    """Put NaN and infinity into dy and z where they show how a relu and its gradient are written.

    A gradient that relu stops is 0 even where dy is NaN, so dy becomes NaN where relu gives 0 in channel 4. (A product
    with a mask of 0 and 1 would let the NaN through.) The residual, where there is one, is -infinity and infinity in
    channel 0, the infinity of the other sign where the normalised value is infinite in channel 2 of an evaluation,
    so that their sum is NaN, and NaN in channel 5.
    """
    pre = step(case, t, torch.float64, torch.float64)["pre"]
    stopped = (pre[:, 4] < 0).nonzero()[0].tolist()
    t["dy"][stopped[0], 4, stopped[1], stopped[2]] = torch.nan
    if case["activation"] == "add_relu":
        t["z"][0, 0, 0, 0] = -torch.inf
        t["z"][0, 0, 0, 1] = torch.inf
        t["z"][-1, 5, -1, -1] = torch.nan
        infinite = pre[:, 2].isinf()
        t["z"][:, 2][infinite] = -pre[:, 2][infinite].to(t["z"].dtype)


def round_once(t64, dtype):
    """float64 to float16 in one rounding; torch itself would round to float32 on the way."""
    assert dtype == torch.float16
    return torch.from_numpy(t64.numpy().astype(np.float16))


def stored(case, t):
    """The case's tensors as they are laid out in the file."""
    grads = {"dy", "dx", "dz", "dweight", "dbias", "dx64", "dweight64", "dbias64"}
    outputs = {"y", "y64"}
    left_out = {"all": set(), "forward": grads, "backward": outputs}[case["part"]] | {"pre"}
    order = (0, 2, 3, 1) if case["layout"] == "nhwc" else (0, 1, 2, 3)
    return {k: (v.permute(order) if v.dim() == 4 else v).contiguous().clone()
            for k, v in t.items() if k not in left_out}


def write_case(case, out_dir, given=None):
    """Write the file of a case, or one file for each of its steps; `given` replaces drawn parameters."""
    case = DEFAULTS | case
    assert set(case) <= set(DEFAULTS) | {"name", "seed", "shape"}, case
    rng = np.random.default_rng(case["seed"])
    dtype = DTYPES[case["dtype"]]
    param_dtype = torch.float64 if case["dtype"] == "f64" else torch.float32
    # Without any float32 parameter or buffer, PyTorch keeps the statistics of half-precision inputs
    # in half precision on the CPU, which makes a poor reference.
    rounded = case["dtype"] in ("f16", "bf16") and not case["affine"] and not case["track"]

    def tensor(array, dtype):
        return torch.from_numpy(np.asarray(array, dtype=np.float64)).to(dtype)

    carried = dict(given or {})
    for number in range(case["steps"]):
        x = draw_x(rng, case)
        t = {"x": tensor(x, dtype), "dy": tensor(rng.standard_normal(case["shape"]), dtype)}
        weight, bias = draw_params(rng, case)
        mean, var, batches = draw_stats(rng, case, x)
        if case["affine"]:
            t |= {"weight": tensor(weight, param_dtype), "bias": tensor(bias, param_dtype)}
        if case["track"]:
            t |= {"running_mean_in": tensor(mean, param_dtype), "running_var_in": tensor(var, param_dtype),
                  "num_batches_tracked_in": torch.tensor(batches)}
        t |= carried
        if case["activation"] == "add_relu":
            t["z"] = tensor(rng.standard_normal(case["shape"]), dtype)
        margin = clear_of_zero(case, t) if case["activation"] != "none" else None
        if case["input"] == "non_finite_relu":
            spoil(case, t)

        truth = step(case, t, torch.float64, torch.float64)
        if rounded:
            result = {k: v.float() if v.dim() == 1 else round_once(v, dtype) for k, v in truth.items()}
        else:
            result = step(case, t, dtype, param_dtype)
        carried = {k: t[k] for k in ("weight", "bias") if k in t}
        carried |= {k[:-3] + "in": v for k, v in result.items() if k.endswith("_out")}

        keep64 = ("y", "dx", "dweight", "dbias", "save_mean", "save_invstd", "running_mean_out", "running_var_out")
        tensors = stored(case, t | result | {k + "64": truth[k] for k in keep64 if k in truth})
        metadata = {
            "case": case["name"], "seed": case["seed"], "shape": case["shape"], "dtype": case["dtype"],
            "param_dtype": "f64" if case["dtype"] == "f64" else "f32", "layout": case["layout"],
            "training": case["training"], "affine": case["affine"], "track_running_stats": case["track"],
            "eps": case["eps"], "momentum": "none" if case["momentum"] is None else case["momentum"],
            "activation": case["activation"], "input": case["input"], "part": case["part"],
            "step": number + 1, "steps": case["steps"],
            "reference": "f64_rounded" if rounded else "torch", "torch_version": torch.__version__,
        }
        if margin is not None:
            metadata["relu_margin"] = margin
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        suffix = f"_step{number + 1}" if case["steps"] > 1 else ""
        save_file(tensors, out_dir / f"{case['name']}{suffix}.safetensors", text)


def write_state_dict(seed, out_dir):
    """Train BatchNorm2d(8) for three steps; write its state dict and an evaluation case from it."""
    rng = np.random.default_rng(seed)
    module = torch.nn.BatchNorm2d(8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    for _ in range(3):
        x = torch.from_numpy(rng.normal(1.0, 2.0, (4, 8, 5, 5))).float()
        target = torch.from_numpy(rng.normal(0.5, 1.0, (4, 8, 5, 5))).float()
        optimizer.zero_grad()
        ((module(x) - target) ** 2).mean(dim=(0, 2, 3)).sum().backward()
        optimizer.step()
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    save_file(state, out_dir / "state_dict_bn8.safetensors", {"format": "pt", "torch_version": torch.__version__})
    given = {k + "_in" if k not in ("weight", "bias") else k: v for k, v in state.items()}
    write_case({"name": "state_dict_bn8_eval", "seed": seed + 1, "shape": [4, 8, 5, 5], "training": False},
               out_dir, given)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--cases", type=pathlib.Path, default=here / "cases.json", help="case list (JSON)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--only", default="", help="regular expression: the cases to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    plan = json.loads(args.cases.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    names = [case["name"] for case in plan["cases"]]
    assert len(set(names)) == len(names), "case names must differ"
    for case in plan["cases"]:
        if re.search(args.only, case["name"]):
            write_case(case, args.out)
    if re.search(args.only, "state_dict_bn8"):
        write_state_dict(plan["state_dict_seed"], args.out)


if __name__ == "__main__":
    main()
