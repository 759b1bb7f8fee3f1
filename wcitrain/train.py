"""``fit(recipe)``: the loop, the resume, and the step that is the method."""

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from wcitrain import checkpoint, files, monitoring, tracking
from wcitrain.data import Batch
from wcitrain.freezing import freeze
from wcitrain.preserve import undisturbed
from wcitrain.progress import epoch_line, flat
from wcitrain.recipe import Recipe
from wcitrain.run import SAVED, Run, load, save, start_run
from wcitrain.seeding import generator_from, seed_from


class Interrupted(Exception):
    """The user (or the scheduler) asked to stop; everything is saved. The message says how to go on."""

    exit_status = 130


def fit(recipe: Recipe, *, resume: bool = False, folder: str | Path | None = None) -> dict[str, Any]:
    """Train what the recipe says and return the summary that is also written to ``summary.json``.

    With ``resume`` it goes on from the newest intact checkpoint in the run folder, bit for bit (CPU, same
    versions), or from the start where there is none yet. ``folder`` is by default ``run_folder(recipe)``.

    Raises:
        FileExistsError: The folder holds a run and ``resume`` is not asked for: nothing is overwritten.
        ValueError: A setting does not fit the data or the model.
        CheckpointError: No intact checkpoint to resume from, or the disk refused a new one.
        NonFiniteLossError: With the step, the images, and the last good checkpoint.
        Interrupted: After Ctrl-C or SIGTERM, once the state is saved.
    """
    return train(open_run(recipe, resume=resume, folder=folder))


def open_run(recipe: Recipe, *, resume: bool = False, folder: str | Path | None = None) -> Run:
    """Return a run that is ready to train, with what was saved of it put back; see ``fit``."""
    run = start_run(recipe, resume=resume, folder=folder)
    monitoring.try_measures(run)
    if run.accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.log = run.folder / "metrics.jsonl"
    if resume and any((run.folder / name).exists() for name in SAVED):
        load(run)
    elif run.log is not None:
        (run.folder / "recipe.yaml").write_text(run.recipe.to_yaml(), "utf-8")
        files.write_json(run.folder / "data.json", run.data)
        tracking.truncate(run.log, 0)  # of a run that was stopped before its first checkpoint
    run.accelerator.wait_for_everyone()
    return run


def train(run: Run) -> dict[str, Any]:
    """Run the remaining epochs, then measure the last and the best weights on the test set, once."""
    recipe, progress = run.recipe, run.progress
    config = dict(flat(recipe.model_dump(mode="json")))
    tracking.start_trackers(run.accelerator, recipe.tracking.project, run.folder, config, run.wandb_mode)
    try:
        with run.stop:
            if not progress.step:
                keep_weights(run, is_last=False)
            while progress.epoch < recipe.train.epochs and not progress.stop_reason:
                train_epoch(run)
                finish_epoch(run)
                stop_if_asked(run)
        if run.log is not None:
            print(f"training is finished and saved in {run.folder}; measuring it on test images", flush=True)
        try:
            summary = monitoring.summarize(run)
        except (ValueError, OSError) as error:
            advice = f"Mend that, then `wcitrain train --resume {run.folder}` measures it."
            raise ValueError(f"{error} Training is finished and saved. {advice}") from error
        if run.log is not None:
            files.write_json(run.folder / "summary.json", summary)
            test = summary["last"]["test"]
            accuracy = f"test clean {test['clean_accuracy']:.1%}, robust {test['robust_accuracy']:.1%}"
            print(f"{summary['method']}: {accuracy} ({summary['attack']}) -> {run.folder}", flush=True)
        return summary
    finally:
        tracking.end_trackers(run.accelerator)


