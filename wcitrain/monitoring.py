"""What is measured while a run trains and at its end, what is exported, and what stops it.

`summarize` is the only place where test images are read.
"""

import json
import math
import platform
import resource
import sys
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from wcitrain import checkpoint
from wcitrain.attacks import Attack
from wcitrain.build import step_size
from wcitrain.data import Images
from wcitrain.evaluation import AccuracyMeasurement, measure_accuracy
from wcitrain.freezing import all_trainable
from wcitrain.measures import Problem
from wcitrain.method import fraction_text
from wcitrain.params import select_layers
from wcitrain.run import DRY_RUN_IMAGES, Run
from wcitrain.seeding import generator_from

OVERFITTING_IMAGES = 256  # behind one look for catastrophic overfitting: a standard error of at most 3 points
PGD10_AT_COST = 10 + 10 + 3  # as ``cost`` counts


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped on it."""

    exit_status = 1


# ---- while it trains ---------------------------------------------------------------------------------------


def measure(run: Run, images: Any, *, wci: bool = False) -> AccuracyMeasurement:
    """Evaluate the measured weights on a set with the recipe's evaluation attack."""
    settings, restarts = run.recipe.evaluation, run.recipe.evaluation.num_restarts
    length = step_size(run.recipe, settings)
    with all_trainable(run.measured, run.plan):
        return measure_accuracy(
            run.measured,
            images.batches(settings.batch_size, device=run.device),
            Attack(run.recipe.threat, settings.num_steps, length, num_restarts=restarts),
            seed=run.recipe.seed,
            layers=select_layers(run.measured) if wci else None,  # whatever the method's own layers
            accelerator=run.accelerator,
        )


def epoch_accuracies(run: Run) -> dict[str, Any]:
    """Return the accuracies of an epoch on training and validation images, and the index."""
    train, val = measure(run, run.monitored, wci=run.recipe.evaluation.wci), measure(run, run.splits.val)
    keys = ("clean_accuracy", "clean_loss", "robust_accuracy", "robust_loss")
    metrics: dict[str, Any] = {f"train/{key}": getattr(train, key) for key in keys}
    metrics |= {f"val/{key}": getattr(val, key) for key in keys}
    metrics["robust_gap"] = train.robust_accuracy - val.robust_accuracy
    return metrics | (train.wci.metrics() if train.wci else {})


def regularizer_metrics(run: Run) -> dict[str, float]:
    """Return what the optimizer wrapper logs."""
    plain, running = ("relative_size", "lambda", "curvature/negative"), ("wci", "curvature/trace/")
    metrics = run.regularizer.metrics()
    kept = [name for name in metrics if name in plain or name.startswith(running)]
    return {name if name in plain else f"running/{name}": metrics[name] for name in kept}


def take_measures(run: Run, num_examples: int) -> dict[str, float]:
    """Take the recipe's measures, functions of the weights and the seed: every process takes them all."""
    section, recipe = run.recipe.measures, run.recipe
    images: Images = getattr(run.splits, section.split)
    subset = images.subset(min(num_examples, len(images)))
    batches = [(x, y) for x, y, _ in subset.batches(min(100, len(subset)), device=run.device)]
    # One restart, whatever evaluation.num_restarts says.
    attack = Attack(recipe.threat, recipe.evaluation.num_steps, step_size(recipe, recipe.evaluation))
    problem = Problem(run.measured, batches, attack, recipe.seed, num_examples, initial=run.initial)
    metrics: dict[str, float] = {}
    with all_trainable(run.measured, run.plan):
        taken = [measure.measure(problem) for measure in section.take]
    for measurement in taken:
        metrics[f"measures/{section.split}/{measurement.name}"] = measurement.value
        metrics[f"measures/{section.split}/{measurement.name}_stderr"] = measurement.stderr
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def try_measures(run: Run) -> None:
    """Take the recipe's measures of a few images; a wrong setting is a ValueError now, not hours later."""
    try:
        take_measures(run, DRY_RUN_IMAGES)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"measures: {error} (a dry run on {DRY_RUN_IMAGES} images)") from error


def overfitting(run: Run) -> tuple[dict[str, Any], str]:
    """Look for catastrophic overfitting on one batch; return metrics, and what to say of it, if anything."""
    guard = run.guard
    if guard is None or run.progress.epoch + 1 <= run.recipe.train.eps_zero_epochs:
        return {}, ""
    images = run.monitored.subset(min(len(run.monitored), OVERFITTING_IMAGES))
    x, y, _ = next(images.batches(len(images), device=run.device))
    generator = generator_from(run.device, run.recipe.seed, "guard")
    is_overfitting = guard.check(run.bare, x, y, run.recipe.threat, generator)
    metrics: dict[str, Any] = {"train/guard_robust_accuracy": guard.last}
    if not is_overfitting:
        return metrics, ""
    what = f"robust accuracy on {len(images)} training images under PGD-{guard.num_steps}"
    fall = f"{what} fell from {100 * (guard.best or 0):.0f} % to {100 * (guard.last or 0):.0f} %"
    metrics["catastrophic_overfitting"] = 1
    return metrics, f"epoch {run.progress.epoch + 1}: catastrophic overfitting: {fall}"


