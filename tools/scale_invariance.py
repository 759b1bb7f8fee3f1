"""Scale every convolution before a BatchNorm by a factor, its running statistics with it, and measure again.

    python tools/scale_invariance.py RUN [--factors 0.5 1 2] [--at EPOCH] [--examples 100]

The network stays the same function, so a measure of how it generalises should stay the same (Stutz, Hein &
Schiele, ICCV 2021, section 4, scale 0.5 and 2). Relative measures do; the largest eigenvalue and the trace of
the Hessian do not.
"""

import argparse
import copy
import sys

import torch
from torch import nn

from wcitrain.commands.common import attack_asked
from wcitrain.commands.study import Study, settings_by_measure
from wcitrain.measures import MEASURES, Problem
from wcitrain.targets import open_run

NAMES = ["average_flatness", "worst_flatness", "wci", "hessian_trace", "lambda_max", "sam_sharpness"]


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """Return a copy whose convolutions are ``factor`` times as long where a BatchNorm undoes it."""
    twin = copy.deepcopy(model)
    conv = None
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.Conv2d):
                conv = module
            elif isinstance(module, nn.BatchNorm2d) and conv and conv.out_channels == module.num_features:
                conv.weight.mul_(factor)
                if conv.bias is not None:
                    conv.bias.mul_(factor)
                # scale² (var + ε) needs the ε too, so that the normalised output is the same to rounding
                module.running_mean.mul_(factor)
                module.running_var.add_(module.eps).mul_(factor**2).sub_(module.eps)
                conv = None
    return twin


def main() -> int:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder of a network with BatchNorm")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--at", default="last", help="last, best, or a number of a kept epoch")
    parser.add_argument("--examples", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--measures", nargs="+", default=NAMES, choices=list(MEASURES), metavar="NAME")
    parser.add_argument("--set", nargs="+", default=[], metavar="MEASURE.SETTING=VALUE")
    options = parser.parse_args()
    study = Study(measures=options.measures, settings=settings_by_measure(options.set))
    target = open_run(options.run, options.at, device="cpu")
    model, images = target.load_model(), target.images("test")
    data = [(x, y) for x, y, _ in images.subset(min(options.examples, len(images))).batches(100)]
    attack = attack_asked(target.recipe, study)
    models = {factor: scaled(model, factor) for factor in options.factors}
    with torch.no_grad():
        for factor, twin in models.items():
            change = float((twin.eval()(data[0][0]) - model.eval()(data[0][0])).abs().max())
            if change > 1e-3:  # another module than the next BatchNorm reads a convolution
                raise ValueError(f"factor {factor:g}: logits change by {change:.2g}; expected no change.")
    print("| measure | " + " | ".join(f"x{factor:g}" for factor in models) + " |")
    print("| --- |" + " ---: |" * len(models))
    for name, measure in study.made().items():
        taken = [measure.measure(Problem(twin, data, attack)) for twin in models.values()]
        cells = [str(m).removeprefix(name).partition("(")[0].strip() for m in taken]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
