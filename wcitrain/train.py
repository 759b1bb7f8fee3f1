"""``fit(recipe)``: builds the parts in order, runs the loop, saves, resumes. Settings stop in this file.

Every random number is a function of the recipe's seed and of the step it is used in (``seeding``), so a run that stops
anywhere between two optimizer steps goes on exactly as if it had not stopped, and there is no random state to save.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from wcitrain import checkpoint, tracking
from wcitrain.attacks import ThreatModel
from wcitrain.build import build_objective, build_optimizer, build_regularizer, learning_rate_factor, step_size
from wcitrain.curvature import Loss
from wcitrain.data import Splits, load_splits
from wcitrain.evaluation import Evaluation, evaluate
from wcitrain.models import Classifier, create_model
from wcitrain.optim import RegularizedOptimizer
from wcitrain.params import select_layers
from wcitrain.preserve import undisturbed
from wcitrain.recipe import Recipe
from wcitrain.seeding import generator_from, seed_from
from wcitrain.stopping import StopRequest
from wcitrain.summary import summarize

DRY_RUN_IMAGES = 4  # more than one: BatchNorm in train mode needs them


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was stepped on it."""


class Interrupted(Exception):
    """The user (or the scheduler) asked to stop; everything is saved. The message says how to go on."""


def run_folder(recipe: Recipe) -> Path:
    """Return where a recipe's run lives: ``<output>/<name>-s<seed>``."""
    return Path(recipe.output) / f"{recipe.name}-s{recipe.seed}"


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


@dataclass
class Progress:
    """How far the run is; saved as it stands."""

    epoch: int = 0  # finished epochs
    update: int = 0  # finished optimizer steps of the epoch under way
    step: int = 0  # finished optimizer steps
    loss_sum: float = 0.0  # over the updates of the epoch under way
    epoch_seconds: float = 0.0  # training time of the epoch under way
    train_seconds: float = 0.0  # without evaluation
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0  # validation robust accuracy


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
            self.splits = splits = load_splits(**recipe.data.model_dump(exclude={"crop_padding", "flip"}))
        self.updates = len(splits.train) // recipe.train.batch_size
        if not self.updates:
            raise ValueError(
                f"train.batch_size: got {recipe.train.batch_size}; expected at most the {len(splits.train)} training images."
            )
        self.monitored = splits.train.subset(min(recipe.evaluation.train_size, len(splits.train)))

        torch.manual_seed(seed_from(recipe.seed, "model"))
        model_settings = recipe.model.model_dump()
        model = create_model(
            **{k: v for k, v in model_settings.items() if k != "kwargs"},
            num_classes=splits.num_classes,
            in_chans=splits.in_chans,
            **model_settings["kwargs"],
        )
        _try_forward(model, splits)
        if recipe.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.bare = model  # what is measured and exported: no DDP, no compilation
        self.objective = build_objective(recipe)
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
        self.ema = None
        if recipe.train.ema_decay:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(model, decay=recipe.train.ema_decay)
            self.ema.module.requires_grad_()  # its curvature is measured
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
                while progress.epoch < epochs:
                    self._train_epoch()
                    self._finish_epoch()
                    self._stop_if_asked()
            summary = summarize(self)
            if self.log is not None:
                self.log.write_summary(summary)
                print(_last_line(summary, self.folder), flush=True)
            return summary
        finally:
            tracking.end_trackers(self.accelerator)

    def _train_epoch(self) -> None:
        """Make the optimizer steps of one epoch that are still to be made."""
        recipe, progress, accumulate = self.recipe, self.progress, self.recipe.train.accumulate
        batches = self.splits.train.batches(
            self.micro_size,
            shuffle=True,
            seed=seed_from(recipe.seed, "data"),
            epoch=progress.epoch,
            start=progress.update * accumulate,
            rank=self.rank,
            world=self.world,
            device=self.device,
            crop_padding=recipe.data.crop_padding,
            flip=recipe.data.flip,
            drop_last=True,
        )
        self.model.train()
        started = time.perf_counter()
        before = progress.epoch_seconds
        bar = self._bar()
        while progress.update < self.updates:
            progress.loss_sum += self._step([next(batches) for _ in range(accumulate)])
            progress.update += 1
            progress.step += 1
            progress.epoch_seconds = before + time.perf_counter() - started
            bar.set_postfix(loss=f"{progress.loss_sum / progress.update:.3f}", refresh=False)
            bar.update()
            self._stop_if_asked()
        bar.close()

    def _step(self, micro_batches: list[Any]) -> float:
        """Make one optimizer step and return its mean loss over processes: the lines that are the method."""
        model, recipe, step = self.model, self.recipe, self.progress.step
        total = torch.zeros((), device=self.device)
        for micro, (x, y, index) in enumerate(micro_batches):
            place = (step, micro * self.world + self.rank)  # names this micro-batch on this process
            torch.manual_seed(seed_from(recipe.seed, "forward", *place))  # dropout, stochastic depth
            if recipe.train.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with self.accelerator.accumulate(model):
                attack_seed = generator_from(self.device, recipe.seed, "attack", *place)
                x_adv = self.objective.perturb(self.attacked, x, y, attack_seed)
                loss = self.regularizer.backward(partial(self._loss, x, x_adv, y))
                total += loss
                if not bool(torch.isfinite(loss)):
                    self._refuse_non_finite(float(loss), index)
                if self.accelerator.sync_gradients and recipe.train.max_norm:
                    self.accelerator.clip_grad_norm_(model.parameters(), recipe.train.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.bare, step=step)
        return float(self.accelerator.reduce(total / len(micro_batches), reduction="mean"))

    def _loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the differentiable loss at fixed adversarial examples, a function of the weights."""
        return self.objective.loss(self.model, x, x_adv, y)

    def _choose_estimator(self) -> None:
        """Let the penalty find out on a few images, before anything is trained, how it can estimate its traces."""
        images = self.splits.train.subset(min(DRY_RUN_IMAGES, len(self.splits.train)))
        x, y, _ = next(images.batches(len(images), device=self.device))
        self.model.train()
        choice = self.regularizer.choose_estimator(partial(self._loss, x, x, y))
        if choice is not None and self.accelerator.is_main_process:
            print(f"penalty estimator: {choice.estimator} ({choice.reason})", flush=True)

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
        is_last = progress.epoch + 1 == recipe.train.epochs
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
        progress.train_seconds += progress.epoch_seconds
        progress.seconds += progress.epoch_seconds + time.perf_counter() - started
        metrics |= {"train_seconds": progress.train_seconds, "seconds": progress.seconds}
        progress.epoch, progress.update, progress.loss_sum, progress.epoch_seconds = progress.epoch + 1, 0, 0.0, 0.0
        if self.log is not None:
            self.log.append(metrics)
            print(_line(metrics, recipe.train.epochs), flush=True)
        tracking.log_epoch(self.accelerator, metrics, progress.step)
        if is_best and self.log is not None:
            checkpoint.save_checkpoint(
                self.folder / "checkpoints", {"epoch": progress.epoch, "model": self.measured.state_dict()}, name="best"
            )
        if progress.epoch % recipe.checkpoint.every == 0 or is_last:
            self._save()

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def measured(self) -> Classifier:
        """The model that is evaluated and exported: the averaged weights where there are any."""
        return self.bare if self.ema is None else cast(Classifier, self.ema.module)

    def measure(self, images: Any, *, wci: bool = False) -> Evaluation:
        """Evaluate ``measured`` on a set with the recipe's evaluation attack."""
        settings = self.recipe.evaluation
        layers = select_layers(self.measured) if wci else None  # the same for every method, whatever its own layers
        return evaluate(
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
            "ema": None if self.ema is None else self.measured.state_dict(),
        }

    def _save(self) -> None:
        """Write ``checkpoints/last`` (main process)."""
        if self.accelerator.is_main_process:
            checkpoint.save_checkpoint(self.folder / "checkpoints", self._state())
        self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        """Put back what ``_state`` returned, and drop metrics of steps that are about to be made again."""
        state, source = checkpoint.load_checkpoint(self.folder / "checkpoints")
        self.bare.load_state_dict(state["model"])
        self.regularizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.measured.load_state_dict(state["ema"])
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


