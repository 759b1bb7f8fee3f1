"""The sections of a recipe that are not a method: every key with its type, default, meaning and unit."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from wcitrain.measures import MEASURES, Measure
from wcitrain.method import STRICT, Choice, Decay, Positive, PositiveCount, StepSize, Text, setting


class Section(BaseModel):
    """A part of the recipe: frozen, without unknown keys, without conversions."""

    model_config = ConfigDict(frozen=True, **STRICT)


class Model(Section):
    """The timm backbone."""

    name: Text = setting("resnet18", "Model name for timm.create_model.")
    pretrained: bool = setting(False, "Start from timm's pretrained weights.")
    stem: Literal["default", "cifar"] = setting("default", "First layers: timm's, or cifar's (small images).")
    checkpoint_path: Text | None = setting(
        None, "Weights to start from: a file, a run, an export, package:NAME/FILE."
    )
    match: Literal["name", "order"] = setting("name", "What tells the tensors of checkpoint_path.")
    kwargs: dict[str, JsonValue] = setting(dict, "Further arguments of timm.create_model.")
    mean: Annotated[list[float], Field(min_length=1)] | None = setting(
        None, "Channel means subtracted inside the model, in [0, 1]; null: timm's."
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = setting(
        None, "Channel deviations divided by inside the model, in [0, 1]; null: timm's."
    )
    resize_inside: PositiveCount | None = setting(None, "Side to enlarge images to, inside the model.")

    @property
    def starts_from_weights(self) -> bool:
        """Whether the weights before the first step are not drawn by the seed alone."""
        return bool(self.pretrained or self.checkpoint_path)


class Wrapper(Section):
    """Where perturbation and penalty act, and how traces are averaged; see optim.RegularizedOptimizer."""

    layers: Text | None = setting(
        None, "weights, all, weights+biases, or a glob over parameter names; null: as the rule is published."
    )
    split_qkv: bool = setting(False, "Count query, key and value of a fused projection as layers each.")
    trace_decay: Decay | None = setting(
        None, "Decay a step of the running trace estimates, in [0, 1); null: 0.9, with one pass 0.98."
    )


class Train(Section):
    """The training loop."""

    epochs: PositiveCount = setting(20, "Passes over the training images.")
    batch_size: PositiveCount = setting(128, "Images for each optimizer step, over all processes.")
    accumulate: PositiveCount = setting(1, "Micro-batches that a batch is cut into.")
    precision: Literal["no", "bf16"] = setting("no", "Mixed precision; no: float32. fp16 would overflow.")
    channels_last: bool = setting(False, "Store images with channels last in memory.")
    compile: bool = setting(False, "Compile the model with torch.compile.")
    gradient_checkpointing: bool = setting(False, "Recompute activations instead of keeping them.")
    eps_zero_epochs: Annotated[float, Field(ge=0)] = setting(0.0, "First epochs without an attack.")
    eps_warmup_epochs: Annotated[float, Field(ge=0)] = setting(
        0.0, "Next epochs, over which training's radius and steps grow linearly from 0; evaluation's do not."
    )
    overfitting_guard: Literal["ignore", "warn", "stop"] = setting(
        "warn", "What to do when a single-step objective overfits catastrophically."
    )
    max_norm: Positive | None = setting(None, "Gradient norm above which gradients are clipped; null: never.")
    num_threads: PositiveCount | None = setting(None, "CPU threads; null leaves torch's choice.")
    device: Literal["auto", "cpu"] = setting("auto", "Where to compute; auto takes an accelerator if any.")

    @property
    def eps_full_epoch(self) -> float:
        """The epochs after which training attacks with the full radius."""
        return self.eps_zero_epochs + self.eps_warmup_epochs


# In training no test image is looked at.
WHILE_TRAINING = {name: kind for name, kind in MEASURES.items() if not kind.needs_test}


class Evaluation(Section):
    """What is measured while training, and how strong its attack is."""

    every: PositiveCount = setting(1, "Epochs between measurements.")
    batch_size: PositiveCount = setting(500, "Images for each pass of a process.")
    train_size: PositiveCount = setting(1000, "Training images in the measurement of training accuracy.")
    num_steps: PositiveCount = setting(10, "Attack steps.")
    step_size: StepSize | None = setting(
        None, "Length of an attack step in [0, 1] pixel units; null: 2.5 eps / num_steps (l1: at least eps)."
    )
    num_restarts: PositiveCount = setting(1, "Attacks for each image; the worst counts.")
    wci: bool = setting(True, "Measure the layer-wise WCI of the robust loss.")


class Measures(Section):
    """What else is measured while training; see `measures.MEASURES`."""

    take: list[Annotated[Measure, Choice(WHILE_TRAINING)]] = setting(
        list, "Measures, such as wci or {name: average_flatness, xi: 0.25}; none: []."
    )
    every: PositiveCount = setting(5, "Epochs between measurements; the last epoch is always one.")
    split: Literal["train", "val"] = setting("train", "Images they are taken on.")
    num_examples: PositiveCount = setting(200, "How many of them, at most.")


class EarlyStopping(Section):
    """When training ends before its last epoch (Rice, Wong, Kolter, arXiv 2002.11569)."""

    patience: PositiveCount | None = setting(
        None, "Epochs without a better robust validation accuracy before training stops; null: never."
    )


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveCount = setting(1, "Epochs between checkpoints.")
    keep_every: PositiveCount | None = setting(
        None, "Epochs between weights kept for good in model/epoch-N, first and last included; null: none."
    )


class Tracking(Section):
    """Where metrics go besides the run folder."""

    wandb: Literal["auto", "online", "offline", "disabled"] = setting("auto", "Mode of Weights & Biases.")
    project: Text = setting("wcitrain", "Project name in the trackers.")
    tensorboard: bool = setting(False, "Write TensorBoard event files.")
