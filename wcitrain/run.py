"""One training run: its parts, how they are built in order, and how they are saved and put back.

Every random number is a function of the recipe's seed and of the step it is used in (``seeding``): there is
no random state to save, and a run that stops between two optimizer steps goes on as if it had not stopped.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from wcitrain import checkpoint, tracking
from wcitrain.build import (
    by_architecture,
    fresh_objective,
    initial_model,
    open_training_set,
    settled,
    untrained,
    wrap,
)
from wcitrain.curvature.estimators import name_of
from wcitrain.data import Images, Splits, check_images, load_splits, parts_of, record
from wcitrain.freezing import Plan, freeze
from wcitrain.models import Classifier, checkpoint_activations, try_forward
from wcitrain.objectives import CatastrophicOverfittingGuard, Objective
from wcitrain.optim import RegularizedOptimizer
from wcitrain.progress import (
    Progress,
    StopRequest,
    as_it_began,
    changed_settings,
    has_started,
    refuse_another_run,
    run_folder,
)
from wcitrain.recipe import Recipe, recipe_from_dict
from wcitrain.recipe.reading import read_yaml
from wcitrain.text import name_some

SAVED = ("checkpoints/last", "checkpoints/previous", "summary.json")  # what a resumed run goes on from
DRY_RUN_IMAGES = 4  # more than one: BatchNorm in train mode needs them


@dataclass
class Run:
    """The parts of one run."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    device: torch.device  # where this process computes
    rank: int  # the number of this process
    world: int  # the number of processes
    wandb_mode: str
    splits: Splits
    data: dict[str, Any]  # which images these are: class names, an identity for each split, copies
    train_set: Images
    monitored: Images  # the training images of the measurements
    objective: Objective
    updates: int  # optimizer steps of an epoch
    plan: Plan  # from which epoch a parameter trains
    bare: Classifier  # the model alone: what is measured and exported
    attack_model: nn.Module  # what the training attack sees: compiled, if asked for, but no DDP
    model: nn.Module  # what is trained
    regularizer: RegularizedOptimizer
    optimizer: Any  # Accelerate's wrapper around it
    scheduler: torch.optim.lr_scheduler.LambdaLR
    average: Classifier | None  # the averaged weights, in eval mode
    guard: CatastrophicOverfittingGuard | None
    initial: dict[str, Tensor] | None  # the weights before the first step, where a measure asks for them
    log: Path | None = None  # metrics.jsonl, on the main process, once nothing can be refused any more
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def micro_size(self) -> int:
        """Images of a micro-batch, over all processes."""
        return self.recipe.train.batch_size // self.recipe.train.accumulate

    @property
    def measured(self) -> Classifier:
        """The model that is evaluated and exported: the averaged weights where there are any."""
        return self.bare if self.average is None else self.average


