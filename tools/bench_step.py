"""Time and peak memory of one step by every rule, as multiples of plain PGD-10 adversarial training.

    python tools/bench_step.py [--model preact_resnet18] [--batch 32] [--size 32] [--rounds 5] [--device cpu]

All rules are timed in one process, in turn within every round (machines are noisy: only ratios of the same
round count), and the median of the ratios is printed with its 95 % interval (by ranks: n/2 ± sqrt(n) of n
rounds), beside the multiple that counting passes predicts (a forward counts 1, a backward to the input 1, a
backward to the weights 2). Memory: the highest of one step above a plain one's, by torch's allocators, in
multiples of the model's weights.
"""

import argparse
import time
from itertools import accumulate
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from wcitrain.attacks import ThreatModel
from wcitrain.models import create_model
from wcitrain.objectives import MART, PGDAT, TRADES, FreeAT, GradAlign
from wcitrain.optim import (
    ASAM,
    AWP,
    CRSAM,
    GSAM,
    RWP,
    SAM,
    GradientNorm,
    NoiseStability,
    RegularizedOptimizer,
    StrengthSchedule,
    UniformNoise,
    VaSSO,
    WCIAdversary,
    WCIPenalty,
    WCIPosterior,
)

THREAT = ThreatModel("linf", 8 / 255)
GAUSS_NEWTON = WCIPenalty(1e-4, estimator="gauss_newton")
RULES = {  # what the wrapper is given; "objective" replaces PGD-10 adversarial training
    "AT": {},
    "SAM": {"perturbation": SAM(0.05)},
    "ASAM": {"perturbation": ASAM(0.5)},
    "AWP": {"perturbation": AWP(0.01)},
    "VaSSO": {"perturbation": VaSSO(0.05)},
    "GSAM": {"perturbation": GSAM(0.05)},
    "gradient norm": {"perturbation": GradientNorm(0.04)},
    "CR-SAM": {"perturbation": CRSAM()},
    "RWP": {"perturbation": RWP(0.01)},
    "RWP (unmixed)": {"perturbation": RWP(0.01, mixing=1.0)},
    "NSO": {"perturbation": NoiseStability(0.01)},
    "noise": {"perturbation": UniformNoise(0.5)},
    "noise (one pass)": {"perturbation": UniformNoise(0.5, passes=1)},
    "WCI": {"perturbation": WCIPosterior(0.5)},
    "WCI (one pass)": {"perturbation": WCIPosterior(0.5, passes=1)},
    "WCI (traces gauss_newton)": {"perturbation": WCIPosterior(0.5, traces="gauss_newton")},
    "worst-case WCI": {"perturbation": WCIAdversary(0.01)},
    "WCI penalty (gauss_newton)": {"penalty": GAUSS_NEWTON},
    "WCI penalty (gauss_newton every 10)": {
        "penalty": WCIPenalty(1e-4, schedule=StrengthSchedule(every=10), estimator="gauss_newton")
    },
    "AWP and WCI penalty": {"perturbation": AWP(0.01), "penalty": GAUSS_NEWTON},
    "TRADES": {"objective": TRADES(THREAT, num_steps=10)},
    "TRADES and WCI": {"objective": TRADES(THREAT, num_steps=10), "perturbation": WCIPosterior(0.5)},
    "MART": {"objective": MART(THREAT, num_steps=10)},
    "GradAlign": {"objective": GradAlign(THREAT)},
    "free AT (one replay)": {"objective": FreeAT(THREAT)},
}


class Workload:
    """One model, batch and optimizer; ``step`` is one step of adversarial training."""

    def __init__(self, rule: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        device = torch.device(options.device)
        self.model = create_model(options.model, num_classes=10, stem=options.stem).to(device)
        self.x = torch.rand(options.batch, 3, options.size, options.size, device=device)
        self.y = torch.randint(0, 10, (options.batch,), device=device)
        settings = dict(RULES[rule])
        self.objective = settings.pop("objective", PGDAT(THREAT, num_steps=10))
        base = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.optimizer = RegularizedOptimizer(base, self.model, **settings)
        self.device = device

    def step(self) -> None:
        """Attack, gradients, step."""
        with self.optimizer.attacking():
            x_adv = self.objective.perturb(self.model, self.x, self.y)
        self.optimizer.step(lambda: self.objective.loss(self.model, self.x, x_adv, self.y))
        if x_adv.requires_grad:
            self.objective.after_backward(self.x, x_adv)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def predicted(self) -> float:
        """Return the multiple of PGD-10 adversarial training that counting passes predicts."""
        attack = sum(self.objective.attack_passes())
        loss_forward, loss_backward = self.objective.loss_passes()
        forward, backward = self.optimizer.extra_passes()
        passes = attack + loss_forward * (1 + forward) + 2 * loss_backward * (1 + backward)
        return passes / (10 + 10 + 1 + 2)


def peak_memory(work: Workload) -> float:
    """Return the highest memory of one more step above that before it, in bytes, by torch's allocators."""
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work.step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes), default=0)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--stem", default="default")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", default=",".join(RULES), help="comma-separated; AT is always run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rules = [rule for rule in RULES if rule == "AT" or rule in options.rules.split(",")]
    # A thread's CPU time leaves out what other jobs on the machine take; a GPU's work is not in it.
    clock = time.process_time if (options.device, options.threads) == ("cpu", 1) else time.perf_counter
    work = {rule: Workload(rule, options) for rule in rules}
    for w in work.values():
        w.step()  # warm-up, and the first trace estimate
    seconds: dict[str, list[float]] = {rule: [] for rule in rules}
    for number in range(options.rounds * 10 if options.device == "cuda" else options.rounds):
        for rule in rules if number % 2 == 0 else reversed(rules):
            start = clock()
            work[rule].step()
            seconds[rule].append(clock() - start)
    memory = {rule: peak_memory(one) for rule, one in work.items()}
    weights = sum(p.numel() * p.element_size() for p in work["AT"].model.parameters())
    size = f"batch {options.batch}, {options.size} px"
    print(f"{options.model}, {size}, PGD-10, {options.device}, {options.threads} thread(s)")
    print(f"plain step: {median(seconds['AT']):.2f} s, {memory['AT'] / 1e6:.0f} MB\n")
    print("| rule | time | 95 % | predicted | weights |\n| --- | ---: | ---: | ---: | ---: |")
    for rule in rules:
        ratios = sorted(own / plain for own, plain in zip(seconds[rule], seconds["AT"], strict=True))
        low = max(0, int(len(ratios) / 2 - len(ratios) ** 0.5))
        print(
            f"| {rule} | {median(ratios):.3f}x | {ratios[low]:.3f} to {ratios[-1 - low]:.3f} | "
            f"{work[rule].predicted():.3f}x | {(memory[rule] - memory['AT']) / weights:+.1f} |"
        )


if __name__ == "__main__":
    main()
