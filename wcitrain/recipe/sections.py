"""The sections of a recipe: every key with its type, default, meaning and unit. Defaults live here and nowhere else."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from wcitrain.recipe.base import Kind, Section
from wcitrain.recipe.values import (
    AutoBool,
    Count,
    Decay,
    Fraction255,
    InnerShare,
    NonNegative,
    Positive,
    PositiveCount,
    Precision,
    Real,
    Share,
    StepSize,
    Text,
)


class Data(Section):
    """Which images are read and how they are split."""

    source: Literal["digits", "cifar10", "cifar100", "svhn", "folder", "timm"] = Field(
        default="digits", description="Where images come from; digits needs no files."
    )
    root: Text | None = Field(default=None, description="Folder with the data; every source but digits needs it.")
    name: Text | None = Field(
        default=None, description="Data set name for timm.data.create_dataset; only with source timm."
    )
    train_split: Text = Field(default="train", description="Name of the training split.")
    test_split: Text = Field(default="test", description="Name of the test split.")
    val_split: Text | None = Field(
        default=None, description="Name of a validation split; null cuts one from the training images."
    )
    download: bool = Field(default=False, description="Fetch the data set when it is not under root.")
    num_classes: PositiveCount | None = Field(
        default=None, description="Number of classes; null takes it from the data."
    )
    image_size: PositiveCount | None = Field(
        default=None, description="Side of the square images are resized to, in pixels."
    )
    max_train: PositiveCount | None = Field(
        default=None, description="Training images kept, balanced over classes; null: all."
    )
    max_test: PositiveCount | None = Field(
        default=None, description="Test images kept, balanced over classes; null: all."
    )
    val_size: PositiveCount = Field(default=200, description="Validation images cut from the training images.")
    split_seed: Count = Field(default=0, description="Seed of the subsets and of the validation cut.")
    in_memory: AutoBool = Field(default="auto", description="Keep decoded images in memory; auto does so up to 2 GB.")
    crop_padding: Count = Field(
        default=0, description="Zero padding before the random crop, in pixels; 0 does not crop."
    )
    flip: bool = Field(default=False, description="Flip training images left to right at random.")
    num_workers: Count = Field(default=2, description="Workers that decode images.")


class Model(Section):
    """The timm backbone."""

    name: Text = Field(default="resnet18", description="Model name for timm.create_model.")
    pretrained: bool = Field(default=False, description="Start from timm's pretrained weights.")
    stem: Literal["default", "cifar"] = Field(
        default="default", description="First layers: timm's, or cifar's for small images."
    )
    checkpoint_path: Text | None = Field(default=None, description="File with weights to start from.")
    kwargs: dict[str, JsonValue] = Field(default_factory=dict, description="Further arguments of timm.create_model.")
    mean: Annotated[list[Real], Field(min_length=1)] | None = Field(
        default=None, description="Channel means subtracted inside the model, in [0, 1] pixel units; null: timm's."
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        default=None, description="Channel deviations divided by inside the model, in [0, 1] pixel units; null: timm's."
    )


class Threat(Section):
    """What the adversary may do to an image."""

    norm: Literal["linf", "l2", "l1"] = Field(default="linf", description="Norm of the image perturbation.")
    eps: Fraction255 = Field(default=8 / 255, description="Radius of the ball in [0, 1] pixel units, such as 8/255.")
    warmup_epochs: NonNegative = Field(
        default=0.0,
        description="Epochs over which training's radius and steps grow linearly from 0; evaluation's do not.",
    )


class Augment(Section):
    """What happens to a training image after crop and flip; see data.Augmentation."""

    policy: Literal["none", "cutout", "autoaugment", "randaugment", "trivialaugment", "idbh"] = Field(
        default="none", description="Kind of augmentation."
    )
    magnitude: Count | None = Field(default=None, description="Strength of randaugment, 0 to 30; null: 9.")
    num_ops: PositiveCount | None = Field(default=None, description="Operations of randaugment; null: 2.")
    cutout_size: PositiveCount | None = Field(
        default=None, description="Side of the black square in pixels; null: none."
    )
    probability: Annotated[Positive, Field(le=1)] = Field(
        default=1.0, description="Probability that an image is augmented, in (0, 1]."
    )


class Mixing(Section):
    """Mixing of the images of a batch, before they are attacked; see data.Mixing."""

    mixup_alpha: NonNegative = Field(default=0.0, description="Concentration of mixup; 0: off.")
    cutmix_alpha: NonNegative = Field(default=0.0, description="Concentration of CutMix; 0: off.")
    probability: Share = Field(default=1.0, description="Probability that a batch is mixed, in [0, 1].")
    switch_probability: Share = Field(default=0.5, description="Probability of CutMix where both are on, in [0, 1].")


class Extra(Section):
    """Generated or unlabelled images beside the training images; see data.load_extra."""

    path: Text | None = Field(default=None, description="A .npz or a folder of images; null: none.")
    labels: Literal["given", "pseudo"] = Field(
        default="given", description="given reads labels; pseudo lets a model give them."
    )
    labeler: Text | None = Field(
        default=None, description="Exported model that gives pseudo-labels, such as runs/NAME-s0/model/last."
    )
    fraction: Annotated[Positive, Field(ge=0.001, le=0.999)] = Field(
        default=0.5, description="Share of extra images in every batch, 0.001 to 0.999."
    )
    max_images: PositiveCount | None = Field(default=None, description="Extra images kept; null: all.")


class LabelNoise(Section):
    """Random training labels; see data.noisy_labels."""

    share: Share = Field(default=0.0, description="Probability that a label is drawn anew, in [0, 1].")
    resample: bool = Field(default=True, description="Draw anew in every epoch; false fixes the noise.")
    exclude_true: bool = Field(default=False, description="Draw from the other classes only.")


class Optimizer(Section):
    """The base optimizer."""

    name: Text = Field(default="sgd", description="sgd, adamw or any timm optimizer name.")
    lr: Positive = Field(default=0.1, description="Peak learning rate.")
    weight_decay: NonNegative = Field(default=5e-4, description="Weight decay of the base optimizer.")
    momentum: Decay = Field(default=0.9, description="Momentum, in [0, 1).")
    nesterov: bool = Field(default=False, description="Use Nesterov's momentum.")
    decay_norm_and_bias: bool = Field(default=True, description="Decay normalisation weights and biases too.")
    kwargs: dict[str, JsonValue] = Field(default_factory=dict, description="Further arguments of the optimizer.")


class WarmupKind(Kind):
    """A schedule that may start with a linear rise."""

    warmup_epochs: NonNegative = Field(
        default=0.0, description="Epochs over which the learning rate rises linearly from 0."
    )


class ConstantSchedule(WarmupKind):
    """One learning rate."""

    name: Literal["constant"] = Field(default="constant", description="Kind of learning-rate schedule.")


class PiecewiseSchedule(WarmupKind):
    """Drops at given epochs."""

    name: Literal["piecewise"] = Field(default="piecewise", description="Kind of learning-rate schedule.")
    milestones: list[NonNegative] = Field(default_factory=list, description="Epochs after which the rate drops.")
    gamma: InnerShare = Field(default=0.1, description="Factor of each drop, in (0, 1).")


class CosineSchedule(WarmupKind):
    """Half a cosine."""

    name: Literal["cosine"] = Field(default="cosine", description="Kind of learning-rate schedule.")
    final_fraction: Share = Field(default=0.0, description="Last learning rate over lr, in [0, 1].")


class OneCycleSchedule(Kind):
    """A linear rise and a linear fall."""

    name: Literal["one_cycle"] = Field(default="one_cycle", description="Kind of learning-rate schedule.")
    peak_epoch: Positive | None = Field(default=None, description="Epochs until the peak; null: 40 % of train.epochs.")
    final_fraction: Share = Field(default=0.0, description="Last learning rate over lr, in [0, 1].")


Schedule = ConstantSchedule | PiecewiseSchedule | CosineSchedule | OneCycleSchedule


class Train(Section):
    """The training loop."""

    epochs: PositiveCount = Field(default=20, description="Passes over the training images.")
    batch_size: PositiveCount = Field(default=128, description="Images for each optimizer step, over all processes.")
    accumulate: PositiveCount = Field(default=1, description="Micro-batches that a batch is cut into.")
    precision: Precision = Field(default="no", description="Mixed precision; no computes in float32.")
    channels_last: bool = Field(default=False, description="Store images with channels last in memory.")
    compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    ema_decay: InnerShare | None = Field(
        default=None, description="Decay per step of the averaged weights, in (0, 1); null: none."
    )
    swa_start_epoch: Count | None = Field(
        default=None, description="Epochs before stochastic weight averaging, one sample an epoch; null: none."
    )
    patience: PositiveCount | None = Field(
        default=None,
        description="Epochs without a better robust validation accuracy before training stops; null: never.",
    )
    overfitting_guard: Literal["ignore", "warn", "stop"] = Field(
        default="warn", description="What to do when a single-step objective overfits catastrophically."
    )
    max_norm: Positive | None = Field(
        default=None, description="Gradient norm above which gradients are clipped; null: never."
    )
    num_threads: PositiveCount | None = Field(default=None, description="CPU threads; null leaves torch's choice.")
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where to compute; auto takes an accelerator if any."
    )


MeasureName = Literal[
    "wci",
    "hessian_trace",
    "lambda_max",
    "average_flatness",
    "worst_flatness",
    "relative_flatness",
    "sam_sharpness",
    "asam_sharpness",
    "awp_sharpness",
    "average_sharpness",
    "worst_sharpness",
    "pac_bayes_sharpness",
    "magnitude_aware_sharpness",
    "gradient_norm",
    "input_gradient_norm",
    "input_curvature",
    "margins",
    "normalised_margin",
    "frobenius_norms",
    "spectral_norms",
    "path_norm",
    "distance_from_initialisation",
    "robust_loss",
    "clean_loss",
]


class Evaluation(Section):
    """What is measured while training, and how strong its attack is."""

    every: PositiveCount = Field(default=1, description="Epochs between measurements.")
    batch_size: PositiveCount = Field(default=500, description="Images for each pass of a process.")
    train_size: PositiveCount = Field(
        default=1000, description="Training images in the measurement of training accuracy."
    )
    num_steps: PositiveCount = Field(default=10, description="Attack steps.")
    step_size: StepSize | None = Field(
        default=None, description="Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps."
    )
    num_restarts: PositiveCount = Field(default=1, description="Attacks for each image; the worst counts.")
    wci: bool = Field(default=True, description="Measure the layer-wise WCI of the robust loss.")


class Measures(Section):
    """What else is measured while training; see measures.by_name."""

    names: list[MeasureName] = Field(default_factory=list, description="Measures, such as average_flatness; none: [].")
    every: PositiveCount = Field(default=5, description="Epochs between measurements; the last epoch is always one.")
    split: Literal["train", "val"] = Field(default="train", description="Images they are taken on.")
    num_examples: PositiveCount = Field(default=200, description="How many of them, at most.")
    settings: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, description="Further arguments of single measures, such as average_flatness: {xi: 0.25}."
    )


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveCount = Field(default=1, description="Epochs between checkpoints.")
    keep_every: PositiveCount | None = Field(
        default=None,
        description="Epochs between weights kept for good in model/epoch-N, first and last included; null: none.",
    )


class Tracking(Section):
    """Where metrics go besides the run folder."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="Mode of Weights & Biases."
    )
    project: Text = Field(default="wcitrain", description="Project name in the trackers.")
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files.")
