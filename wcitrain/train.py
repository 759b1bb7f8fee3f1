"""``fit(recipe)``: builds the parts in order, runs the loop, saves, resumes. Settings stop in this file.

Every random number is a function of the recipe's seed and of the step it is used in (``seeding``), so a run that stops
anywhere between two optimizer steps goes on exactly as if it had not stopped, and there is no random state to save.
"""

import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain import checkpoint, tracking
from wcitrain.attacks import ThreatModel
from wcitrain.averaging import EMA, SWA
from wcitrain.build import (
    build_augmentation,
    build_mixing,
    build_objective,
    build_optimizer,
    build_regularizer,
    initial_model,
    learning_rate_factor,
    step_size,
    threat_factor,
)
from wcitrain.data import Batch, StreamSet, noisy_labels
from wcitrain.evaluation import AccuracyMeasurement, measure_accuracy
from wcitrain.images import open_splits, open_training_set
from wcitrain.measures.adversarial import reused_attacks
from wcitrain.measures.by_name import NEED_INITIAL, Shared, check_settings
from wcitrain.measures.by_name import measure as take_measure
from wcitrain.models import Classifier, try_forward
from wcitrain.objectives import CatastrophicOverfittingGuard
from wcitrain.optim import RegularizedOptimizer
from wcitrain.params import select_layers
from wcitrain.preserve import undisturbed
from wcitrain.progress import Progress, epoch_line, has_started, last_line, run_folder
from wcitrain.recipe import Recipe
from wcitrain.seeding import generator_from, seed_from
from wcitrain.stopping import StopRequest
from wcitrain.summary import export, summarize

