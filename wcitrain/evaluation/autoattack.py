"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) stage by stage, through the package ``pyautoattack``.

The parts run in the order, with the settings, seeds and batches of ``AutoAttack.run_standard_evaluation``, so
that every flag is the one it would give; between them the evaluation saves how far it is, which upstream's
own state file does not allow (it cannot be read back). Different from upstream:

- Target classes are at most the number of classes less one; upstream stops with an index error.
- Parts that few classes make impossible are left out and named: ``apgd-dlr`` needs three, ``apgd-t`` four.
- Chosen parts run with the settings of the standard version; upstream's "custom" restarts five times.
- Parameters take no gradient meanwhile (FAB calls ``backward``, which would add to ``.grad``).

Random numbers are drawn for a batch, so flags depend on the batch size a little, upstream's too.
"""

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.naming import EnsemblePlan
from wcitrain.evaluation.stages import Stage

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the DLR losses sort out the third and the fourth largest logit


def require_autoattack() -> Any:
    """Return the package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ModuleNotFoundError(
            'attacks: got autoattack; expected the package pyautoattack. pip install "wcitrain[eval]"',
            name="pyautoattack",
        ) from error


def autoattack_stages(
    plan: EnsemblePlan,
    model: nn.Module,
    threat: ThreatModel,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> tuple[list[Stage], tuple[str, ...]]:
    """Return AutoAttack's parts, and one sentence for each that was left out.

    Args:
        plan: Version, or parts.
        model: Maps images in [0, 1] to logits [B, C]; deterministic, unless the version is ``"rand"``.
        threat: ``"linf"``, ``"l2"`` or ``"l1"``.
        num_classes: C >= 2.
        seed: Of every part and batch, as upstream.
        device: Where images and model are.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.
        ValueError: No part is left.
    """
    adversary = require_autoattack().AutoAttack(
        model, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version=plan.version, device=device
    )
    silent = logging.Logger("autoattack", logging.CRITICAL + 1)  # what it warns of is in preflight
    adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = silent
    for part in (adversary.apgd_targeted, adversary.fab):
        part.n_target_classes = min(part.n_target_classes, num_classes - 1)
    wanted = list(plan.components or adversary.attacks_to_run)
    kept = [name for name in wanted if num_classes >= LEAST_CLASSES.get(name, 2)]
    notes = tuple(
        f"{name} left out: it needs {LEAST_CLASSES[name]} classes, here are {num_classes}"
        for name in wanted
        if name not in kept
    )
    if not kept:
        raise ValueError(
            f"{plan.name}: {'; '.join(notes)}; expected a part that can run. Add apgd-ce or fab-t."
        )
    restarts = adversary.fab.n_restarts
    return [
        _stage(adversary, name, 1 if "fab-t" in kept[: kept.index(name)] else restarts, seed) for name in kept
    ], notes


def _stage(adversary: Any, name: str, fab_restarts: int, seed: int) -> Stage:
    """Return one part, set up as upstream has it at its turn (fab after fab-t keeps its single restart)."""

    def attack(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        if name == "apgd-t":
            part = adversary.apgd_targeted
        elif name == "square":
            part = adversary.square
        elif name.startswith("fab"):
            part = adversary.fab
            part.targeted, part.n_restarts = (True, 1) if name == "fab-t" else (False, fab_restarts)
        else:
            part = adversary.apgd
            part.loss = name.removeprefix("apgd-")
        part.seed = seed
        x_adv: Tensor = part.perturb(x, y)
        return x_adv

    return Stage(name, attack)
