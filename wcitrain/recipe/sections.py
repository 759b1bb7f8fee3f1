"""The sections of a recipe that are not a method: every key with its type, default, meaning and unit."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from wcitrain.method import (
    STRICT,
    Count,
    Decay,
    NonNegative,
    Positive,
    PositiveCount,
    Share,
    StepSize,
    Text,
    refuse,
    show,
)


class Section(BaseModel):
    """A part of the recipe: frozen, without unknown keys, without conversions."""

    model_config = ConfigDict(frozen=True, **STRICT)


def setting(default: Any, meaning: str) -> Any:
    """Return the field of a key: its default, or the class to make one of, and what it means."""
    if isinstance(default, type):
        return Field(default_factory=default, description=meaning)
    return Field(default=default, description=meaning)


def _check_auto(value: Any) -> Any:
    """Refuse the 0 and 1 that would pass for truth values."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("true, false or 'auto'. Choose one of them")
    return value


class Data(Section):
    """Which images are read and how they are split."""

    source: Literal["digits", "cifar10", "cifar100", "svhn", "folder", "timm"] = setting(
        "digits", "Where images come from; digits needs no files."
    )
    root: Text | None = setting(None, "Folder with the data; every source but digits needs it.")
    name: Text | None = setting(None, "Data set name for timm.data.create_dataset; only with source timm.")
    train_split: Text = setting("train", "Name of the training split.")
    test_split: Text = setting("test", "Name of the test split.")
    val_split: Text | None = setting(None, "Name of a validation split; null cuts one from training images.")
    download: bool = setting(False, "Fetch the data set when it is not under root.")
    num_classes: PositiveCount | None = setting(None, "Number of classes; null takes it from the data.")
    image_size: PositiveCount | None = setting(None, "Side of the square images are resized to, in pixels.")
    max_train: PositiveCount | None = setting(None, "Training images kept, balanced over classes; null: all.")
    max_test: PositiveCount | None = setting(None, "Test images kept, balanced over classes; null: all.")
    val_size: PositiveCount = setting(200, "Validation images cut from the training images.")
    split_seed: Count = setting(0, "Seed of the subsets and of the validation cut.")
    in_memory: Annotated[Literal[True, False, "auto"], BeforeValidator(_check_auto)] = setting(
        "auto", "Keep decoded images in memory; auto does so up to 2 GB."
    )
    crop_padding: Count = setting(0, "Zero padding before the random crop, in pixels; 0 does not crop.")
    flip: bool = setting(False, "Flip training images left to right at random.")
    num_workers: Count = setting(2, "Workers that decode images.")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        """Refuse a source without what it needs, or with what it has no use for."""
        source, hub = self.source, (self.name or "").split("/")[0].lower()
        is_remote = source == "timm" and hub in ("hfds", "hfids", "tfds")
        for key in ("root", "download"):
            if source == "digits" and (value := getattr(self, key)):
                text = f"got {show(value)} with source digits, which are embedded; expected the default."
                refuse(key, f"{text} Remove it, or set data.source.")
        if source != "digits" and self.root is None and not is_remote:
            refuse("root", f"got null with source {source}; expected a folder. Set data.root.")
        if source == "timm" and self.name is None:
            refuse("name", "got null with source timm; expected a data set name. Set data.name.")
        if source != "timm" and self.name is not None:
            text = f"got {show(self.name)} with source {source}; expected null."
            refuse("name", f"{text} Remove it, or set data.source to timm.")
        if self.val_split is None and self.max_train is not None and self.val_size >= self.max_train:
            text = f"got {self.val_size}; expected fewer than max_train = {self.max_train}."
            refuse("val_size", f"{text} Lower it or keep more.")
        return self