OVERFITTING_IMAGES = 256  # behind one look for catastrophic overfitting: a standard error of at most 3 points
DRY_RUN_IMAGES = 4  # more than one: BatchNorm in train mode needs them


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped on it."""


class Interrupted(Exception):
    """The user (or the scheduler) asked to stop; everything is saved. The message says how to go on."""


def fit(recipe: Recipe, *, resume: bool = False, folder: str | Path | None = None) -> dict[str, Any]:
    """Train what the recipe says and return the summary that is also written to ``summary.json``.

    Args:
        recipe: Every setting; see ``recipe.Recipe``.
        resume: Go on from the newest intact checkpoint in the run folder, bit for bit (CPU, same versions); from the start
            where the run was stopped before its first checkpoint.
        folder: The run folder; by default ``run_folder(recipe)``.

    Returns:
        The summary: last and best-by-validation accuracies on train, validation and test, gap, WCI, cost.

    Raises:
        FileExistsError: The run folder is there already and ``resume`` is not asked for: nothing is overwritten.
        ValueError: A setting does not fit the data or the model.
        CheckpointError: No intact checkpoint to resume from, or the disk refused a new one.
        NonFiniteLossError: With the step, the indices of the images, and the last good checkpoint.
        Interrupted: After Ctrl-C or SIGTERM, once the state is saved.
    """
    return Trainer(recipe, resume=resume, folder=folder).fit()


class Trainer:
    """The parts of one run and the loop over them."""

    def __init__(self, recipe: Recipe, *, resume: bool = False, folder: str | Path | None = None) -> None:
        self.recipe = recipe
        self.folder = run_folder(recipe) if folder is None else Path(folder)
        if has_started(self.folder) and not resume:
            raise FileExistsError(
                f"{self.folder}: got a folder that holds a run; expected a new one. Go on with "
                f"`wcitrain train --resume {self.folder}`, or choose another name= or output=."
            )
        if recipe.train.num_threads:
            torch.set_num_threads(recipe.train.num_threads)
        self.wandb_mode = tracking.wandb_mode(recipe.tracking.wandb)
        names = tracking.tracker_names(self.wandb_mode, recipe.tracking.tensorboard)
        _forget_previous_run()
        self.accelerator = accelerator = Accelerator(
            mixed_precision=recipe.train.precision,
            gradient_accumulation_steps=recipe.train.accumulate,
            cpu=recipe.train.device == "cpu",
            log_with=names or None,
            project_dir=str(self.folder),
            # The optimizer wrapper shares running statistics itself. DDP's own broadcast, before every forward pass, would
            # write into what the first of two forward passes (TRADES) still needs.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if accelerator.gradient_accumulation_steps != recipe.train.accumulate:
            raise ValueError(
                f"train.accumulate: got {recipe.train.accumulate}, but Accelerate was told "
                f"{accelerator.gradient_accumulation_steps} by its environment; expected the same. Unset "
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
            )
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.micro_size = recipe.train.batch_size // recipe.train.accumulate
        if self.micro_size % self.world:
            raise ValueError(
                f"train.batch_size: got {recipe.train.batch_size} in {recipe.train.accumulate} micro-batches; expected a "
                f"multiple of {recipe.train.accumulate} x {self.world} processes."
            )
        with accelerator.main_process_first():
            self.splits = splits = open_splits(recipe)
            self.train_set = open_training_set(
                recipe, splits, accelerator.device, is_talking=accelerator.is_main_process
            )
        self.augmentation, self.mixing = build_augmentation(recipe), build_mixing(recipe)
        self.objective = build_objective(recipe)
        self.batches = self.train_set.num_updates(recipe.train.batch_size)  # of an epoch
        self.updates = self.batches * self.objective.num_replays  # optimizer steps of an epoch
        if not self.updates:
            raise ValueError(
                f"train.batch_size: got {recipe.train.batch_size}; expected at most the {len(splits.train)} training images."
            )
        self.monitored = splits.train.subset(min(recipe.evaluation.train_size, len(splits.train)))

        model = initial_model(recipe, splits)
        try_forward(model, splits.in_chans, splits.image_size, splits.num_classes)
        if recipe.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._initial = None  # the weights before the first step, where a measure asks for them
        if set(recipe.measures.names) & NEED_INITIAL:
            self._initial = {name: value.clone() for name, value in model.state_dict().items()}
        self.bare = model  # what is measured and exported: no DDP, no compilation
        base = build_optimizer(recipe, model)
        self.regularizer: RegularizedOptimizer = build_regularizer(recipe, base, model, self.updates)
        compiled = cast(Classifier, torch.compile(model)) if recipe.train.compile else model
        self.attacked = compiled  # what the training attack sees: no DDP
        self.model = accelerator.prepare_model(self.attacked)
        self.optimizer = accelerator.prepare_optimizer(self.regularizer)
        self.regularizer.attach(accelerator, self.model)
        self._choose_estimator()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            base, lambda step: learning_rate_factor(recipe, step / self.updates)
        )
        self.average: EMA | SWA | None = None
        if recipe.train.ema_decay is not None:
            self.average = EMA(model, recipe.train.ema_decay)
        elif recipe.train.swa_start_epoch is not None:
            self.average = SWA(model, recipe.train.swa_start_epoch)
        self.guard = None
        if self.objective.is_single_step and recipe.train.overfitting_guard != "ignore":
            self.guard = CatastrophicOverfittingGuard()
        self._try_measures()
        self.log = tracking.RunLog(self.folder) if accelerator.is_main_process else None
        self.progress = Progress()
        self.stop = StopRequest()
        if resume and has_started(self.folder):
            self._load()
        elif self.log is not None:
            (self.folder / "recipe.yaml").write_text(recipe.to_yaml())
            self.log.truncate(0)  # of a run that was stopped before its first checkpoint
        accelerator.wait_for_everyone()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Run the remaining epochs, then measure the last and the best weights on the test set, once."""
        progress, epochs = self.progress, self.recipe.train.epochs
        config = self.recipe.model_dump(mode="json")
        tracking.start_trackers(
            self.accelerator,
            project=self.recipe.tracking.project,
            run_name=self.folder.name,
            folder=self.folder,
            config=config,
            wandb_mode=self.wandb_mode,
        )
        try:
            with self.stop:
                if not progress.step:
                    self._keep_weights(is_last=False)
                while progress.epoch < epochs and not progress.stop_reason:
                    self._train_epoch()
                    self._finish_epoch()
                    self._stop_if_asked()
            summary = summarize(self)
            if self.log is not None:
                self.log.write_summary(summary)
                print(last_line(summary, self.folder), flush=True)
            return summary
        finally:
            tracking.end_trackers(self.accelerator)

    def _train_epoch(self) -> None:
        """Make the optimizer steps of one epoch that are still to be made."""
        recipe, progress, accumulate = self.recipe, self.progress, self.recipe.train.accumulate
        replays = self.objective.num_replays
        batches = self.train_set.batches(
            self.micro_size,
            shuffle=True,
            seed=seed_from(recipe.seed, "data"),
            epoch=progress.epoch,
            start=progress.update // replays * accumulate,
            rank=self.rank,
            world=self.world,
            device=self.device,
            crop_padding=recipe.data.crop_padding,
            flip=recipe.data.flip,
            drop_last=True,
            augmentation=self.augmentation,
        )
        self.model.train()
        started = time.perf_counter()
        before = progress.epoch_seconds
        bar = self._bar()
        micro_batches: list[Batch] = []
        while progress.update < self.updates:
            if not micro_batches or progress.update % replays == 0:
                micro_batches = [self._prepared(next(batches), micro) for micro in range(accumulate)]
            progress.loss_sum += self._step(micro_batches)
            progress.update += 1
            progress.step += 1
            progress.epoch_seconds = before + time.perf_counter() - started
            bar.set_postfix(loss=f"{progress.loss_sum / progress.update:.3f}", refresh=False)
            bar.update()
            self._stop_if_asked()
        bar.close()

    def _prepared(self, batch: Batch, micro: int) -> Batch:
        """Return a micro-batch with what happens to it as a whole: label noise, mixing, memory format."""
        (x, y, index), recipe, classes = batch, self.recipe, self.splits.num_classes
        if recipe.label_noise.share:
            epoch = self.progress.epoch if recipe.label_noise.resample else None
            settings = recipe.label_noise.model_dump(exclude={"resample"})
            # The places of streamed images are counted by each process for itself.
            seed = seed_from(recipe.seed, self.rank) if isinstance(self.train_set, StreamSet) else recipe.seed
            y = noisy_labels(y, index, num_classes=classes, seed=seed, epoch=epoch, **settings)
        if self.mixing is not None:
            number = self.progress.update // self.objective.num_replays
            place = (self.progress.epoch, number, micro * self.world + self.rank)
            x, y = self.mixing.apply(x, y, classes, seed_from(recipe.seed, "mixing", *place))
        if recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return Batch(x, y, index)

    def _step(self, micro_batches: list[Batch]) -> float:
        """Make one optimizer step and return its mean loss over processes: the lines that are the method."""
        model, recipe, step = self.model, self.recipe, self.progress.step
        objective = self.objective.scaled(threat_factor(recipe, (step + 1) / self.updates))
        total = torch.zeros((), device=self.device)
        for micro, (x, y, index) in enumerate(micro_batches):
            place = (step, micro * self.world + self.rank)  # names this micro-batch on this process
            torch.manual_seed(seed_from(recipe.seed, "forward", *place))  # dropout, stochastic depth
            with self.accelerator.accumulate(model):
                attack_seed = generator_from(self.device, recipe.seed, "attack", *place)
                x_adv = objective.perturb(self.attacked, x, y, attack_seed)
                loss = self.regularizer.backward(partial(objective.loss, model, x, x_adv, y))
                total += loss
                if not bool(torch.isfinite(loss)):
                    self._refuse_non_finite(float(loss), index)
                if x_adv.requires_grad:  # free adversarial training learns its perturbation in the same pass
                    cast(Any, objective).after_backward(x, x_adv)
                if self.accelerator.sync_gradients and recipe.train.max_norm:
                    self.accelerator.clip_grad_norm_(model.parameters(), recipe.train.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average is not None:
            self.average.after_step(self.bare, step)
        return float(self.accelerator.reduce(total / len(micro_batches), reduction="mean"))

    def _choose_estimator(self) -> None:
        """Let the penalty find out on a few images, before anything is trained, how it can estimate its traces."""
        images = self.splits.train.subset(min(DRY_RUN_IMAGES, len(self.splits.train)))
        x, y, _ = next(images.batches(len(images), device=self.device))
        self.model.train()
        choice = self.regularizer.choose_estimator(partial(self.objective.loss, self.model, x, x, y))
        if choice is not None and self.accelerator.is_main_process:
            print(f"penalty estimator: {choice.estimator} ({choice.reason})", flush=True)

    def _try_measures(self) -> None:
        """Take the recipe's measures of a few images, so that wrong settings do not show hours later."""
        check_settings(self.recipe.measures.names, self.recipe.measures.settings)
        try:
            self._measures_by_name(DRY_RUN_IMAGES)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"measures: {error} (a dry run on {DRY_RUN_IMAGES} images). Correct measures.settings."
            ) from error

    def _finish_epoch(self) -> None:
        """Measure, log and save at the end of an epoch."""
        progress, recipe = self.progress, self.recipe
        started = time.perf_counter()
        images = self.updates * recipe.train.batch_size
        metrics: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": recipe.optimizer.lr * learning_rate_factor(recipe, (progress.step - 1) / self.updates),
            "train/loss": progress.loss_sum / self.updates,
            "images_per_second": images / progress.epoch_seconds,
        }
        regularizer = self.regularizer.metrics()
        metrics |= {k: v for k, v in regularizer.items() if k in ("relative_size", "lambda", "curvature/negative")}
        metrics |= {f"running/{k}": v for k, v in regularizer.items() if k.startswith(("wci/", "curvature/trace/"))}
        if self.average is not None:
            self.average.after_epoch(self.bare, progress.epoch + 1, self._train_passes)
        self._check_overfitting(metrics)
        is_last = progress.epoch + 1 == recipe.train.epochs or bool(progress.stop_reason)
        is_best = False
        if (progress.epoch + 1) % recipe.evaluation.every == 0 or is_last:
            train, val = self.measure(self.monitored, wci=recipe.evaluation.wci), self.measure(self.splits.val)
            for split, result in (("train", train), ("val", val)):
                for key in ("clean_accuracy", "clean_loss", "robust_accuracy", "robust_loss"):
                    metrics[f"{split}/{key}"] = getattr(result, key)
            metrics["robust_gap"] = train.robust_accuracy - val.robust_accuracy
            metrics |= train.wci.metrics() if train.wci else {}
            self._refuse_diverged(metrics)
            is_best = val.robust_accuracy > progress.best_score
            if is_best:
                progress.best_score, progress.best_epoch = val.robust_accuracy, progress.epoch + 1
            elif self._is_patience_over() and not is_last:
                progress.stop_reason = (
                    f"no better robust validation accuracy in {recipe.train.patience} epochs (train.patience)"
                )
        is_last = is_last or bool(progress.stop_reason)
        if recipe.measures.names and ((progress.epoch + 1) % recipe.measures.every == 0 or is_last):
            metrics |= self._measures_by_name(recipe.measures.num_examples)
        progress.train_seconds += progress.epoch_seconds
        progress.seconds += progress.epoch_seconds + time.perf_counter() - started
        metrics |= {"train_seconds": progress.train_seconds, "seconds": progress.seconds}
        progress.epoch, progress.update, progress.loss_sum, progress.epoch_seconds = progress.epoch + 1, 0, 0.0, 0.0
        if self.log is not None:
            self.log.append(metrics)
            print(epoch_line(metrics, recipe.train.epochs), flush=True)
        tracking.log_epoch(self.accelerator, metrics, progress.step)
        if is_best and self.log is not None:
            checkpoint.save_checkpoint(
                self.folder / "checkpoints", {"epoch": progress.epoch, "model": self.measured.state_dict()}, name="best"
            )
        if progress.stop_reason and self.log is not None:
            print(f"stopped after epoch {progress.epoch}: {progress.stop_reason}", flush=True)
        self._keep_weights(is_last=is_last)
        if progress.epoch % recipe.checkpoint.every == 0 or is_last:
            self._save()

    def _keep_weights(self, *, is_last: bool) -> None:
        """Export the measured weights where ``checkpoint.keep_every`` asks for this epoch's; the last epoch's always."""
        every, epoch = self.recipe.checkpoint.keep_every, self.progress.epoch
        if every and (epoch % every == 0 or is_last):
            export(self, f"epoch-{epoch}", {"epoch": epoch})

    def _train_passes(self, model: nn.Module) -> Iterator[None]:
        """Evaluate the training loss of ``model`` batch by batch, for its running statistics; attacks are on the trained weights.

        Nothing is differentiated in the weights. The images are the monitored ones, in micro-batches of one process.
        """
        size = self.micro_size // self.world
        objective = self.objective.scaled(threat_factor(self.recipe, self.progress.step / self.updates))
        for number, (x, y, _) in enumerate(self.monitored.batches(min(size, len(self.monitored)), device=self.device)):
            if len(x) < min(size, len(self.monitored)):
                return  # the last part is smaller than what the network was trained on
            seed = generator_from(self.device, self.recipe.seed, "recalibration", self.progress.epoch, number)
            with undisturbed(self.bare, training=None):
                x_adv = objective.perturb(self.bare, x, y, seed).detach()
            objective.loss(model, x, x_adv, y)
            yield

    def _is_patience_over(self) -> bool:
        """Tell whether the epoch under way ends too long after the best one."""
        patience, progress = self.recipe.train.patience, self.progress
        return patience is not None and progress.epoch + 1 - progress.best_epoch >= patience

    def _check_overfitting(self, metrics: dict[str, Any]) -> None:
        """Look for catastrophic overfitting of a single-step objective on one batch of training images."""
        if self.guard is None:
            return
        recipe, progress = self.recipe, self.progress
        images = self.monitored.subset(min(len(self.monitored), OVERFITTING_IMAGES))
        x, y, _ = next(images.batches(len(images), device=self.device))
        threat = ThreatModel(recipe.threat.norm, recipe.threat.eps)
        is_overfitting = self.guard.check(self.bare, x, y, threat, generator_from(self.device, recipe.seed, "guard"))
        metrics["train/guard_robust_accuracy"] = self.guard.last
        if not is_overfitting:
            return
        text = (
            f"epoch {progress.epoch + 1}: catastrophic overfitting: robust accuracy on {len(images)} training images under "
            f"PGD-{self.guard.num_steps} fell from {100 * (self.guard.best or 0):.0f} % to {100 * (self.guard.last or 0):.0f} %"
        )
        metrics["catastrophic_overfitting"] = 1
        if recipe.train.overfitting_guard == "stop" and progress.epoch + 1 < recipe.train.epochs:
            progress.stop_reason = f"{text} (train.overfitting_guard)"
        elif self.log is not None:
            print(f"{text}. Lower threat.eps or use objective grad_align or pgd_at.", flush=True)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def measured(self) -> Classifier:
        """The model that is evaluated and exported: the averaged weights where there are any."""
        return self.bare if self.average is None else cast(Classifier, self.average.module)

    def measure(self, images: Any, *, wci: bool = False) -> AccuracyMeasurement:
        """Evaluate ``measured`` on a set with the recipe's evaluation attack."""
        settings = self.recipe.evaluation
        layers = select_layers(self.measured) if wci else None  # the same for every method, whatever its own layers
        return measure_accuracy(
            self.measured,
            images.batches(settings.batch_size, device=self.device),
            threat=ThreatModel(self.recipe.threat.norm, self.recipe.threat.eps),
            num_steps=settings.num_steps,
            step_size=step_size(self.recipe, settings),
            num_restarts=settings.num_restarts,
            seed=self.recipe.seed,
            layers=layers,
            accelerator=self.accelerator,
        )

    def _measures_by_name(self, num_examples: int) -> dict[str, float]:
        """Take the measures that the recipe names, every process all of them: they are functions of the weights and the seed."""
        settings, recipe = self.recipe.measures, self.recipe
        images = self.splits.train if settings.split == "train" else self.splits.val
        subset = images.subset(min(num_examples, len(images)))
        data = [(x, y) for x, y, _ in subset.batches(min(100, len(subset)), device=self.device)]
        shared = Shared(
            num_examples=num_examples,
            num_steps=recipe.evaluation.num_steps,
            step_size=step_size(recipe, recipe.evaluation),
            seed=recipe.seed,
            initial=self._initial,
            image_shape=tuple(data[0][0].shape[1:]),
        )
        threat = ThreatModel(recipe.threat.norm, recipe.threat.eps)
        metrics: dict[str, float] = {}
        with reused_attacks(self.measured):
            for name in settings.names:
                found = take_measure(name, self.measured, data, threat, shared, settings.settings.get(name))
                metrics[f"measures/{settings.split}/{name}"] = found.value
                metrics[f"measures/{settings.split}/{name}_stderr"] = found.stderr
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    # ---- saving and stopping -----------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """Return everything an exact resume needs; ``epoch`` first, for the messages of ``checkpoint``."""
        return {
            "epoch": self.progress.epoch,
            "recipe": self.recipe.to_yaml(),
            "progress": vars(self.progress) | {},
            "model": self.bare.state_dict(),
            "optimizer": self.regularizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "objective": self._objective_state(),
        }

    def _objective_state(self) -> dict[str, Tensor]:
        """Return what the objective carries from step to step, of all processes one after the other."""
        state = self.objective.state_dict() if hasattr(self.objective, "state_dict") else {}
        return {name: self.accelerator.gather(value) for name, value in state.items()}

    def _save(self) -> None:
        """Write ``checkpoints/last`` (main process)."""
        state = self._state()
        if self.accelerator.is_main_process:
            checkpoint.save_checkpoint(self.folder / "checkpoints", state)
        self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        """Put back what ``_state`` returned, and drop metrics of steps that are about to be made again."""
        state, source = checkpoint.load_checkpoint(self.folder / "checkpoints")
        self.bare.load_state_dict(state["model"])
        self.regularizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.guard is not None:
            self.guard.load_state_dict(state["guard"])
        if state.get("objective"):
            parts = {name: value.chunk(self.world)[self.rank] for name, value in state["objective"].items()}
            cast(Any, self.objective).load_state_dict({name: part.to(self.device) for name, part in parts.items()})
        self.progress = Progress(**state["progress"])
        if self.log is not None:
            self.log.truncate(self.progress.step)
            print(f"resuming {self.folder} from {source.name}: epoch {self.progress.epoch}, step {self.progress.step}")

    def _refuse_non_finite(self, loss: float, index: Tensor) -> None:
        """Stop before anything is stepped on a loss that is not a number."""
        shown = ", ".join(map(str, index.tolist()[:50])) + (f" (+{len(index) - 50})" if len(index) > 50 else "")
        raise NonFiniteLossError(
            f"step {self.progress.step} (epoch {self.progress.epoch + 1}): got loss {loss} on the training images "
            f"[{shown}]; expected a finite number. {self._last_good()}. Lower optimizer.lr, set train.max_norm, or look at "
            "these images."
        )

    def _refuse_diverged(self, metrics: dict[str, Any]) -> None:
        """Stop before weights that are no longer numbers, or give none, are saved over good ones."""
        bad = [
            key for key in ("train/clean_loss", "val/clean_loss", "val/robust_loss") if not math.isfinite(metrics[key])
        ]
        bad += [name for name, p in self.measured.named_parameters() if not bool(torch.isfinite(p).all())][:3]
        if bad:
            raise NonFiniteLossError(
                f"end of epoch {self.progress.epoch + 1}: got {', '.join(bad)} not finite; expected numbers. "
                f"{self._last_good()}. Lower optimizer.lr or set train.max_norm."
            )

    def _last_good(self) -> str:
        last = self.folder / "checkpoints" / "last"
        return f"The last good checkpoint is {last}" if last.exists() else "No checkpoint was saved yet"

    def _stop_if_asked(self) -> None:
        """Save and raise ``Interrupted`` once a signal has come."""
        if self._someone_wants_to_stop():
            self._save()
            raise Interrupted(
                f"stopped after epoch {self.progress.epoch}, step {self.progress.step}; everything is saved. "
                f"Go on with `wcitrain train --resume {self.folder}`."
            )

    def _someone_wants_to_stop(self) -> bool:
        """Agree over processes, so that none waits for another."""
        if self.world == 1:
            return self.stop.is_set
        flag = torch.tensor(float(self.stop.is_set), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum"))

    def _bar(self) -> tqdm:
        """A progress bar on a terminal, nothing in a log (an epoch's line is printed either way)."""
        return tqdm(
            total=self.updates,
            initial=self.progress.update,
            desc=f"epoch {self.progress.epoch + 1}/{self.recipe.train.epochs}",
            unit="step",
            leave=False,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )


def _forget_previous_run() -> None:
    """Let a second run in this process choose another precision or device: Accelerate keeps one global state."""
    if AcceleratorState._shared_state and AcceleratorState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
