"""One process of the two-process tests; writes what it got to a file, as gloo may abort at exit."""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from cases import RULES, SmoothNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wcitrain.curvature import cross_entropy
from wcitrain.optim import RegularizedOptimizer, WCIPosterior

PLAIN = {f"{n} passes": {"perturbation": WCIPosterior(0.5, passes=n)} for n in (1, 2)}


def data(part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch with this global number."""
    generator = torch.Generator().manual_seed(part)
    return torch.randn(6, 4, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator)


def train(rule: str, rank: int, world: int, normalised: nn.Module | None = None) -> tuple[dict, object]:
    """``world`` processes with one micro-batch each, or one process (world 1) that accumulates two."""
    accumulate = 2 // world
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    assert accelerator.num_processes == world, f"asked for {world} processes, got {accelerator.num_processes}"
    torch.manual_seed(rank)  # DistributedDataParallel hands on the first one's weights, the wrapper W⁰
    model = SmoothNet().double() if normalised is None else normalised
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RegularizedOptimizer(base, model, **RULES[rule].kwargs)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    optimizer.attach(accelerator, prepared)
    for step in range(4):
        for micro in range(accumulate):
            x, y = data(2 * step + micro * world + rank)
            with accelerator.accumulate(prepared):
                optimizer.backward(lambda x=x, y=y: cross_entropy(prepared(x), y))
                wrapped.step()
                wrapped.zero_grad()
    traces = {} if optimizer.traces() is None else {"traces": optimizer.traces()}
    return {k: v.detach() for k, v in model.state_dict().items()} | traces, accelerator


def train_plainly(rule: str, rank: int, world: int) -> dict:
    """As ``train``, in plain PyTorch: two micro-batches a step and process, or four in one process."""
    torch.manual_seed(0)
    model, parts = SmoothNet().double(), 4 // world
    network = DistributedDataParallel(model) if world > 1 else model
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RegularizedOptimizer(base, network, **PLAIN[rule], num_micro_batches=parts)
    for step in range(4):
        for micro in range(parts):
            x, y = data(4 * step + micro * world + rank)
            is_last = micro == parts - 1
            with nullcontext() if is_last or world == 1 else network.no_sync():
                if optimizer.perturbation.is_one_pass:
                    with optimizer.perturbed():
                        (F.cross_entropy(network(x), y) / parts).backward()
                else:
                    optimizer.backward(lambda x=x, y=y: cross_entropy(network(x), y))
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.detach() for k, v in model.state_dict().items()} | {"traces": optimizer.traces()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, kind, *rules = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if kind == "plain":
        dist.init_process_group("gloo")
        torch.save({rule: train_plainly(rule, rank, 2) for rule in rules}, f"{out}/{rank}.pt")
    elif kind == "wrapper":
        results = {}
        for rule in rules:
            results[rule], _ = train(rule, rank, 2)
            torch.manual_seed(rank)
            model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
            results[f"{rule}, BatchNorm"], _ = train(rule, rank, 2, normalised=model)
        torch.save(results, f"{out}/{rank}.pt")
    else:
        from wcitrain.recipe import load_recipe
        from wcitrain.train import fit

        fit(load_recipe(f"{out}/recipe.yaml", ["name=two", "train.accumulate=1"]))
        torch.save(True, f"{out}/{rank}.pt")
