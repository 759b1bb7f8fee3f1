"""The objectives and input-space regularisers of a recipe. Defaults live here."""

from typing import Annotated, Literal

from pydantic import Field

from wcitrain.recipe.base import Kind, Section
from wcitrain.recipe.values import Fraction255, NonNegative, Positive, PositiveCount, Share, StepSize


class StandardObjective(Kind):
    """Cross entropy on clean images."""

    name: Literal["standard"] = Field(default="standard", description="Kind of objective.")
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes, in [0, 1].")


class AttackedObjective(Kind):
    """What the objectives with one adversary share."""

    attack_bn: Literal["eval", "train"] = Field(
        default="eval", description="Mode of BatchNorm and dropout during the attack."
    )
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes, in [0, 1].")
    attack_loss: Literal["ce", "margin", "dlr", "kl"] = Field(
        default="ce", description="What the attack maximises: cross-entropy, margin, DLR, or KL from the clean output."
    )


class PgdObjective(AttackedObjective):
    """What the objectives whose adversary is projected gradient ascent share."""

    num_steps: PositiveCount = Field(default=10, description="Attack steps for each batch.")
    step_size: StepSize | None = Field(
        default=None, description="Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps."
    )
    random_start: bool = Field(default=True, description="Start from a random point of the ball.")
    num_restarts: PositiveCount = Field(
        default=1, description="Attacks for each batch; the worst for each image counts."
    )


class PgdAtObjective(PgdObjective):
    """Cross entropy on images found by projected gradient ascent."""

    name: Literal["pgd_at"] = Field(default="pgd_at", description="Kind of objective.")


class TradesObjective(PgdObjective):
    """Cross entropy on clean images plus beta times the divergence at adversarial ones."""

    name: Literal["trades"] = Field(default="trades", description="Kind of objective.")
    attack_loss: Literal["ce", "margin", "dlr", "kl"] = Field(default="kl", description="What the attack maximises.")
    beta: NonNegative = Field(default=6.0, description="Weight of the divergence.")


class MartObjective(PgdObjective):
    """Boosted cross entropy plus beta times the divergence, weighed by misclassification."""

    name: Literal["mart"] = Field(default="mart", description="Kind of objective.")
    beta: NonNegative = Field(default=5.0, description="Weight of the divergence, the paper's lambda.")


class AlpObjective(PgdObjective):
    """Adversarial logit pairing."""

    name: Literal["alp"] = Field(default="alp", description="Kind of objective.")
    weight: NonNegative = Field(default=0.5, description="Weight of the squared distance of the logits.")


class RotationObjective(PgdObjective):
    """Adversarial training with self-supervision by rotations."""

    name: Literal["rotation"] = Field(default="rotation", description="Kind of objective.")
    weight: NonNegative = Field(default=0.5, description="Weight of the rotation loss.")


class FgsmRsObjective(AttackedObjective):
    """One long step from a random start."""

    name: Literal["fgsm_rs"] = Field(default="fgsm_rs", description="Kind of objective.")
    step_factor: Positive = Field(default=1.25, description="Length of the step over threat.eps.")


class GradAlignObjective(AttackedObjective):
    """One step, with gradients kept aligned within the ball."""

    name: Literal["grad_align"] = Field(default="grad_align", description="Kind of objective.")
    step_factor: Positive = Field(default=1.0, description="Length of the step over threat.eps.")
    weight: NonNegative = Field(default=0.2, description="Weight of the misalignment.")


class FreeObjective(Kind):
    """Free adversarial training: several optimizer steps a batch, one backward pass each for weights and attack."""

    name: Literal["free"] = Field(default="free", description="Kind of objective.")
    num_replays: PositiveCount = Field(default=8, description="Optimizer steps with each batch.")
    step_size: StepSize | None = Field(
        default=None, description="Length of an attack step in [0, 1] pixel units; null: threat.eps."
    )
    label_smoothing: Share = Field(default=0.0, description="Share of the target spread over all classes, in [0, 1].")


class UnionThreat(Section):
    """One of several threat models."""

    norm: Literal["linf", "l2", "l1"] = Field(description="Norm of the image perturbation.")
    eps: Fraction255 = Field(description="Radius of the ball in [0, 1] pixel units.")
    step_size: StepSize | None = Field(default=None, description="Length of a step; null: 2.5 eps / num_steps.")


class UnionObjective(PgdObjective):
    """Adversarial training against several threat models."""

    name: Literal["union"] = Field(default="union", description="Kind of objective.")
    step_size: None = Field(default=None, description="Not used: every threat has its own.")
    threats: Annotated[list[UnionThreat], Field(min_length=2)] = Field(
        default_factory=lambda: [UnionThreat(norm="linf", eps=8 / 255), UnionThreat(norm="l2", eps=0.5)],
        description="The threat models of training; threat is that of the evaluation.",
    )
    strategy: Literal["max", "average", "msd"] = Field(
        default="max", description="The worst for each image, the mean over all, or the steepest at each step."
    )


Objective = (
    StandardObjective
    | PgdAtObjective
    | TradesObjective
    | MartObjective
    | AlpObjective
    | RotationObjective
    | FgsmRsObjective
    | GradAlignObjective
    | FreeObjective
    | UnionObjective
)


class NoInputRegularizer(Kind):
    """Nothing is asked of the gradient in the input."""

    name: Literal["none"] = Field(default="none", description="Kind of input-space regulariser.")


class CureRegularizer(Kind):
    """Curvature of the loss in the input, along its gradient."""

    name: Literal["cure"] = Field(default="cure", description="Kind of input-space regulariser.")
    weight: Positive = Field(default=4.0, description="Weight in the loss.")
    h: Positive = Field(default=1.5, description="Length of the finite difference in [0, 1] pixel units, l2.")
    squared: bool = Field(default=True, description="Square the difference, as the paper; its code does not.")


class InputGradientRegularizer(Kind):
    """Norm of the gradient of the loss in the input."""

    name: Literal["input_gradient"] = Field(default="input_gradient", description="Kind of input-space regulariser.")
    weight: Positive = Field(default=1.0, description="Weight in the loss.")
    norm: Literal["l2", "l1"] = Field(default="l2", description="Squared l2 norm, or l1 norm.")


InputRegularizer = NoInputRegularizer | CureRegularizer | InputGradientRegularizer
