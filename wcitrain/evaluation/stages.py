"""Attacks as stages: each attacks the examples that are still robust, and says which it broke.

Legend: N examples, B a batch of them. A restart of PGD is a stage, and so is a part of AutoAttack. An example
is robust when the model is right on it and after every stage: broken by any final iterate, not only by that
of the highest loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.attacks.ascent import ascend, input_gradient, starting_point
from wcitrain.attacks.losses import attack_loss
from wcitrain.evaluation.naming import GradientPlan
from wcitrain.evaluation.state import AttackState
from wcitrain.seeding import generator_from, seed_from


@dataclass(frozen=True)
class Stage:
    """One pass over examples: ``attack(x, y, places)`` returns x_adv [B, *dims]; places are those in the set.

    ``attacks_all``: also those that are misclassified already, because the losses of all examples are wanted.
    """

    name: str
    attack: Callable[[Tensor, Tensor, Tensor], Tensor]
    attacks_all: bool = False


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return truth values [B]: the largest logit is the label's, and none is NaN or infinite."""
    return (logits.max(1).indices == labels) & logits.isfinite().all(1)


def gradient_stages(plan: GradientPlan, model: nn.Module, threat: ThreatModel, seed: int) -> list[Stage]:
    """Return the restarts of PGD or FGSM.

    The start of an example is a function of seed, restart and place alone: not of batch size, device, radius,
    number of steps or loss: attacks start from the same points, a curve over eps has no noise of its own.
    """
    # A loss that does not exist is refused here.
    loss: Any = plan.loss
    settings = Attack(threat, plan.num_steps, plan.step_size(threat), loss=loss)

    def stage(restart: int) -> Stage:
        def attack(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
            def losses(images: Tensor) -> Tensor:
                return attack_loss(plan.loss)(model(images), y)

            x_adv = x if plan.is_fgsm else _starts(x, threat, seed, restart, places)
            for _ in range(plan.num_steps):
                gradient = input_gradient(losses, x_adv)
                x_adv = ascend(x, x_adv, gradient, threat, settings.step_size, settings.l1_share)
            return x_adv

        return Stage(f"restart {restart + 1}", attack, attacks_all=restart == 0)

    return [stage(restart) for restart in range(plan.num_restarts)]


def _starts(x: Tensor, threat: ThreatModel, seed: int, restart: int, places: Tensor) -> Tensor:
    """Return uniform starting points, each drawn on the CPU by a generator of its own."""
    one = torch.empty_like(x[:1], device="cpu")
    rows = [
        starting_point(
            one.copy_(image), threat, "uniform", generator_from("cpu", seed, "evaluation", restart, place)
        )
        for image, place in zip(x.split(1), places.tolist(), strict=True)
    ]
    return torch.cat(rows).to(x.device)


@torch.no_grad()
def run_stages(
    stages: Sequence[Stage],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    state: AttackState,
    *,
    threat: ThreatModel,
    batch_size: int,
    device: torch.device,
    seed: int,
    bar: "tqdm[None]",
) -> None:
    """Run what ``state`` has not seen yet, and save it after every batch.

    The batches of a stage are cut from what was robust at its start, in the order of the set. The global
    random state is seeded for each batch, so that a randomised model meets the same numbers whether or not
    the run was interrupted.
    """
    for number, stage in enumerate(stages):
        if number < len(state.after):
            continue
        if state.batch == 0:
            state.todo = torch.ones_like(state.is_robust) if stage.attacks_all else state.is_robust.clone()
        places = state.todo.nonzero().flatten()
        if not len(places):
            break
        for batch, chosen in enumerate(places.split(batch_size)):
            if batch < state.batch:
                continue
            images, labels = x[chosen].to(device), y[chosen].to(device)
            torch.manual_seed(seed_from(seed, stage.name, batch))
            x_adv = stage.attack(images, labels, chosen)
            logits = model(x_adv)
            is_fooled = ~is_right(logits, labels).cpu()
            if stage.attacks_all:
                state.losses[chosen] = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
            fooled = is_fooled & state.is_robust[chosen]
            lengths = _lengths(x_adv - images, threat).cpu()[fooled]
            state.furthest = max(state.furthest, float(lengths.max()) if len(lengths) else 0.0)
            state.is_robust[chosen[is_fooled]] = False
            state.batch = batch + 1
            state.save()
            bar.set_postfix_str(
                f"{stage.name}, {100 * float(state.is_robust.float().mean()):.1f} % robust", refresh=False
            )
            bar.update(len(chosen))
        state.after.append(float(state.is_robust.double().mean()))
        state.batch = 0
        state.save()


def _lengths(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the norm of every perturbation [B]."""
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)
