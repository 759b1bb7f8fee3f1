"""Record what every method computes, to show that a rebuild changes no number.

    python tools/digests.py record before.json [PART OF A CASE'S NAME ...]    # such as tiny/awp
    python tools/digests.py compare before.json after.json

A record that exists is added to.
"""

import contextlib
import hashlib
import io
import json
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
TIMES = {"seconds", "train_seconds", "images_per_second", "peak_memory_mb", "versions", "name", "group"}

TINY = [
    "data.source=digits",
    "data.root=null",
    "data.download=false",
    "data.val_size=100",
    "data.max_train=300",
    "data.max_test=100",
    "data.image_size=null",
    "data.num_workers=0",
    "model.name=resnet18",
    "model.stem=cifar",
    "model.checkpoint_path=null",
    "model.kwargs={layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}",
    "train.epochs=2",
    "train.batch_size=50",
    "train.device=cpu",
    "train.num_threads=1",
    "evaluation.every=1",
    "evaluation.train_size=100",
    "evaluation.batch_size=100",
    "tracking.wandb=disabled",
]
MILESTONES = ["schedule.milestones=[1]"]
PEAK = ["schedule.peak_epoch=1"]
EXTRA = ["extra.path={tmp}/extra.npz", "extra.labeler={tmp}/teacher-s0/model/last"]
SPECIAL = {  # (base, method): what a run of two epochs needs instead of MILESTONES
    ("cifar10", "fgsm_rs"): PEAK,
    ("cifar10", "grad_align"): PEAK,
    ("cifar10", "free"): PEAK,
    ("tiny", "extra_pseudo"): MILESTONES + EXTRA,
    ("cifar10", "extra_pseudo"): MILESTONES + EXTRA,
    ("cifar10", "extra_synthetic"): [*MILESTONES, "extra.path={tmp}/extra_labelled.npz"],
    ("tiny", "swa"): [*MILESTONES, "averaging.start_epoch=0"],
    ("cifar10", "swa"): [*MILESTONES, "averaging.start_epoch=0"],
    ("cifar10", "cure"): [*MILESTONES, "train.eps_warmup_epochs=1"],
    ("tiny", "eps_warmup"): [*MILESTONES, "train.eps_warmup_epochs=1"],
    ("cifar10", "eps_warmup"): [*MILESTONES, "train.eps_warmup_epochs=1"],
    ("cifar10", "trades_awp"): [*MILESTONES, "perturbation.schedule.start=1"],
    ("cifar10", "cutout"): [*MILESTONES, "augment.cutout_size=7"],
}
COMPOSED = {
    "mart_wci": ["mart", "wci"],
    "trades_wci": ["trades", "wci"],
    "awp_wci_penalty": ["awp", "wci_penalty"],
}
SMALL = {
    "": ([], []),
    "_awp_0.01": (["awp"], []),
    "_awp_0.005": (["awp"], ["perturbation.gamma=0.005"]),
    "_noise_1.0": (["noise"], []),
    "_wci_1.0": (["wci"], []),
    "_wci_1.4": (["wci"], ["perturbation.relative_size=1.4"]),
    "_wci_penalty": (["wci_penalty"], []),
}
SMOOTH = [
    "model.stem=default",
    "model.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 8, 16], act_layer: gelu, norm_layer: groupnorm1}",
]
NO_KWARGS = [t for t in TINY if not t.startswith(("model.", "data.root", "data.download", "data.image_size"))]
VIT_TEXT = """
data: {source: digits}
threat: {eps: 0.1}
objective: {num_steps: 3, step_size: 0.05}
optimizer: {lr: 0.05}
"""
VIT = [
    "model.name=vit_tiny_patch16_224",
    "model.stem=default",
    "model.kwargs={img_size: 8, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 3}",
]
BASES = {"tiny": "cifar10_tiny", "cifar10": "cifar10"}


def stack(base, *methods):
    """Return the files of a base with methods on it."""
    return [ROOT / f"recipes/bases/{base}.yaml", *(ROOT / f"recipes/methods/{m}.yaml" for m in methods)]


def method_cases():
    """Yield every method on two bases, with tiny digits for the data."""
    names = sorted(path.stem for path in (ROOT / "recipes/methods").glob("*.yaml"))
    methods = {name: [name] for name in names} | COMPOSED
    for short, base in BASES.items():
        for name, parts in methods.items():
            if (short, name) not in {("tiny", "extra_synthetic"), ("cifar10", "crop_flip")}:
                yield f"{short}/{name}", stack(base, *parts), TINY + SPECIAL.get((short, name), MILESTONES)
    for name, (parts, settings) in SMALL.items():
        yield f"cifar10_small{name}", stack("cifar10_small", *parts), TINY + MILESTONES + settings