class Model(Section):
    """The timm backbone."""

    name: Text = setting("resnet18", "Model name for timm.create_model.")
    pretrained: bool = setting(False, "Start from timm's pretrained weights.")
    stem: Literal["default", "cifar"] = setting("default", "First layers: timm's, or cifar's (small images).")
    checkpoint_path: Text | None = setting(None, "File with weights to start from.")
    kwargs: dict[str, JsonValue] = setting(dict, "Further arguments of timm.create_model.")
    mean: Annotated[list[float], Field(min_length=1)] | None = setting(
        None, "Channel means subtracted inside the model, in [0, 1] pixel units; null: timm's."
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = setting(
        None, "Channel deviations divided by inside the model, in [0, 1] pixel units; null: timm's."
    )

    @model_validator(mode="after")
    def _check(self) -> "Model":
        """Refuse arguments that the recipe sets itself, and half a normalisation."""
        own = {"model_name", "num_classes", "in_chans", "pretrained", "checkpoint_path"}
        if reserved := sorted(own & set(self.kwargs)):
            text = f"got {', '.join(reserved)}; expected arguments that the recipe does not set itself."
            refuse("kwargs", f"{text} Remove them.")
        if (self.mean is None) != (self.std is None):
            missing, given = ("mean", "std") if self.mean is None else ("std", "mean")
            refuse(missing, f"got null; expected a list like model.{given}. Set both or none.")
        if self.mean and self.std and len(self.mean) != len(self.std):
            text = f"got {len(self.std)} values; expected {len(self.mean)} as in model.mean."
            refuse("std", f"{text} Give one value per channel.")
        return self


class Extra(Section):
    """Generated or unlabelled images beside the training images; see data.load_extra."""

    path: Text | None = setting(None, "A .npz or a folder of images; null: none.")
    labels: Literal["given", "pseudo"] = setting("given", "given reads them; pseudo lets a model give them.")
    labeler: Text | None = setting(None, "Exported model for pseudo-labels, such as runs/NAME-s0/model/last.")
    fraction: Annotated[Positive, Field(ge=0.001, le=0.999)] = setting(
        0.5, "Share of extra images in every batch, 0.001 to 0.999."
    )
    max_images: PositiveCount | None = setting(None, "Extra images kept; null: all.")

    @model_validator(mode="after")
    def _check(self) -> "Extra":
        """Refuse settings without images, and a labeler without use."""
        if self.path is None and self.model_fields_set - {"path"} and self != Extra():
            text = "got null beside other keys of extra; expected a .npz or a folder."
            refuse("path", f"{text} Set it, or remove the others.")
        if self.path is not None and (self.labels == "pseudo") != (self.labeler is not None):
            rule = "an exported model for pseudo, null for given. Change one of them."
            refuse("labeler", f"got {show(self.labeler)} with labels {self.labels}; expected {rule}")
        return self

    def __str__(self) -> str:
        return f"extra {self.labels} {self.fraction:g}"


class LabelNoise(Section):
    """Random training labels; see data.noisy_labels."""

    share: Share = setting(0.0, "Probability that a label is drawn anew, in [0, 1].")
    resample: bool = setting(True, "Draw anew in every epoch; false fixes the noise.")
    exclude_true: bool = setting(False, "Draw from the other classes only.")

    @model_validator(mode="after")
    def _check(self) -> "LabelNoise":
        """Refuse settings of no noise."""
        if self.share == 0 and self.model_fields_set - {"share"} and self != LabelNoise():
            text = "got 0 beside other keys of label_noise; expected more than 0."
            refuse("share", f"{text} Set it, or remove the others.")
        return self


class Wrapper(Section):
    """Where perturbation and penalty act, and how traces are averaged; see optim.RegularizedOptimizer."""

    layers: Text | None = setting(
        None, "weights, all, weights+biases, or a glob over parameter names; null: as the rule is published."
    )
    split_qkv: bool = setting(False, "Count query, key and value of a fused projection as three layers.")
    trace_decay: Decay = setting(0.9, "Decay per step of the running trace estimates, in [0, 1).")


class Train(Section):
    """The training loop."""

    epochs: PositiveCount = setting(20, "Passes over the training images.")
    batch_size: PositiveCount = setting(128, "Images for each optimizer step, over all processes.")
    accumulate: PositiveCount = setting(1, "Micro-batches that a batch is cut into.")
    precision: Literal["no", "bf16"] = setting("no", "Mixed precision; no: float32. fp16 would overflow.")
    channels_last: bool = setting(False, "Store images with channels last in memory.")
    compile: bool = setting(False, "Compile the model with torch.compile.")
    eps_warmup_epochs: NonNegative = setting(
        0.0, "Epochs over which training's radius and steps grow linearly from 0; evaluation's do not."
    )
    overfitting_guard: Literal["ignore", "warn", "stop"] = setting(
        "warn", "What to do when a single-step objective overfits catastrophically."
    )
    max_norm: Positive | None = setting(None, "Gradient norm above which gradients are clipped; null: never.")
    num_threads: PositiveCount | None = setting(None, "CPU threads; null leaves torch's choice.")
    device: Literal["auto", "cpu"] = setting("auto", "Where to compute; auto takes an accelerator if any.")


Curvature = Literal["wci", "hessian_trace", "lambda_max"]
Flatness = Literal["average_flatness", "worst_flatness", "relative_flatness"]
Ascents = Literal["sam_sharpness", "asam_sharpness", "awp_sharpness"]
Sharpness = Literal[
    "average_sharpness", "worst_sharpness", "pac_bayes_sharpness", "magnitude_aware_sharpness"
]
Gradients = Literal["gradient_norm", "input_gradient_norm", "input_curvature", "margins", "normalised_margin"]
Norms = Literal["frobenius_norms", "spectral_norms", "path_norm", "distance_from_initialisation"]
Losses = Literal["robust_loss", "clean_loss"]
MeasureName = Literal[Curvature, Flatness, Ascents, Sharpness, Gradients, Norms, Losses]


class Evaluation(Section):
    """What is measured while training, and how strong its attack is."""

    every: PositiveCount = setting(1, "Epochs between measurements.")
    batch_size: PositiveCount = setting(500, "Images for each pass of a process.")
    train_size: PositiveCount = setting(1000, "Training images in the measurement of training accuracy.")
    num_steps: PositiveCount = setting(10, "Attack steps.")
    step_size: StepSize | None = setting(
        None, "Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps."
    )
    num_restarts: PositiveCount = setting(1, "Attacks for each image; the worst counts.")
    wci: bool = setting(True, "Measure the layer-wise WCI of the robust loss.")


class Measures(Section):
    """What else is measured while training; see measures.by_name."""

    names: list[MeasureName] = setting(list, "Measures, such as average_flatness; none: [].")
    every: PositiveCount = setting(5, "Epochs between measurements; the last epoch is always one.")
    split: Literal["train", "val"] = setting("train", "Images they are taken on.")
    num_examples: PositiveCount = setting(200, "How many of them, at most.")
    settings: dict[str, dict[str, JsonValue]] = setting(
        dict, "Further arguments of single measures, such as average_flatness: {xi: 0.25}."
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
