"""One process of the two-process tests; writes what it got to a file, as gloo may abort at exit."""

import os
import sys

import torch
from accelerate import Accelerator
from cases import RULES, SmoothNet
from torch import nn

from wcitrain.curvature import cross_entropy
from wcitrain.optim import RegularizedOptimizer


def data(part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch with this global number."""
    generator = torch.Generator().manual_seed(part)
    return torch.randn(6, 4, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator)


def train(rule: str, rank: int, world: int, normalised: nn.Module | None = None) -> tuple[dict, object]:
    """``world`` processes with one micro-batch each, or one process (world 1) that accumulates two."""
    accumulate = 2 // world
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    assert accelerator.num_processes == world, f"asked for {world} processes, got {accelerator.num_processes}"
    torch.manual_seed(0)
    model = SmoothNet().double() if normalised is None else normalised
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, **RULES[rule].kwargs
    )
    prepared, wrapped = accelerator.prepare(model, optimizer)
    optimizer.attach(accelerator, prepared)
    for step in range(4):
        for micro in range(accumulate):
            x, y = data(2 * step + micro * world + rank)
            with accelerator.accumulate(prepared):
                optimizer.backward(lambda x=x, y=y: cross_entropy(prepared(x), y))
                wrapped.step()
                wrapped.zero_grad()
    traces = optimizer.traces()
    return {k: v.detach() for k, v in model.state_dict().items()} | (
        {} if traces is None else {"traces": traces}
    ), accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, kind, *rules = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if kind == "wrapper":
        results = {}
        for rule in rules:
            results[rule], _ = train(rule, rank, 2)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
            results[f"{rule}, BatchNorm"], _ = train(rule, rank, 2, normalised=model)
        torch.save(results, f"{out}/{rank}.pt")
    else:
        from wcitrain.recipe import load_recipe
        from wcitrain.train import fit

        fit(load_recipe(f"{out}/recipe.yaml", ["name=two", "train.accumulate=1"]))
        torch.save(True, f"{out}/{rank}.pt")