def train_epoch(run: Run) -> None:
    """Make the optimizer steps of one epoch that are still to be made."""
    recipe, progress, accumulate = run.recipe, run.progress, run.recipe.train.accumulate
    replays = run.objective.num_replays
    batches = run.train_set.batches(
        run.micro_size,
        shuffle=True,
        seed=seed_from(recipe.seed, "data"),
        epoch=progress.epoch,
        start=progress.update // replays * accumulate,
        rank=run.rank,
        world=run.world,
        device=run.device,
        crop_padding=recipe.data.crop_padding,
        flip=recipe.data.flip,
        drop_last=True,
        augmentation=recipe.augment,
    )
    run.model.train()
    freeze(run.bare, run.plan, progress.epoch)
    started, before = time.perf_counter(), progress.epoch_seconds
    micro_batches: list[Batch] = []
    bar = tqdm(
        total=run.updates,
        initial=progress.update,
        desc=f"epoch {progress.epoch + 1}/{recipe.train.epochs}",
        leave=False,
        disable=None if run.accelerator.is_main_process else True,  # None: where there is no terminal
    )
    while progress.update < run.updates:
        if not micro_batches or progress.update % replays == 0:
            micro_batches = [prepared(run, next(batches), micro) for micro in range(accumulate)]
        progress.loss_sum += step(run, micro_batches)
        progress.update += 1
        progress.step += 1
        progress.epoch_seconds = before + time.perf_counter() - started
        bar.set_postfix(loss=f"{progress.loss_sum / progress.update:.3f}", refresh=False)
        bar.update()
        stop_if_asked(run)
    bar.close()


def prepared(run: Run, batch: Batch, micro: int) -> Batch:
    """Return a micro-batch with what happens to it as a whole: label noise, mixing, memory format."""
    (x, y, index), recipe, classes = batch, run.recipe, run.splits.num_classes
    if recipe.label_noise.share:
        # The places of streamed images are counted by each process for itself.
        seed = recipe.seed if run.train_set.can_shuffle else seed_from(recipe.seed, run.rank)
        y = recipe.label_noise.apply(y, index, classes, seed=seed, epoch=run.progress.epoch)
    if recipe.mixing.is_active:
        number = run.progress.update // run.objective.num_replays
        place = (run.progress.epoch, number, micro * run.world + run.rank)
        x, y = recipe.mixing.apply(x, y, classes, seed_from(recipe.seed, "mixing", *place))
    if recipe.train.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return Batch(x, y, index)


# ==========================================================================================================
# The step that is the method: attack once, then all passes of the regularised objective at the same x_adv.


