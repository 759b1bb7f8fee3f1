"""Time and peak memory of the layer-wise trace to a given standard error, beside PyHessian and curvlinops.

    python tools/bench_curvature.py [--examples 512] [--width 64] [--target 0.05] [--probes 6] [--threads 1]
    python tools/bench_curvature.py --steps    # a penalty step by every estimator over a plain step

ResNet-18 with the stem for small images, trained for 60 steps on scikit-learn's digits (enlarged to 32 px),
mean cross-entropy, eval mode. All methods run in one invocation, each in a process of its own (for its
memory: the highest resident set, less the one before; CUDA: the allocator's peak). Errors are those of the
probes, for the given examples. A probe is timed, its variance is estimated from a few of them, and the time
to the target is

    time of a probe × Var / (target · t)²,   at least one probe,

t the sign trick's estimate from a pass over all examples; for the per-layer table summed over layers where a
layer needs probes of its own (PyHessian, curvlinops: one operator a layer), or with the worst layer's number
where one probe serves all layers (ours). ``gauss_newton`` equals the Hessian's trace here (ReLU, eval mode),
layer by layer.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_step import resident_mb
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wcitrain import RegularizedOptimizer, WCIPenalty, create_model, cross_entropy, select_layers
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hutchinson import hutchinson_samples
from wcitrain.params import Layers

PASSES = 3  # of the sign trick over all examples


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; 64 is ResNet-18")
    parser.add_argument("--target", type=float, default=0.05, help="relative standard error of every layer")
    parser.add_argument("--probes", type=int, default=6, help="Hutchinson probes behind every variance")
    parser.add_argument("--chunk", type=int, default=8, help="examples of one draw of the sign trick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", action="store_true", help="time penalty steps instead")
    parser.add_argument("--batch", type=int, default=64, help="of a penalty step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measured(options.only, options)))
        return
    results = penalty_steps(options) if options.steps else comparison(options)
    if options.json:
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **results}, indent=1)
        )


# Traces ---------------------------------------------------------------------------------------------------


def comparison(options: argparse.Namespace) -> dict:
    """Run every method in a process of its own and print the table; ratios are to the sign trick."""
    results = {}
    for method in options.methods.split(","):
        arguments = [sys.executable, __file__, *sys.argv[1:], "--only", method]
        finished = subprocess.run(arguments, capture_output=True, text=True)
        if finished.returncode:
            print(f"{method}: {finished.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        results[method] = json.loads(finished.stdout.strip().splitlines()[-1])
        print(f"{method}: done", file=sys.stderr, flush=True)
    ours = results.get("ours: gauss_newton") or next(iter(results.values()))
    print(
        f"ResNet-18, width {options.width}, {options.examples} examples of 32 px, {options.device}, "
        f"{options.threads} thread(s); to a standard error of {100 * options.target:g} %\n"
    )
    print("| method | per layer: time | ratio | whole: time | ratio | peak memory | whole trace |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, r in results.items():
        layer, whole = r["layer_seconds"], r["whole_seconds"]
        print(
            f"| {method} | {layer:.1f} s | {layer / ours['layer_seconds']:.1f}x | {whole:.1f} s | "
            f"{whole / ours['whole_seconds']:.1f}x | {r['memory_mb']:.0f} MB | "
            f"{r['trace']:.4g} ± {r['stderr']:.2g} |"
        )
    return results


def measured(method: str, options: argparse.Namespace) -> dict:
    """Return one method's numbers, with the memory it added."""
    work = Workload(options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident_mb("VmRSS")
    numbers = METHODS[method](work, options)
    is_cuda = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else resident_mb("VmHWM") - before
    return numbers | {"memory_mb": peak}


class Workload:
    """One model, its layers, and the examples."""

    def __init__(self, options: argparse.Namespace, num_steps: int = 60) -> None:
        torch.manual_seed(0)
        self.device, digits, width = options.device, load_digits(), options.width
        channels = tuple(width * factor for factor in (1, 2, 4, 8))
        model = create_model("resnet18", num_classes=10, stem="cifar", channels=channels, stem_width=width)
        self.model: nn.Module = model.to(self.device)
        images = torch.tensor(digits.images[: options.examples] / 16, dtype=torch.float32, device=self.device)
        self.x = F.interpolate(images[:, None], 32).expand(-1, 3, -1, -1).contiguous()
        self.y = torch.tensor(digits.target[: options.examples], device=self.device)
        self._train(num_steps)
        self.model.eval()
        self.layers = select_layers(self.model)

    def _train(self, steps: int) -> None:
        """Leave the initialisation, where curvatures are unlike those of any model one would measure."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            rows = torch.arange(step * 32, (step + 1) * 32) % len(self.x)
            optimizer.zero_grad()
            F.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The examples in batches."""
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def reference(self) -> Tensor:
        """Return t_l [L] by the sign trick, one pass over all examples, for relative errors."""
        generator = torch.Generator(self.device).manual_seed(1)
        for p in self.model.parameters():
            p.requires_grad_()
        return self.sign_draws(8, generator).mean(0).cpu()

    def sign_draws(self, size: int, generator: torch.Generator) -> Tensor:
        """Return draws [chunks, L] of the sign trick, one a chunk of ``size`` examples."""
        draws = [
            gauss_newton_samples(self.model(x), self.layers, generator=generator)
            for x, _ in self.batches(size)
        ]
        return torch.cat(draws)

    def timed(self, function: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Return what a function gives, and the seconds it took."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        value = function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return value, time.perf_counter() - start


def to_target(samples: Tensor, mean: Tensor, seconds: float, target: float, *, is_shared: bool) -> float:
    """Return the seconds to the target for the columns of samples [K, L] with known ``mean`` [L].

    A row takes ``seconds``. ``is_shared``: one row serves all columns, so the worst decides; otherwise each
    column pays for its own rows.
    """
    needed = (samples.var(0) / (target * mean).square()).clamp_min(1)
    return seconds * float(needed.max() if is_shared else needed.sum())


def summary(whole: Tensor, layer_seconds: float, whole_seconds: float) -> dict:
    """Return the numbers of one method; ``whole`` are its samples [K] of the whole trace."""
    stderr = float(whole.std()) / len(whole) ** 0.5
    return {
        "layer_seconds": layer_seconds,
        "whole_seconds": whole_seconds,
        "trace": float(whole.mean()),
        "stderr": stderr,
        "num_samples": len(whole),
    }


def ours_gauss_newton(work: Workload, options: argparse.Namespace) -> dict:
    """The sign trick, one draw a chunk of examples; a row is a pass over all chunks."""
    generator = torch.Generator(work.device).manual_seed(0)
    work.sign_draws(options.chunk, generator)  # warm-up
    passes, times = zip(
        *[work.timed(lambda: work.sign_draws(options.chunk, generator)) for _ in range(PASSES)], strict=True
    )
    samples, seconds = torch.stack(passes), sorted(times)[PASSES // 2]  # [passes, chunks, L]
    num_chunks = samples.shape[1]

    def needed(columns: Tensor) -> float:
        """Return the passes to the target for the worst column."""
        variance = columns.var(0).mean(0) / num_chunks  # pooled over chunks, whose signs are independent
        return max(1.0, float((variance / (options.target * columns.mean((0, 1))).square()).max()))

    whole = samples.sum(2, keepdim=True)
    return summary(whole.mean(1)[:, 0], seconds * needed(samples), seconds * needed(whole))


def ours_hutchinson(work: Workload, options: argparse.Namespace) -> dict:
    """Full probes on all examples: one product gives every layer."""

    def draw(number: int) -> Tensor:
        sums = torch.zeros(len(work.layers), dtype=torch.float64)
        for x, y in work.batches(64):
            generator = torch.Generator(work.device).manual_seed(number)  # the same probe for every batch
            loss = F.cross_entropy(work.model(x), y)
            sums += hutchinson_samples(loss, work.layers, generator=generator)[0].cpu() * len(x)
        return sums / len(work.x)

    rows, times = zip(*[work.timed(lambda k=k: draw(k)) for k in range(options.probes)], strict=True)
    samples, seconds = torch.stack(rows), sorted(times)[len(times) // 2]
    whole = samples.sum(1)
    return summary(
        whole,
        to_target(samples, work.reference(), seconds, options.target, is_shared=True),
        to_target(whole[:, None], work.reference().sum()[None], seconds, options.target, is_shared=True),
    )


def one_operator_each(
    work: Workload, options: argparse.Namespace, probe: Callable[[Layers], Callable[[], float]]
) -> dict:
    """Measure a peer by an operator for every layer and one for all.

    ``probe(layers)`` returns a function that gives one sample.
    """

    def run(layers: Layers) -> tuple[Tensor, float]:
        setup = time.perf_counter()
        sample = probe(layers)
        setup = time.perf_counter() - setup
        values, times = zip(*[work.timed(sample) for _ in range(options.probes)], strict=True)
        samples = torch.tensor([float(value) for value in values], dtype=torch.float64)[:, None]
        mean = sum(reference[name] for name in layers)[None]
        seconds = sorted(times)[len(times) // 2]
        return samples, setup + to_target(samples, mean, seconds, options.target, is_shared=False)

    reference = dict(zip(work.layers, work.reference(), strict=True))
    whole, whole_seconds = run(work.layers)
    layer_seconds = sum(run(Layers({name: tensor}))[1] for name, tensor in work.layers.items())
    return summary(whole[:, 0], layer_seconds, whole_seconds)


def pyhessian(work: Workload, options: argparse.Namespace) -> dict:
    """PyHessian in its faster mode: one batch whose graph is kept, so a probe is one backward through it."""
    from pyhessian import hessian

    def probe(layers: Layers) -> Callable[[], float]:
        for p in work.model.parameters():
            p.requires_grad_(any(p is t for t in layers.tensors))
        data = (work.x, work.y)
        operator = hessian(work.model, nn.CrossEntropyLoss(), data=data, cuda=work.device == "cuda")
        return lambda: operator.trace(maxIter=1, tol=0)[0]

    return one_operator_each(work, options, probe)


def curvlinops(work: Workload, options: argparse.Namespace) -> dict:
    """curvlinops: a Hessian operator over batches of 64, and its Hutchinson estimator one probe at a time."""
    from curvlinops import HessianLinearOperator, hutchinson_trace

    def probe(layers: Layers) -> Callable[[], float]:
        parameters = list(layers.values())
        operator = HessianLinearOperator(
            work.model, nn.CrossEntropyLoss(), parameters, work.batches(64), check_deterministic=False
        )
        return lambda: hutchinson_trace(operator, 1, distribution="rademacher")

    return one_operator_each(work, options, probe)


METHODS: dict[str, Callable[[Workload, argparse.Namespace], dict]] = {
    "ours: gauss_newton": ours_gauss_newton,
    "ours: hutchinson": ours_hutchinson,
    "curvlinops": curvlinops,
    "PyHessian": pyhessian,
}


# Penalty steps --------------------------------------------------------------------------------------------

PENALTIES = {
    "plain": None,
    "gauss_newton": WCIPenalty(1e-4, estimator="gauss_newton"),
    "gauss_newton, trace alone": "value",
    "hutchinson": WCIPenalty(1e-4, estimator="hutchinson"),
    "top_layer": WCIPenalty(1e-4, estimator="top_layer"),
}


def penalty_steps(options: argparse.Namespace) -> dict:
    """Time a step of every estimator in turn, in several rounds; print median ratios to the plain step."""
    steps = {name: penalty_step(penalty, options) for name, penalty in PENALTIES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds * (10 if options.device == "cuda" else 1)):
        for name in steps if number % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            steps[name]()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(
        f"ResNet-18, width {options.width}, batch {options.batch} of 32 px, train mode, {options.device}, "
        f"{options.threads} thread(s), {len(seconds['plain'])} rounds; plain: one forward and backward "
        "pass, no attack; trace alone: no gradient of the loss\n"
    )
    print("| step | time | range |\n| --- | ---: | ---: |")
    results = {}
    for name in steps:
        ratios = sorted(s / plain for s, plain in zip(seconds[name], seconds["plain"], strict=True))
        results[name] = {"median": ratios[len(ratios) // 2], "lowest": ratios[0], "highest": ratios[-1]}
        print(f"| {name} | {ratios[len(ratios) // 2]:.2f}x | {ratios[0]:.2f} to {ratios[-1]:.2f} |")
    return results


def penalty_step(penalty: WCIPenalty | str | None, options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that makes one step; it has run twice, so that traces are known."""
    work = Workload(argparse.Namespace(**vars(options) | {"examples": options.batch}), num_steps=0)
    model, x, y = work.model.train(), work.x, work.y
    if penalty == "value":
        return lambda: gauss_newton_samples(model(x), work.layers)
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, penalty=penalty)
    for _ in range(2):
        optimizer.step(lambda: cross_entropy(model(x), y))
    return lambda: optimizer.step(lambda: cross_entropy(model(x), y))


if __name__ == "__main__":
    main()