def start_run(recipe: Recipe, *, resume: bool = False, folder: str | Path | None = None) -> Run:
    """Build the parts of a run in order, and refuse what would not train; errors as in ``train.fit``."""
    folder = run_folder(recipe) if folder is None else Path(folder)
    if has_started(folder) and not resume:
        advice = f"Go on with `wcitrain train --resume {folder}`, or choose another name= or output=."
        raise FileExistsError(f"{folder}: got a folder that holds a run; expected a new one. {advice}")
    if place := next((one for one in (folder, *folder.parents) if one.is_file()), None):
        raise ValueError(f"output: got {folder}, but {place} is a file; expected folders. Change output=.")
    if recipe.train.num_threads:
        torch.set_num_threads(recipe.train.num_threads)
    trackers, wandb_mode = tracking.choose_trackers(recipe.tracking.wandb, recipe.tracking.tensorboard)
    accelerator = _accelerator(recipe, folder, trackers)
    with accelerator.main_process_first():
        splits = load_splits(recipe.data)
        train_set = open_training_set(recipe, splits, accelerator.device)
    parts = parts_of(splits, getattr(train_set, "extra", None))
    copies = check_images(parts)
    if copies and accelerator.is_main_process:
        print("\n".join(f"data: {line}" for line in copies), flush=True)
    objective = fresh_objective(recipe)
    updates = train_set.num_updates(recipe.train.batch_size) * objective.num_replays
    if not updates:
        rule = f"at most the {len(splits.train)} training images."
        raise ValueError(f"train.batch_size: got {recipe.train.batch_size}; expected {rule}")

    has_initial = any(measure.needs_initial for measure in recipe.measures.take)
    goes_on = resume and any((folder / name).exists() for name in SAVED)
    recipe = as_it_began(recipe, folder) if goes_on else by_architecture(recipe)
    model = initial_model(untrained(recipe) if goes_on else recipe, splits)
    recipe = settled(recipe, model)
    try_forward(model, splits.in_chans, splits.shape[1:])
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model, recipe.model.name)
    if recipe.train.channels_last:
        if accelerator.device.type == "cpu":  # oneDNN may write past its workspace: uxlfoundation/oneDNN#6035
            raise ValueError("train.channels_last: got true on a CPU; expected false. It is for GPUs.")
        model = model.to(memory_format=torch.channels_last)
    has_guard = objective.is_single_step and recipe.train.overfitting_guard != "ignore"
    initial = deepcopy(model.state_dict()) if has_initial else None
    epochs, plan = recipe.train.epochs, recipe.freezing.plan(model, recipe.train.epochs)
    if recipe.freezing.is_staged and accelerator.num_processes > 1:
        got = f"got {recipe.freezing.head_epochs} and {recipe.freezing.unfreeze_every} with several processes"
        rule = "0 and null there: what begins to train later would not be shared. Use one process, or names."
        raise ValueError(f"freezing.head_epochs, unfreeze_every: {got}; expected {rule}")
    freeze(model, plan, epochs - 1)
    base = recipe.optimizer.build(model)
    for epoch in (0, epochs - 1):  # the layers must be some of what trains first, and are of what trains last
        freeze(model, plan, epoch)
        regularizer = wrap(recipe, base, model, updates)
    attack_model = _compiled(model, accelerator.device) if recipe.train.compile else model
    prepared = accelerator.prepare_model(attack_model)
    optimizer = accelerator.prepare_optimizer(regularizer)
    regularizer.attach(accelerator, prepared)
    factor = recipe.schedule.factor
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        wandb_mode=wandb_mode,
        splits=splits,
        data=record(parts, splits.class_names) | {"copies": copies},
        train_set=train_set,
        monitored=splits.train.subset(min(recipe.evaluation.train_size, len(splits.train))),
        objective=objective,
        updates=updates,
        plan=plan,
        bare=model,
        attack_model=attack_model,
        model=prepared,
        regularizer=regularizer,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(base, lambda step: factor(step, updates, epochs)),
        average=deepcopy(model).eval() if recipe.averaging else None,
        guard=CatastrophicOverfittingGuard() if has_guard else None,
        initial=initial,
    )
    # Let the penalty find out on a few images, before any step, how it can estimate its traces.
    images = splits.train.subset(min(DRY_RUN_IMAGES, len(splits.train)))
    x, y, _ = next(images.batches(len(images), device=run.device))
    prepared.train()
    freeze(model, plan, epochs - 1)
    choice = regularizer.choose_estimator(partial(objective.loss, prepared, x, x, y))
    if choice is not None and accelerator.is_main_process:
        print(f"penalty estimator: {name_of(choice.estimator)} ({choice.reason})", flush=True)
    return run


def _compiled(model: Classifier, device: torch.device) -> Classifier:
    """Compile a model; on a CPU without channels last, where oneDNN corrupts memory: see `start_run`."""
    options: Any = {"layout_optimization": False} if device.type == "cpu" else None
    return cast(Classifier, torch.compile(model, options=options))


def _accelerator(recipe: Recipe, folder: Path, trackers: list[str]) -> Accelerator:
    """Return Accelerate's view of the processes; refuse batches that cannot be shared out."""
    if AcceleratorState._shared_state and AcceleratorState().num_processes == 1:
        # Accelerate keeps one global state: let a second run in this process choose another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=recipe.train.precision,
        gradient_accumulation_steps=recipe.train.accumulate,
        cpu=recipe.train.device == "cpu",
        log_with=trackers or None,
        project_dir=str(folder),
        # The optimizer wrapper shares running statistics itself. DDP's own broadcast, before every forward
        # pass, would write into what the first of two forward passes (TRADES) still needs.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    size, parts, world = recipe.train.batch_size, recipe.train.accumulate, accelerator.num_processes
    if (theirs := accelerator.gradient_accumulation_steps) != parts:
        rule = f"{theirs}, as ACCELERATE_GRADIENT_ACCUMULATION_STEPS says. Unset it."
        raise ValueError(f"train.accumulate: got {parts}; expected {rule}")
    if size // parts % world:
        rule = f"a multiple of {parts} x {world} processes."
        raise ValueError(f"train.batch_size: got {size} in {parts} micro-batches; expected {rule}")
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return accelerator