def step(run: Run, micro_batches: list[Batch]) -> float:
    """Make one optimizer step and return its mean loss over processes."""
    model, recipe, number = run.model, run.recipe, run.progress.step
    objective = run.objective.scaled(factor := threat_factor(recipe, (number + 1) / run.updates))
    total = torch.zeros((), device=run.device)
    for micro, (x, y, index) in enumerate(micro_batches):
        place = (number, micro * run.world + run.rank)  # names this micro-batch on this process
        torch.manual_seed(seed_from(recipe.seed, "forward", *place))  # dropout, stochastic depth
        generator = generator_from(run.device, recipe.seed, "attack", *place)
        with run.accelerator.accumulate(model):
            with run.regularizer.attacking():  # W, or W + u for a rule of one pass
                x_adv = objective.perturb(run.attack_model, x, y, generator) if factor else x  # [B, C, H, W]
            loss = run.regularizer.backward(partial(objective.loss, model, x, x_adv, y))
            total += loss
            if not bool(torch.isfinite(loss)):
                monitoring.refuse_non_finite(run, float(loss), index)
            if x_adv.requires_grad:  # free adversarial training learns its perturbation in the same pass
                cast(Any, objective).after_backward(x, x_adv)
            if run.accelerator.sync_gradients and recipe.train.max_norm:
                run.accelerator.clip_grad_norm_(model.parameters(), recipe.train.max_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
    run.scheduler.step()
    if recipe.averaging and run.average is not None:
        recipe.averaging.after_step(run.average, run.bare, number)
    return float(run.accelerator.reduce(total / len(micro_batches), reduction="mean"))


# ==========================================================================================================


def threat_factor(recipe: Recipe, epoch: float) -> float:
    """Return the share of the radius that training attacks with at a (fractional) epoch > 0, in [0, 1]."""
    zero, full = recipe.train.eps_zero_epochs, recipe.train.eps_full_epoch
    return (epoch - zero) / (full - zero) if zero < epoch < full else float(epoch > zero)


def finish_epoch(run: Run) -> None:
    """Measure, log and save at the end of an epoch."""
    progress, recipe, epoch = run.progress, run.recipe, run.progress.epoch + 1
    started = time.perf_counter()
    rate = recipe.schedule.factor(progress.step - 1, run.updates, recipe.train.epochs)
    metrics: dict[str, Any] = {
        "epoch": epoch,
        "step": progress.step,
        "lr": recipe.optimizer.lr * rate,
        "train/loss": progress.loss_sum / run.updates,
        "images_per_second": run.updates * recipe.train.batch_size / progress.epoch_seconds,
        **monitoring.regularizer_metrics(run),
    }
    if recipe.averaging and run.average is not None:
        recipe.averaging.after_epoch(run.average, run.bare, epoch, partial(train_passes, run))
    more, warning = monitoring.overfitting(run)
    metrics |= more
    if warning and recipe.train.overfitting_guard == "stop" and epoch < recipe.train.epochs:
        progress.stop_reason = f"{warning} (train.overfitting_guard)"
    elif warning and run.log is not None:
        print(f"{warning}. Lower threat.eps or use objective grad_align or pgd_at.", flush=True)
    is_last = epoch == recipe.train.epochs or bool(progress.stop_reason)
    is_best, patience, full = False, recipe.early_stopping.patience, recipe.train.eps_full_epoch
    if epoch % recipe.evaluation.every == 0 or is_last:
        metrics |= monitoring.epoch_accuracies(run)
        monitoring.refuse_diverged(run, metrics)
        if is_best := metrics["val/robust_accuracy"] > progress.best_score:
            progress.best_score, progress.best_epoch = metrics["val/robust_accuracy"], epoch
        elif not is_last and epoch - max(progress.best_epoch, full) >= (patience or math.inf):
            lack = f"no better robust validation accuracy in {patience} epochs"
            progress.stop_reason = f"{lack} (early_stopping.patience)"
    is_last = is_last or bool(progress.stop_reason)
    if recipe.measures.take and (epoch % recipe.measures.every == 0 or is_last):
        metrics |= monitoring.take_measures(run, recipe.measures.num_examples)
    progress.train_seconds += progress.epoch_seconds
    progress.seconds += progress.epoch_seconds + time.perf_counter() - started
    metrics |= {"train_seconds": progress.train_seconds, "seconds": progress.seconds}
    progress.epoch, progress.update, progress.loss_sum, progress.epoch_seconds = epoch, 0, 0.0, 0.0
    if run.log is not None:
        tracking.append(run.log, metrics)
        print(epoch_line(metrics, recipe.train.epochs), flush=True)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    run.accelerator.log(numbers, step=progress.step)
    if is_best and run.log is not None:
        best = {"epoch": epoch, "model": run.measured.state_dict()}
        checkpoint.save_checkpoint(run.folder / "checkpoints", best, name="best")
    if progress.stop_reason and run.log is not None:
        print(f"stopped after epoch {epoch}: {progress.stop_reason}", flush=True)
    keep_weights(run, is_last=is_last)
    if epoch % recipe.checkpoint.every == 0 or is_last:
        save(run)


def keep_weights(run: Run, *, is_last: bool) -> None:
    """Export the measured weights where ``checkpoint.keep_every`` asks for it; the last epoch's always."""
    every, epoch = run.recipe.checkpoint.keep_every, run.progress.epoch
    if every and (epoch % every == 0 or is_last):
        monitoring.export(run, f"epoch-{epoch}", {"epoch": epoch})


def train_passes(run: Run, model: nn.Module) -> Iterator[None]:
    """Evaluate the training loss of ``model`` on the monitored images, for its running statistics.

    The attacks are on the trained weights, in micro-batches of one process.
    """
    size = min(run.micro_size // run.world, len(run.monitored))
    objective = run.objective.scaled(factor := threat_factor(run.recipe, run.progress.step / run.updates))
    for number, (x, y, _) in enumerate(run.monitored.batches(size, device=run.device)):
        if len(x) < size:
            return  # the last part is smaller than what the network was trained on
        generator = generator_from(run.device, run.recipe.seed, "recalibration", run.progress.epoch, number)
        with undisturbed(run.bare, training=None):
            x_adv = objective.perturb(run.bare, x, y, generator).detach() if factor else x
        objective.loss(model, x, x_adv, y)
        yield


# ---- stopping ----------------------------------------------------------------------------------------------


def stop_if_asked(run: Run) -> None:
    """Save and raise ``Interrupted`` once a signal has come, on all processes together."""
    is_asked = run.stop.is_set
    if run.world > 1:
        flag = torch.tensor(float(is_asked), device=run.device)
        is_asked = bool(run.accelerator.reduce(flag, reduction="sum"))
    if is_asked:
        save(run)
        advice = f"everything is saved. Go on with `wcitrain train --resume {run.folder}`."
        raise Interrupted(f"stopped after step {run.progress.step}; {advice}")