def refuse_non_finite(run: Run, loss: float, index: Tensor) -> None:
    """Stop before anything is stepped on a loss that is not a number."""
    where = f"step {run.progress.step} (epoch {run.progress.epoch + 1})"
    _stop(run, f"{where}: got loss {loss} on the training images {index.tolist()[:50]}")


def refuse_diverged(run: Run, metrics: dict[str, Any]) -> None:
    """Stop before weights that are no longer numbers, or give none, are saved over good ones."""
    losses = ("train/clean_loss", "val/clean_loss", "val/robust_loss")
    bad = [key for key in losses if not math.isfinite(metrics[key])]
    bad += [name for name, p in run.measured.named_parameters() if not bool(torch.isfinite(p).all())][:3]
    if bad:
        _stop(run, f"end of epoch {run.progress.epoch + 1}: got {', '.join(bad)} not finite")


def _stop(run: Run, text: str) -> None:
    """Stop for a number that is not finite, and say which checkpoint the run can go back to."""
    last = run.folder / "checkpoints" / "last"
    good = f"The last good checkpoint is {last}" if last.exists() else "No checkpoint was saved yet"
    advice = "Lower optimizer.lr or set train.max_norm."
    raise NonFiniteLossError(f"{text}; expected finite numbers. {good}. {advice}")


# ---- at the end --------------------------------------------------------------------------------------------


def summarize(run: Run) -> dict[str, Any]:
    """Return the summary of a finished run; the run's weights stay its last ones."""
    recipe, progress, measured = run.recipe, run.progress, run.measured
    last_weights = {name: value.clone() for name, value in measured.state_dict().items()}
    last = {"epoch": progress.epoch, **_measure_everywhere(run)}
    best: dict[str, Any] | None = last
    if progress.best_epoch not in (0, progress.epoch):
        try:
            state, _ = checkpoint.load_checkpoint(run.folder / "checkpoints", "best")
            measured.load_state_dict(state["model"])
            best = {"epoch": state["epoch"], **_measure_everywhere(run)}
        except checkpoint.CheckpointError as error:
            warnings.warn(f"the best weights are lost and left out of the summary: {error}", stacklevel=2)
            best = None
    if best is not None:
        export(run, "best", best)
    measured.load_state_dict(last_weights)
    export(run, "last", last)
    settings, step = recipe.evaluation, fraction_text(step_size(recipe, recipe.evaluation))
    step = f"{step:.3g}" if isinstance(step, float) else step
    restarts = f", {settings.num_restarts} restarts" if settings.num_restarts > 1 else ""
    versions = {name: version(name) for name in ("torch", "timm", "accelerate")}
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
    else:  # of this process since it started; in bytes or KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "name": run.folder.name,
        "group": recipe.name,
        "seed": recipe.seed,
        "method": recipe.method,
        "status": "finished",
        "stopped_early": progress.stop_reason or None,
        "attack": f"PGD-{settings.num_steps} {recipe.threat}, step {step}{restarts}",
        "last": last,
        "best": best,
        "seconds": progress.seconds,
        "train_seconds": progress.train_seconds,
        "cost": cost(run),
        "peak_memory_mb": peak / 1e6,
        "num_parameters": sum(p.numel() for p in run.bare.parameters()),
        "processes": run.world,
        "device": run.device.type,
        "versions": versions | {"python": platform.python_version()},
    }


def _measure_everywhere(run: Run) -> dict[str, Any]:
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
        "resize_inside": json.dumps(recipe.model.resize_inside),
        "num_classes": str(run.splits.num_classes),
        "in_chans": str(run.splits.in_chans),
        "input_size": json.dumps(run.splits.shape),
        "class_names": json.dumps(run.splits.class_names),
        "mean": json.dumps(measured.mean.flatten().tolist()),
        "std": json.dumps(measured.std.flatten().tolist()),
        "threat": str(recipe.threat),
        "method": recipe.method,
        "seed": str(recipe.seed),
        "epoch": str(result["epoch"]),
        **{f"test_{key}": str(test[key]) for key in ("clean_accuracy", "robust_accuracy") if test},
    }
    checkpoint.save_exported_model(run.folder / "model" / name, measured.backbone.state_dict(), metadata)
