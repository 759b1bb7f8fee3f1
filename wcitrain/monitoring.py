"""What is measured while a run trains (accuracies, the index, further measures), and what stops it."""

import math
from typing import Any

import torch
from torch import Tensor

from wcitrain.attacks import Attack
from wcitrain.build import step_size
from wcitrain.data import Images
from wcitrain.evaluation import AccuracyMeasurement, measure_accuracy
from wcitrain.measures import Problem
from wcitrain.params import select_layers
from wcitrain.run import DRY_RUN_IMAGES, Run
from wcitrain.seeding import generator_from

OVERFITTING_IMAGES = 256  # behind one look for catastrophic overfitting: a standard error of at most 3 points


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped on it."""

    exit_status = 1


def measure(run: Run, images: Any, *, wci: bool = False) -> AccuracyMeasurement:
    """Evaluate the measured weights on a set with the recipe's evaluation attack."""
    settings, restarts = run.recipe.evaluation, run.recipe.evaluation.num_restarts
    length = step_size(run.recipe, settings)
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
    metrics = {}
    for name, value in run.regularizer.metrics().items():
        if name in ("relative_size", "lambda", "curvature/negative"):
            metrics[name] = value
        elif name.startswith(("wci/", "curvature/trace/")):
            metrics[f"running/{name}"] = value
    return metrics


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
    for measurement in (measure.measure(problem) for measure in section.take):
        metrics[f"measures/{section.split}/{measurement.name}"] = measurement.value
        metrics[f"measures/{section.split}/{measurement.name}_stderr"] = measurement.stderr
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def try_measures(run: Run) -> None:
    """Take the recipe's measures of a few images, so that wrong settings do not show hours later."""
    try:
        take_measures(run, DRY_RUN_IMAGES)
    except (ValueError, TypeError, RuntimeError) as error:
        text = f"measures: {error} (a dry run on {DRY_RUN_IMAGES} images). Correct measures.take."
        raise ValueError(text) from error


def overfitting(run: Run) -> tuple[dict[str, Any], str | None]:
    """Look for catastrophic overfitting on one batch; return metrics, and what to say of it, if anything."""
    guard = run.guard
    if guard is None:
        return {}, None
    images = run.monitored.subset(min(len(run.monitored), OVERFITTING_IMAGES))
    x, y, _ = next(images.batches(len(images), device=run.device))
    generator = generator_from(run.device, run.recipe.seed, "guard")
    is_overfitting = guard.check(run.bare, x, y, run.recipe.threat, generator)
    metrics: dict[str, Any] = {"train/guard_robust_accuracy": guard.last}
    if not is_overfitting:
        return metrics, None
    what = f"robust accuracy on {len(images)} training images under PGD-{guard.num_steps}"
    fall = f"{what} fell from {100 * (guard.best or 0):.0f} % to {100 * (guard.last or 0):.0f} %"
    text = f"epoch {run.progress.epoch + 1}: catastrophic overfitting: {fall}"
    return metrics | {"catastrophic_overfitting": 1}, text


def refuse_non_finite(run: Run, loss: float, index: Tensor) -> None:
    """Stop before anything is stepped on a loss that is not a number."""
    shown = ", ".join(map(str, index.tolist()[:50])) + (f" (+{len(index) - 50})" if len(index) > 50 else "")
    where = f"step {run.progress.step} (epoch {run.progress.epoch + 1})"
    text = f"{where}: got loss {loss} on the training images [{shown}]; expected a finite number."
    advice = "Lower optimizer.lr, set train.max_norm, or look at these images."
    raise NonFiniteLossError(f"{text} {_last_good(run)}. {advice}")


def refuse_diverged(run: Run, metrics: dict[str, Any]) -> None:
    """Stop before weights that are no longer numbers, or give none, are saved over good ones."""
    losses = ("train/clean_loss", "val/clean_loss", "val/robust_loss")
    bad = [key for key in losses if not math.isfinite(metrics[key])]
    bad += [name for name, p in run.measured.named_parameters() if not bool(torch.isfinite(p).all())][:3]
    if bad:
        text = f"end of epoch {run.progress.epoch + 1}: got {', '.join(bad)} not finite; expected numbers."
        raise NonFiniteLossError(f"{text} {_last_good(run)}. Lower optimizer.lr or set train.max_norm.")


def _last_good(run: Run) -> str:
    """Say which checkpoint the run can go back to."""
    last = run.folder / "checkpoints" / "last"
    return f"The last good checkpoint is {last}" if last.exists() else "No checkpoint was saved yet"