def has_started(folder: Path) -> bool:
    """Tell whether a folder holds results of a run, and not only its recipe."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "summary.json"))


def _try_forward(model: Classifier, splits: Splits) -> None:
    """Let one image through, so that a model that does not fit the images is refused before anything is written."""
    size = splits.image_size if isinstance(splits.image_size, tuple) else (splits.image_size, splits.image_size)
    try:
        with torch.no_grad(), undisturbed(model, training=False):
            logits = model(torch.zeros(1, splits.in_chans, *size))
    except Exception as error:
        raise ValueError(
            f"model.name: the model fails on images of {size[0]}x{size[1]} pixels: {error} Set data.image_size, or the "
            "model's own size such as model.kwargs.img_size."
        ) from error
    if logits.shape != (1, splits.num_classes):
        raise ValueError(f"model: got outputs of shape {tuple(logits.shape)}; expected (1, {splits.num_classes}).")


def _forget_previous_run() -> None:
    """Let a second run in this process choose another precision or device: Accelerate keeps one global state."""
    if AcceleratorState._shared_state and AcceleratorState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


def _line(metrics: dict[str, Any], epochs: int) -> str:
    """Return one epoch as a line of text."""
    parts = [f"epoch {metrics['epoch']}/{epochs}", f"loss {metrics['train/loss']:.3f}"]
    if "val/robust_accuracy" in metrics:
        parts += [
            f"{split} {100 * metrics[f'{split}/clean_accuracy']:.1f}/{100 * metrics[f'{split}/robust_accuracy']:.1f} %"
            for split in ("train", "val")
        ]
        parts.append(f"gap {100 * metrics['robust_gap']:.1f}")
    if "wci/total" in metrics:
        parts.append(f"WCI {metrics['wci/total']:.3g}")
    parts += [f"lr {metrics['lr']:.2g}", f"{metrics['images_per_second']:.0f} img/s", f"{metrics['seconds']:.0f} s"]
    return "  ".join(parts)


def _last_line(summary: dict[str, Any], folder: Path) -> str:
    """Return what is printed at the end of a run."""
    test = summary["last"]["test"]
    return (
        f"{folder.name}: {summary['method']}, test clean {100 * test['clean_accuracy']:.1f} %, robust "
        f"{100 * test['robust_accuracy']:.1f} % ({summary['attack']}, last epoch) -> {folder}"
    )