def refuse_other_images(saved: dict[str, Any] | None, run: Run) -> None:
    """Raise ValueError where the images are not those a run began with: it would select on trained ones."""
    if saved is None:
        if run.log is not None:
            print(f"{run.folder}: saved without a record of its images: not known to be these", flush=True)
        return
    here, advice = run.data, "Put the images back as they were, or train anew in another folder."
    if saved["class_names"] != here["class_names"]:
        names, wanted = (name_some(data["class_names"], 30) for data in (here, saved))
        raise ValueError(f"{run.folder}: got data of the classes {names}; expected {wanted}. {advice}")
    for kind in ("images", "places"):
        for split, wanted in saved[kind].items():
            if (found := here[kind].get(split)) != wanted:
                text = f"got other {split} {kind}, {found}; expected those it began with, {wanted}"
                raise ValueError(f"{run.folder}: {text}. {advice}")


# ---- saving ------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Write ``checkpoints/last`` (main process): everything an exact resume needs."""
    objective = run.objective.state_dict() if hasattr(run.objective, "state_dict") else {}
    state = {
        "epoch": run.progress.epoch,  # first, for the messages of ``checkpoint``
        "recipe": run.recipe.to_yaml(),
        "world": run.world,
        "data": run.data,
        "progress": dict(vars(run.progress)),
        "model": run.bare.state_dict(),
        "initial": run.initial if run.recipe.model.starts_from_weights else None,  # others are drawn again
        "optimizer": run.regularizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "average": None if run.average is None else {"module": run.average.state_dict()},
        "guard": None if run.guard is None else dict(vars(run.guard)),
        "objective": {name: run.accelerator.gather(value) for name, value in objective.items()},  # of all
    }
    if run.accelerator.is_main_process:
        checkpoint.save_checkpoint(run.folder / "checkpoints", state)
    run.accelerator.wait_for_everyone()


def load(run: Run) -> None:
    """Put back what ``save`` wrote, and drop metrics of steps that are about to be made again.

    Raises:
        ValueError: It was another run, on other images, or one of another number of processes.
    """
    state, source = checkpoint.load_checkpoint(run.folder / "checkpoints")
    saved = recipe_from_dict(read_yaml(state["recipe"]))
    refuse_another_run(saved, run.recipe, run.folder)
    refuse_other_images(state.get("data"), run)
    if state["world"] != run.world:
        rule = f"the {state['world']} it began with: batches and random numbers are shared out by process."
        raise ValueError(f"{run.folder}: got {run.world} processes; expected {rule} Start as many.")
    run.bare.load_state_dict(state["model"])
    step = state["progress"]["step"]
    freeze(run.bare, run.plan, max(step - 1, 0) // run.updates)  # its layers are those of the last step
    if run.initial is not None and run.recipe.model.starts_from_weights:
        run.initial = state["initial"]
    run.regularizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.average is not None:
        run.average.load_state_dict(state["average"]["module"])
    if run.guard is not None:
        vars(run.guard).update(state["guard"])
    if state.get("objective"):
        parts = {name: value.chunk(run.world)[run.rank] for name, value in state["objective"].items()}
        cast(Any, run.objective).load_state_dict({name: part.to(run.device) for name, part in parts.items()})
    run.progress = Progress(**state["progress"])
    if run.log is not None:
        tracking.truncate(run.log, run.progress.step)
        print(f"resuming {run.folder} from {source.name}: step {run.progress.step}")
        if changed := changed_settings(saved, run.recipe):  # that may: later commands read the data there
            print(f"with {', '.join(changed)}")
            (run.folder / "recipe.yaml").write_text(run.recipe.to_yaml(), "utf-8")