def penalty_cases():
    """Yield every penalty with every estimator."""
    base, here = stack("cifar10_tiny", "at"), TINY + MILESTONES
    for name, strength in (("wci", "strength"), ("trace", "strength"), ("frobenius_trace", "trace_weight")):
        for value in ("1e-4", "0"):
            for estimator in ("gauss_newton", "hutchinson", "top_layer"):
                penalty = f"penalty={{name: {name}, {strength}: {value}, estimator: {estimator}}}"
                yield f"penalty/{name}/{estimator}/{value}", base, [*here, penalty]
    decay = "optimizer.weight_decay=0"
    yield "penalty/frobenius", base, [*here, "penalty={name: frobenius, strength: 1e-3}", decay]
    both = "frobenius_weight: 1e-3, trace_weight: 1e-4, estimator: gauss_newton"
    yield "penalty/frobenius_trace/both", base, [*here, f"penalty={{name: frobenius_trace, {both}}}"]
    yield "penalty/auto", base, [*here, "penalty={name: wci, strength: 1e-4}"]
    yield "penalty/auto/monitor", base, [*here, "penalty={name: wci}"]

    def wci(estimator, more=""):
        return f"penalty={{name: wci, strength: 1e-4, estimator: {{name: {estimator}}}{more}}}"

    for estimator in ("gauss_newton", "hutchinson"):
        probes = wci(f"{estimator}, num_probes: 2", ", schedule: {every: 2}")
        yield f"penalty/probes/{estimator}", base, [*here, probes, "train.accumulate=2"]
        yield f"penalty/smooth/{estimator}", base, [*here, *SMOOTH, wci(estimator)]
    vit = [*NO_KWARGS, *MILESTONES, *VIT]
    yield "penalty/vit/hutchinson", "vit", [*vit, wci("hutchinson"), "wrapper.split_qkv=true"]
    yield "penalty/vit/gauss_newton", "vit", [*vit, wci("gauss_newton")]
    yield "penalty/ramp", base, [*here, wci("gauss_newton", ", schedule: {start: 1, ramp: 0.5}")]


def wrapper_cases():
    """Yield settings of the wrapper and the loop."""
    base, here = stack("cifar10_tiny", "at"), TINY + MILESTONES
    strength = "perturbation={name: wci, strength: 1e-3, frobenius: true}"
    yield "wrapper/strength", base, [*here, strength]
    split = ["perturbation={name: wci, relative_size: 0.3}", "wrapper.split_qkv=true"]
    yield "wrapper/split", "vit", [*NO_KWARGS, *MILESTONES, *VIT, *split]
    layers = ["perturbation={name: sam}", "penalty={name: wci, strength: 1e-4}", "wrapper.layers=weights"]
    yield "wrapper/layers", base, [*here, *layers]
    ramp = "perturbation={name: wci, relative_size: 0.5, schedule: {start: 1, ramp: 0.5, every: 2}}"
    yield "wrapper/ramp", base, [*here, ramp, "wrapper.trace_decay=0.5", "train.accumulate=2"]
    yield "wrapper/rwp", base, [*here, "perturbation={name: rwp, mixing: 1}"]
    noise = ["perturbation={name: noise, relative_size: 0.5}", "penalty={name: frobenius, strength: 1e-3}"]
    yield "wrapper/noise_frobenius", base, [*here, *noise]
    adamw = [
        "optimizer={name: adamw, lr: 0.003}",
        "schedule={name: cosine, warmup_epochs: 0.5}",
        "averaging={name: ema, decay: 0.9}",
        "train.max_norm=1.0",
        "model.kwargs.drop_path_rate=0.2",
    ]
    yield "train/adamw", base, [*TINY, *adamw]
    lion = ["optimizer={name: lion, lr: 0.001}", "optimizer.decay_norm_and_bias=false"]
    yield "train/lion", base, [*here, *lion]
    measures = "measures={take: [hessian_trace, awp_sharpness], num_examples: 20}"
    one_cycle = ["schedule={name: one_cycle}", "train.eps_warmup_epochs=1", measures]
    yield "train/one_cycle", base, [*TINY, *one_cycle]
    mixing = [
        "mixing={mixup_alpha: 1, cutmix_alpha: 1}",
        "augment={policy: trivialaugment}",
        "label_noise={share: 0.2, resample: false}",
    ]
    yield "train/mixing", base, [*here, *mixing]


def quickstart_cases():
    """Yield the quickstart's recipes, at full length."""
    for name in ("at", "awp", "wci"):
        yield f"quickstart/{name}", stack("digits", name), []


