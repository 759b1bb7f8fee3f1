"""The end of a run: last and best weights measured on every split, exported for timm, and summarised.

This is the only place where test images are read.
"""

import json
import platform
import resource
import sys
import warnings
from importlib.metadata import version
from typing import Any

import torch

from wcitrain import checkpoint
from wcitrain.build import step_size
from wcitrain.method import fraction_text
from wcitrain.monitoring import measure
from wcitrain.recipe import Recipe
from wcitrain.run import Run

PGD10_AT_COST = 10 + 10 + 3  # as ``cost`` counts


def summarize(run: Run) -> dict[str, Any]:
    """Return the summary of a finished run; the run's weights stay its last ones."""
    recipe, progress, measured = run.recipe, run.progress, run.measured
    last_weights = {name: value.clone() for name, value in measured.state_dict().items()}
    last = {"epoch": progress.epoch, **measure_everywhere(run)}
    best: dict[str, Any] | None = last
    if progress.best_epoch not in (0, progress.epoch):
        try:
            state, _ = checkpoint.load_checkpoint(run.folder / "checkpoints", "best")
            measured.load_state_dict(state["model"])
            best = {"epoch": state["epoch"], **measure_everywhere(run)}
        except checkpoint.CheckpointError as error:
            warnings.warn(f"the best weights are lost and left out of the summary: {error}", stacklevel=2)
            best = None
    if best is not None:
        export(run, "best", best)
    measured.load_state_dict(last_weights)
    export(run, "last", last)
    versions = {name: version(name) for name in ("torch", "timm", "accelerate")}
    return {
        "name": run.folder.name,
        "group": recipe.name,
        "seed": recipe.seed,
        "method": recipe.method,
        "status": "finished",
        "stopped_early": progress.stop_reason or None,
        "attack": attack_label(recipe),
        "last": last,
        "best": best,
        "seconds": progress.seconds,
        "train_seconds": progress.train_seconds,
        "cost": cost(run),
        "peak_memory_mb": peak_memory_mb(run.device),
        "num_parameters": sum(p.numel() for p in run.bare.parameters()),
        "processes": run.world,
        "device": run.device.type,
        "versions": versions | {"python": platform.python_version()},
    }


def attack_label(recipe: Recipe) -> str:
    """Return what robust accuracy means here: "PGD-10 linf 8/255, step 2/255"."""
    settings = recipe.evaluation
    restarts = f", {settings.num_restarts} restarts" if settings.num_restarts > 1 else ""
    step = fraction_text(step_size(recipe, settings))
    step = f"{step:.3g}" if isinstance(step, float) else step
    return f"PGD-{settings.num_steps} {recipe.threat}, step {step}{restarts}"


def measure_everywhere(run: Run) -> dict[str, Any]:
    """Return how the measured weights do on the training subset, validation and test images."""
    train = measure(run, run.monitored, wci=run.recipe.evaluation.wci)
    val, test = measure(run, run.splits.val), measure(run, run.splits.test)
    result: dict[str, Any] = {"train": train.summary(), "val": val.summary(), "test": test.summary()}
    result["robust_gap"] = train.robust_accuracy - test.robust_accuracy
    if train.wci is not None:
        result |= {"wci": train.wci.total, "wci_stderr": train.wci.total_stderr}
    return result


def cost(run: Run) -> dict[str, float]:
    """Return the passes of one optimizer step, and their cost relative to no rule and to AT with PGD-10.

    A forward counts 1, a backward to the input alone 1 (attack), a backward to the weights 2. Every pass of a
    perturbation or penalty evaluates the objective's whole loss.
    """
    attack, loss = run.objective.attack_passes(), run.objective.loss_passes()
    forward, backward = (n * (1 + more) for n, more in zip(loss, run.regularizer.extra_passes(), strict=True))
    total = sum(attack) + forward + 2 * backward
    return {
        "forward_passes": attack[0] + forward,
        "backward_passes": attack[1] + backward,
        "relative": total / (sum(attack) + loss[0] + 2 * loss[1]),
        "relative_to_pgd10_at": total / PGD10_AT_COST,
    }


def export(run: Run, name: str, result: dict[str, Any]) -> None:
    """Write the inner timm model and what it needs under ``model/<name>``; ``models.load_exported`` reads it.

    ``result`` holds its epoch and, at the end of a run, its evaluation on test images.
    """
    if not run.accelerator.is_main_process:
        return
    measured, recipe, test = run.measured, run.recipe, result.get("test", {})
    metadata = {
        "architecture": recipe.model.name,
        "kwargs": json.dumps(recipe.model.kwargs),
        "stem": recipe.model.stem,
        "num_classes": str(run.splits.num_classes),
        "in_chans": str(run.splits.in_chans),
        "mean": json.dumps(measured.mean.flatten().tolist()),
        "std": json.dumps(measured.std.flatten().tolist()),
        "threat": str(recipe.threat),
        "method": recipe.method,
        "seed": str(recipe.seed),
        "epoch": str(result["epoch"]),
        **{f"test_{key}": str(test[key]) for key in ("clean_accuracy", "robust_accuracy") if test},
    }
    checkpoint.save_exported_model(run.folder / "model" / name, measured.backbone.state_dict(), metadata)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak of this process in MB: CUDA's allocations, or the resident set since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
