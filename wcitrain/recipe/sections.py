"""The sections of a recipe: every key with its type, default, meaning and unit. Defaults live here and nowhere else."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

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


class Section(BaseModel):
    """A part of the recipe: frozen, without unknown keys, without conversions but those in ``recipe_values``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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

    norm: Literal["linf", "l2"] = Field(default="linf", description="Norm of the image perturbation.")
    eps: Fraction255 = Field(default=8 / 255, description="Radius of the ball in [0, 1] pixel units, such as 8/255.")


class Kind(Section):
    """A section of several kinds, told apart by ``name``."""

    name: str


class StandardObjective(Kind):
    """Cross entropy on clean images."""

    name: Literal["standard"] = Field(default="standard", description="Kind of objective.")
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes, in [0, 1].")


class PgdAtObjective(Kind):
    """Cross entropy on images found by projected gradient ascent."""

    name: Literal["pgd_at"] = Field(default="pgd_at", description="Kind of objective.")
    num_steps: PositiveCount = Field(default=10, description="Attack steps for each batch.")
    step_size: StepSize | None = Field(
        default=None, description="Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps."
    )
    random_start: bool = Field(default=True, description="Start from a random point of the ball.")
    num_restarts: PositiveCount = Field(
        default=1, description="Attacks for each batch; the worst for each image counts."
    )
    attack_bn: Literal["eval", "train"] = Field(
        default="eval", description="Mode of BatchNorm and dropout during the attack."
    )
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes, in [0, 1].")


Objective = StandardObjective | PgdAtObjective


class TimedKind(Kind):
    """A kind that acts on some layers, from some epoch on."""

    start_epoch: Count = Field(default=0, description="Epochs trained before it acts.")
    ramp_epochs: NonNegative = Field(default=0.0, description="Epochs over which it grows from nothing to full size.")
    every: PositiveCount = Field(default=1, description="Acts in one of so many optimizer steps.")
    layers: Text = Field(default="weights", description="weights, all, weights+biases, or a glob over parameter names.")
    split_qkv: bool = Field(
        default=False, description="Count query, key and value of a fused projection as three layers."
    )


class NoPerturbation(Kind):
    """Weights stay where they are."""

    name: Literal["none"] = Field(default="none", description="Kind of weight perturbation.")


class AwpPerturbation(TimedKind):
    """Adversarial weight perturbation."""

    name: Literal["awp"] = Field(default="awp", description="Kind of weight perturbation.")
    gamma: Positive = Field(default=0.01, description="Perturbation norm over weight norm, for each layer.")


class RandomPerturbation(TimedKind):
    """What the random perturbations share."""

    statistics: Literal["perturbed", "clean"] = Field(
        default="perturbed", description="Where normalisation statistics are updated; clean costs a forward pass."
    )
    trace_decay: Decay = Field(default=0.9, description="Decay per step of the running trace estimates, in [0, 1).")


class WciPerturbation(RandomPerturbation):
    """Random weights from the posterior that the Weight-Curvature Index makes optimal."""

    name: Literal["wci"] = Field(default="wci", description="Kind of weight perturbation.")
    relative_size: Positive | None = Field(
        default=1.0, description="Perturbation norm over weight norm; or set strength."
    )
    strength: Positive | None = Field(
        default=None, description="Weight lambda of the WCI in the loss; or set relative_size."
    )
    frobenius: bool = Field(default=False, description="Add the variational Frobenius term to the loss.")
    floor: Annotated[Positive, Field(le=1)] = Field(
        default=1e-4, description="Lowest norm-curvature product of a layer, as a share of the layers' mean, in (0, 1]."
    )

    @model_validator(mode="before")
    @classmethod
    def _strength_replaces_the_default_size(cls, data: Any) -> Any:
        """Let ``strength`` alone be enough: drop the default of ``relative_size``."""
        if isinstance(data, dict) and data.get("strength") is not None:
            return {"relative_size": None} | data
        return data


class NoisePerturbation(RandomPerturbation):
    """Random weights, isotropic."""

    name: Literal["noise"] = Field(default="noise", description="Kind of weight perturbation.")
    relative_size: Positive = Field(default=1.0, description="Perturbation norm over weight norm.")


Perturbation = NoPerturbation | AwpPerturbation | WciPerturbation | NoisePerturbation


class NoPenalty(Kind):
    """No term is added to the loss."""

    name: Literal["none"] = Field(default="none", description="Kind of penalty.")


class FrobeniusPenalty(TimedKind):
    """Squared Frobenius norms of the layers."""

    name: Literal["frobenius"] = Field(default="frobenius", description="Kind of penalty.")
    strength: NonNegative = Field(default=0.0, description="Factor of the penalty in the loss; 0 only monitors.")


class CurvaturePenalty(TimedKind):
    """What the penalties on Hessian traces share."""

    estimator: Literal["auto", "two_point", "gauss_newton", "hutchinson", "top_layer"] = Field(
        default="auto",
        description="How traces are estimated; auto tries and says why; top_layer counts the head alone.",
    )
    num_probes: PositiveCount = Field(default=1, description="Random probes for each batch.")
    radius: Annotated[Positive, Field(le=1)] | None = Field(
        default=None, description="Probe norm over weight norm of finite differences, in (0, 1]; null: 0.01."
    )
    gradient: Literal["finite_difference", "autograd"] | None = Field(
        default=None, description="How hutchinson is differentiated; null: finite_difference."
    )
    trace_decay: Decay = Field(default=0.9, description="Decay per step of the running trace estimates, in [0, 1).")


class WciPenalty(CurvaturePenalty):
    """The Weight-Curvature Index."""

    name: Literal["wci"] = Field(default="wci", description="Kind of penalty.")
    strength: NonNegative = Field(default=0.0, description="Factor of the penalty in the loss; 0 only monitors.")


class TracePenalty(CurvaturePenalty):
    """Hessian traces of the layers."""

    name: Literal["trace"] = Field(default="trace", description="Kind of penalty.")
    strength: NonNegative = Field(default=0.0, description="Factor of the penalty in the loss; 0 only monitors.")


class FrobeniusTracePenalty(CurvaturePenalty):
    """Squared Frobenius norms and Hessian traces, weighed separately."""

    name: Literal["frobenius_trace"] = Field(default="frobenius_trace", description="Kind of penalty.")
    frobenius_weight: NonNegative = Field(default=0.0, description="Factor of the squared Frobenius norms in the loss.")
    trace_weight: NonNegative = Field(default=0.0, description="Factor of the Hessian traces in the loss.")


Penalty = NoPenalty | WciPenalty | FrobeniusPenalty | TracePenalty | FrobeniusTracePenalty


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
    max_norm: Positive | None = Field(
        default=None, description="Gradient norm above which gradients are clipped; null: never."
    )
    num_threads: PositiveCount | None = Field(default=None, description="CPU threads; null leaves torch's choice.")
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where to compute; auto takes an accelerator if any."
    )


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


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveCount = Field(default=1, description="Epochs between checkpoints.")


class Tracking(Section):
    """Where metrics go besides the run folder."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="Mode of Weights & Biases."
    )
    project: Text = Field(default="wcitrain", description="Project name in the trackers.")
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files.")