def digest_of(state):
    """Return a digest of a state dict."""
    result = hashlib.blake2b(digest_size=12)
    for name, value in sorted(state.items()):
        result.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def strip(value):
    """Return a document without clocks and names."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if k not in TIMES}
    return [strip(v) for v in value] if isinstance(value, list) else value


def result_of(folder):
    """Return what a run computed."""
    from wcitrain.checkpoint import load_checkpoint

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state, _ = load_checkpoint(folder / "checkpoints")
    return {
        "metrics": strip(rows),
        "summary": strip(json.loads((folder / "summary.json").read_text())),
        "weights": digest_of(state["model"]),
        "average": digest_of(state["average"]["module"]) if state.get("average") else None,
    }


def train(tmp, name, path, settings, stop_after=None):
    """Train one case, interrupted after some steps if asked, and return its result."""
    from wcitrain import optim
    from wcitrain.recipe import load_recipe
    from wcitrain.train import Interrupted, fit

    settings = [s.replace("{tmp}", str(tmp)) for s in settings]
    if path == "vit":
        path = tmp / "vit.yaml"
        path.write_text(VIT_TEXT)
    folder = tmp / name.replace("/", "-")
    recipe = load_recipe(path, [*settings, f"output={tmp}"])
    if stop_after is not None:
        original, made = optim.RegularizedOptimizer.step, []

        def step(self, *args, **kwargs):
            made.append(1)
            if len(made) == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *args, **kwargs)

        optim.RegularizedOptimizer.step = step
        try:
            fit(recipe, folder=folder)
            raise AssertionError("not interrupted")
        except Interrupted:
            pass
        finally:
            optim.RegularizedOptimizer.step = original
    fit(recipe, folder=folder, resume=stop_after is not None)
    return result_of(folder)


def measurements():
    """Yield the index of two networks by every estimator."""
    from wcitrain import ThreatModel, create_model
    from wcitrain.measures import measure_wci

    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(96, 1, 8, 8, generator=g), torch.randint(0, 10, (96,), generator=g)
    for kind, extra in (("relu", {}), ("smooth", {"act_layer": "gelu", "norm_layer": "groupnorm1"})):
        torch.manual_seed(0)
        small: Any = {"layers": [1] * 4, "channels": [4, 4, 8, 8], "stem": "default" if extra else "cifar"}
        model = create_model("resnet18", num_classes=10, in_chans=1, **(small | extra))
        for estimator in ("auto", "gauss_newton", "hutchinson"):
            for threat in (None, ThreatModel("linf", 0.1)):
                for target in (None, 0.2) if kind == "relu" else (None,):
                    settings = {"threat": threat, "num_steps": 2, "estimator": estimator, "seed": 0}
                    settings |= {"num_examples": 96} if target is None else {"target_relative_error": target}
                    try:
                        m = measure_wci(model, [(x, y)], **settings)
                        out = {
                            "trace": m.trace.mean.tolist(),
                            "stderr": m.trace.stderr.tolist(),
                            "total": m.total,
                            "total_stderr": m.total_stderr,
                            "examples": m.num_examples,
                        }
                    except Exception as error:
                        out = {"error": type(error).__name__}
                    images = "clean" if threat is None else "robust"
                    yield f"measure/{kind}/{estimator}/{images}/{target}", out


def record(out, wanted):
    """Run the cases and write their results."""
    results = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (90, 8, 8), dtype=np.uint8)
        np.savez(tmp / "extra.npz", image=images)
        np.savez(tmp / "extra_labelled.npz", image=images, label=rng.integers(0, 10, 90))
        cases = [("teacher-s0", stack("cifar10_tiny", "standard"), TINY + MILESTONES, None)]
        groups = (method_cases, penalty_cases, wrapper_cases, quickstart_cases)
        cases += [(*case, None) for group in groups for case in group()]
        cases += [
            (f"resume/{n}", stack("cifar10_tiny", n), TINY + SPECIAL.get(("tiny", n), MILESTONES), 5)
            for n in ("wci", "free", "swa", "vasso", "wci_penalty", "trades_awp")
        ]
        for name, path, settings, stop in cases:
            if wanted and not any(w in name for w in wanted) and name != "teacher-s0":
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[name] = train(tmp, name, path, settings, stop)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, results[name].get("error", "ok").splitlines()[0], flush=True)
        if not wanted or "measure" in wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, value in measurements():
                    results[name] = value
                    print(name, value.get("error", "ok"), flush=True)
    Path(out).write_text(json.dumps(results, indent=1, sort_keys=True))


def compare(before, after):
    """Print what differs between two records, case by case; return the exit status."""
    left, right = (json.loads(Path(path).read_text()) for path in (before, after))
    different, both = 0, sorted(left.keys() & right.keys())
    for name in both:
        places = list(_differences(left[name], right[name], ""))
        different += bool(places)
        for place in places[:4]:
            print(f"{name}: {place}")
    only = ", ".join(sorted(left.keys() ^ right.keys())) or "none"
    print(f"{len(both)} cases in both, {different} differ; in one only: {only}")
    return int(bool(different))


def _differences(a, b, place):
    """Yield the places where two documents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(set(a) | set(b)):
            yield from _differences(a.get(key), b.get(key), f"{place}.{key}".lstrip("."))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{place}[{i}]")
    elif a != b and not (a != a and b != b):
        yield f"{place}: {a} became {b}"


if __name__ == "__main__":
    if sys.argv[1:2] not in (["record"], ["compare"]) or len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(compare(*sys.argv[2:]) if sys.argv[1] == "compare" else record(sys.argv[2], sys.argv[3:]))
