"""The weight perturbations and penalties of a recipe. Defaults live here."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from wcitrain.recipe.base import Kind
from wcitrain.recipe.values import Count, Decay, NonNegative, Positive, PositiveCount, Text


class TimedKind(Kind):
    """A kind that acts on some layers, from some epoch on."""

    start_epoch: Count = Field(default=0, description="Epochs trained before it acts.")
    ramp_epochs: NonNegative = Field(default=0.0, description="Epochs over which it grows from nothing to full size.")
    every: PositiveCount = Field(default=1, description="Acts in one of so many optimizer steps.")
    layers: Text | None = Field(
        default=None,
        description="weights, all, weights+biases, or a glob over parameter names; null: as the method is published.",
    )
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


class SamPerturbation(TimedKind):
    """Sharpness-aware minimization."""

    name: Literal["sam"] = Field(default="sam", description="Kind of weight perturbation.")
    rho: Positive = Field(default=0.05, description="Length of the perturbation.")


class AsamPerturbation(TimedKind):
    """Adaptive sharpness-aware minimization."""

    name: Literal["asam"] = Field(default="asam", description="Kind of weight perturbation.")
    rho: Positive = Field(default=0.5, description="Length of the perturbation in units of each weight.")
    eta: NonNegative = Field(default=0.01, description="Added to the size of each weight.")


class VassoPerturbation(TimedKind):
    """Sharpness-aware minimization along a smoothed gradient."""

    name: Literal["vasso"] = Field(default="vasso", description="Kind of weight perturbation.")
    rho: Positive = Field(default=0.05, description="Length of the perturbation.")
    theta: Annotated[Positive, Field(le=1)] = Field(
        default=0.4, description="Weight of the newest gradient, in (0, 1]."
    )


class GsamPerturbation(TimedKind):
    """Surrogate-gap guided sharpness-aware minimization."""

    name: Literal["gsam"] = Field(default="gsam", description="Kind of weight perturbation.")
    rho: Positive = Field(default=0.05, description="Length of the perturbation.")
    alpha: Positive = Field(default=0.2, description="Weight of the orthogonal part.")


class GradientNormPerturbation(TimedKind):
    """Penalty on the gradient's norm, by a finite difference."""

    name: Literal["gradient_norm"] = Field(default="gradient_norm", description="Kind of weight perturbation.")
    strength: Positive = Field(default=0.04, description="Weight of the gradient's norm in the loss.")
    radius: Positive = Field(default=0.05, description="Length of the finite difference.")


class CrSamPerturbation(TimedKind):
    """Curvature-regularized sharpness-aware minimization."""

    name: Literal["cr_sam"] = Field(default="cr_sam", description="Kind of weight perturbation.")
    rho: Positive = Field(default=0.1, description="Length of the perturbation.")
    alpha: Positive = Field(default=0.1, description="Weight of the second difference.")
    beta: Positive = Field(default=0.01, description="Weight of the first difference.")


class WciAdversaryPerturbation(TimedKind):
    """The worst case within the radii of the WCI posterior."""

    name: Literal["wci_adversary"] = Field(default="wci_adversary", description="Kind of weight perturbation.")
    relative_size: Positive = Field(default=0.01, description="Perturbation norm over weight norm.")
    floor: Annotated[Positive, Field(le=1)] = Field(
        default=1e-4, description="Lowest norm-curvature product of a layer, as a share of the layers' mean, in (0, 1]."
    )
    trace_decay: Decay = Field(default=0.9, description="Decay per step of the running trace estimates, in [0, 1).")


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


class NoiseStabilityPerturbation(RandomPerturbation):
    """Isotropic Gaussian weights, antithetic."""

    name: Literal["noise_stability"] = Field(default="noise_stability", description="Kind of weight perturbation.")
    sigma: Positive = Field(default=0.01, description="Standard deviation of every weight.")


class RwpPerturbation(TimedKind):
    """Gaussian weights relative to every filter."""

    name: Literal["rwp"] = Field(default="rwp", description="Kind of weight perturbation.")
    sigma: Positive = Field(default=0.01, description="Standard deviation of every weight over its filter's norm.")
    mixing: Annotated[Positive, Field(le=1)] = Field(
        default=0.5, description="Weight of the perturbed gradient, in (0, 1]; the rest is the plain one's."
    )
    statistics: Literal["perturbed", "clean"] = Field(
        default="perturbed", description="Where normalisation statistics are updated if mixing is 1."
    )


Perturbation = (
    NoPerturbation
    | SamPerturbation
    | AsamPerturbation
    | AwpPerturbation
    | VassoPerturbation
    | GsamPerturbation
    | GradientNormPerturbation
    | CrSamPerturbation
    | WciAdversaryPerturbation
    | WciPerturbation
    | NoisePerturbation
    | NoiseStabilityPerturbation
    | RwpPerturbation
)


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
