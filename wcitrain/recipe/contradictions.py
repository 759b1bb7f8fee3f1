"""Settings that are fine alone and wrong together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wcitrain.recipe.objectives import (
    FgsmRsObjective,
    FreeObjective,
    GradAlignObjective,
    PgdObjective,
    RotationObjective,
    StandardObjective,
    UnionObjective,
)
from wcitrain.recipe.regularizers import (
    CurvaturePenalty,
    FrobeniusTracePenalty,
    RwpPerturbation,
    TimedKind,
    WciPerturbation,
)
from wcitrain.recipe.sections import PiecewiseSchedule
from wcitrain.recipe.values import fraction_text

if TYPE_CHECKING:
    from wcitrain.recipe.recipe import Recipe

LARGEST_EPS = {"linf": 1, "l2": 100, "l1": 10000}  # beyond it pixels were meant to be in [0, 255]

Problem = tuple[tuple[str, ...], str]  # dotted keys that disagree, the one to blame first; "got ...; expected ... ."


def contradictions(recipe: "Recipe") -> Iterator[Problem]:
    """Yield every pair of settings that cannot both be meant."""
    yield from _data_contradictions(recipe)
    yield from _training_data_contradictions(recipe)
    yield from _attack_contradictions(recipe)
    yield from _regularizer_contradictions(recipe)
    yield from _time_contradictions(recipe)


def _training_data_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    """Yield what cannot be meant about augmentation, extra images and labels."""
    augment, extra = recipe.augment, recipe.extra
    if augment.policy != "randaugment" and (augment.magnitude, augment.num_ops) != (None, None):
        text = f"got values with policy {augment.policy}; expected null: only randaugment has them. Remove them."
        yield ("augment.magnitude", "augment.num_ops", "augment.policy"), text
    if augment.policy == "cutout" and augment.cutout_size is None:
        yield (
            ("augment.cutout_size", "augment.policy"),
            "got null with policy cutout; expected the square's side. Set it.",
        )
    if augment.policy == "none" and (augment.cutout_size is not None or augment.probability != 1):
        text = "got a setting with policy none; expected none: it would have no effect. Set augment.policy, e.g. to cutout."
        yield ("augment.cutout_size", "augment.probability", "augment.policy"), text
    if extra.path is None and extra != type(extra)():
        yield (
            ("extra.path",),
            "got null beside other keys of extra; expected a .npz or a folder. Set it, or remove the others.",
        )
    if extra.path is not None and (extra.labels == "pseudo") != (extra.labeler is not None):
        text = (
            f"got {extra.labeler!r} with labels {extra.labels}; expected an exported model for pseudo, null for given."
        )
        yield ("extra.labeler", "extra.labels"), f"{text} Change one of them."
    mixing = recipe.mixing
    alphas = (mixing.mixup_alpha > 0) + (mixing.cutmix_alpha > 0)
    if (mixing.probability == 0 or alphas == 0) and mixing != type(mixing)():
        text = (
            "got settings that mix nothing; expected an alpha and a probability above 0, or none of them. Change them."
        )
        yield ("mixing.probability", "mixing.mixup_alpha", "mixing.cutmix_alpha", "mixing.switch_probability"), text
    elif alphas == 1 and mixing.switch_probability != 0.5:
        text = f"got {mixing.switch_probability:g} with one kind of mixing; expected both alphas above 0. Remove it."
        yield ("mixing.switch_probability", "mixing.mixup_alpha", "mixing.cutmix_alpha"), text
    if recipe.label_noise.share == 0 and recipe.label_noise != type(recipe.label_noise)():
        yield (
            ("label_noise.share",),
            "got 0 beside other keys of label_noise; expected more than 0. Set it, or remove the others.",
        )


def _data_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    data, model = recipe.data, recipe.model
    is_remote = data.source == "timm" and (data.name or "").split("/")[0].lower() in ("hfds", "hfids", "tfds")
    if data.source == "digits" and (data.root is not None or data.download):
        text = "got a folder with source digits, which are embedded; expected null. Set data.source, e.g. to folder."
        yield ("data.root" if data.root is not None else "data.download", "data.source"), text
    if data.source != "digits" and data.root is None and not is_remote:
        yield ("data.root", "data.source"), f"got null with source {data.source}; expected a folder. Set data.root."
    if data.source == "timm" and data.name is None:
        yield ("data.name", "data.source"), "got null with source timm; expected a data set name. Set data.name."
    if data.source != "timm" and data.name is not None:
        text = f"got {data.name!r} with source {data.source}; expected null. Remove it, or set data.source to timm."
        yield ("data.name", "data.source"), text
    if data.val_split is None and data.max_train is not None and data.val_size >= data.max_train:
        text = f"got {data.val_size}; expected fewer than data.max_train = {data.max_train}. Lower it or keep more."
        yield ("data.val_size", "data.max_train", "data.val_split"), text
    if reserved := sorted(
        {"model_name", "num_classes", "in_chans", "pretrained", "checkpoint_path"} & set(model.kwargs)
    ):
        text = f"got {', '.join(reserved)}; expected arguments that the recipe does not set itself. Remove them."
        yield ("model.kwargs",), text
    if reserved := sorted(
        {"lr", "weight_decay", "momentum", "nesterov", "params", "opt"} & set(recipe.optimizer.kwargs)
    ):
        text = f"got {', '.join(reserved)}; expected arguments without a key of their own. Set optimizer.{reserved[0]}."
        yield ("optimizer.kwargs",), text
    if recipe.optimizer.nesterov and (recipe.optimizer.name != "sgd" or recipe.optimizer.momentum == 0):
        text = f"got true with {recipe.optimizer.name}, momentum {recipe.optimizer.momentum:g}; expected sgd with momentum."
        yield ("optimizer.nesterov", "optimizer.name", "optimizer.momentum"), f"{text} Remove it."
    if (model.mean is None) != (model.std is None):
        missing, given = ("mean", "std") if model.mean is None else ("std", "mean")
        yield (f"model.{missing}", f"model.{given}"), f"got null; expected a list like model.{given}. Set both or none."
    elif model.mean and model.std and len(model.mean) != len(model.std):
        text = f"got {len(model.std)} values; expected {len(model.mean)} as in model.mean. Give one value per channel."
        yield ("model.std", "model.mean"), text


def _attack_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    threat, objective = recipe.threat, recipe.objective
    norm, eps = threat.norm, threat.eps
    largest = LARGEST_EPS[norm]
    if eps > largest:
        hint = f"Did you mean {eps:g}/255?" if norm == "linf" else "Write e.g. 128/255."
        text = f"got {eps:g}; expected at most {largest} under {norm}: pixels lie in [0, 1]. {hint}"
        yield ("threat.eps", "threat.norm"), text
    if eps > 0:
        yield from _step_contradictions("evaluation", recipe.evaluation.step_size, recipe.evaluation.num_steps, eps)
    if isinstance(objective, StandardObjective):
        if threat.warmup_epochs and recipe.input_regularizer.name != "cure":
            text = (
                f"got {threat.warmup_epochs:g} with objective standard, which attacks nothing; expected 0. Remove it."
            )
            yield ("threat.warmup_epochs", "objective.name"), text
        return
    if eps == 0:
        text = f"got 0 with objective.name {objective.name}; expected a positive radius. Set it, or objective.name to standard."
        yield ("threat.eps", "objective.name"), text
        return
    if isinstance(objective, UnionObjective):
        for one in objective.threats:
            if not 0 < one.eps <= LARGEST_EPS[one.norm]:
                text = f"got {one.norm} with eps {one.eps:g}; expected more than 0 and at most {LARGEST_EPS[one.norm]}."
                yield ("objective.threats",), f"{text} Change it."
            steps = objective.num_steps
            if one.step_size is not None and not one.eps <= one.step_size * steps * (1 + 1e-9) <= 2 * one.eps * steps:
                text = f"got {one.norm} with step_size {one.step_size:g}; expected eps / num_steps to 2 eps, eps = {one.eps:g}."
                yield ("objective.threats", "objective.num_steps"), f"{text} Change it, or leave it out."
        if objective.strategy == "msd" and (objective.num_restarts > 1 or objective.attack_loss == "kl"):
            text = (
                "got msd with several restarts or attack_loss kl, which it does not have; expected 1 and another loss."
            )
            yield (
                ("objective.strategy", "objective.num_restarts", "objective.attack_loss"),
                f"{text} Change one of them.",
            )
    elif isinstance(objective, PgdObjective):
        yield from _step_contradictions("objective", objective.step_size, objective.num_steps, eps)
    if isinstance(objective, RotationObjective | GradAlignObjective) and objective.attack_loss == "kl":
        text = (
            f"got kl with objective {objective.name}, whose attack needs labels; expected ce, margin or dlr. Change it."
        )
        yield ("objective.attack_loss", "objective.name"), text
    if isinstance(objective, FgsmRsObjective | GradAlignObjective) and objective.step_factor > 2:
        text = f"got {objective.step_factor:g}; expected at most 2: a longer step leaves the ball from any point. Lower it."
        yield ("objective.step_factor",), text
    if isinstance(objective, FreeObjective):
        if objective.step_size is not None and objective.step_size > 2 * eps:
            text = f"got {fraction_text(objective.step_size)}; expected at most twice threat.eps = {fraction_text(eps)}. Lower it."
            yield ("objective.step_size", "threat.eps"), text
        if isinstance(recipe.penalty, CurvaturePenalty) or recipe.perturbation.name in ("gsam", "cr_sam"):
            text = (
                "got free with a curvature penalty, gsam or cr_sam, whose passes would move its image perturbation too; expected "
                "another rule or objective. Change one of them."
            )
            yield ("objective.name", "penalty.name", "perturbation.name"), text
    if isinstance(objective, FreeObjective) and recipe.train.accumulate > 1:
        text = f"got {recipe.train.accumulate} with objective free, whose perturbation moves in every pass; expected 1."
        yield ("train.accumulate", "objective.name"), f"{text} Lower train.batch_size instead."
    if getattr(objective, "attack_loss", "ce") == "kl" and not getattr(objective, "random_start", True):
        yield (
            ("objective.random_start", "objective.attack_loss"),
            "got false with attack_loss kl; expected true: at the image itself the divergence has no gradient. Set it.",
        )


def _step_contradictions(section: str, step: float | None, num_steps: int, eps: float) -> Iterator[Problem]:
    """Yield steps that leave the ball at once, or that do not reach its surface: such an attack flatters the model."""
    keys = (f"{section}.step_size", "threat.eps", f"{section}.num_steps")
    if step is None:
        return
    if step > 2 * eps:
        hint = f"Did you mean {step:g}/255?" if step >= 1 else "Lower it."
        rule = f"at most twice threat.eps = {fraction_text(eps)}: a longer step leaves the ball from any point"
        yield keys, f"got {fraction_text(step)}; expected {rule}. {hint}"
    # The relative slack is for rounding: 4 * (2/255) may fall short of 8/255 by its last bit.
    if step * num_steps < eps * (1 - 1e-9):
        rule = f"at least threat.eps = {fraction_text(eps)} over num_steps = {num_steps}"
        yield keys, f"got {fraction_text(step)}; expected {rule}. Take more or longer steps, or set it to null."


def _regularizer_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    perturbation, penalty = recipe.perturbation, recipe.penalty
    if isinstance(perturbation, WciPerturbation):
        keys = ("perturbation.strength", "perturbation.relative_size")
        if perturbation.strength is None and perturbation.relative_size is None:
            yield keys, "got null, and null for relative_size; expected exactly one of them. Set one to a number."
        elif perturbation.strength is not None and perturbation.relative_size is not None:
            yield (
                keys,
                f"got {perturbation.strength} beside relative_size; expected one of them. Set one to null.",
            )
    is_curvature = isinstance(penalty, CurvaturePenalty)
    if isinstance(penalty, FrobeniusTracePenalty):
        is_curvature = penalty.trace_weight > 0
    clashes = list(_composition_contradictions(recipe)) if is_curvature and perturbation.name != "none" else []
    yield from clashes
    if isinstance(penalty, CurvaturePenalty):
        yield from _estimator_contradictions(recipe, penalty)
    if isinstance(perturbation, RwpPerturbation) and perturbation.mixing < 1 and perturbation.statistics == "clean":
        text = "got clean with mixing below 1, where statistics move at the clean weights anyway; expected perturbed. Remove it."
        yield ("perturbation.statistics", "perturbation.mixing"), text
    if isinstance(perturbation, TimedKind) and isinstance(penalty, TimedKind):
        is_for_all = perturbation.name not in ("awp", "wci", "wci_adversary", "noise")
        if is_for_all and not clashes and perturbation.layers is penalty.layers is None:
            text = (
                f"got null with perturbation {perturbation.name}, published for all tensors, and penalty {penalty.name}, defined "
                "on weight matrices; expected the layers of both. Set it to weights or all."
            )
            yield ("perturbation.layers", "penalty.name"), text
        if None not in (perturbation.layers, penalty.layers) and perturbation.layers != penalty.layers:
            text = f"got {penalty.layers!r}, and {perturbation.layers!r} for the perturbation; expected the same. Change one."
            yield ("penalty.layers", "perturbation.layers"), text
        if perturbation.split_qkv != penalty.split_qkv:
            text = f"got {penalty.split_qkv}, and {perturbation.split_qkv} for the perturbation; expected the same. Change one."
            yield ("penalty.split_qkv", "perturbation.split_qkv"), text


def _composition_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    """Yield a curvature penalty beside a perturbation where the two are not one objective (`optim.composition`)."""
    perturbation, penalty = recipe.perturbation, recipe.penalty
    keys = ("penalty.name", "perturbation.name", "penalty.trace_weight")
    is_taken_at_one_point = perturbation.name in ("sam", "asam", "awp", "vasso") or (
        isinstance(perturbation, RwpPerturbation) and perturbation.mixing == 1
    )
    if not is_taken_at_one_point:
        text = (
            f"got {penalty.name} with perturbation.name {perturbation.name}; expected at most one of the two: the penalty is "
            "evaluated where the gradient is taken, which must be one point (sam, asam, awp, vasso, rwp with mixing 1). Set "
            "one name to none."
        )
        yield keys, text
    elif isinstance(penalty, CurvaturePenalty) and penalty.estimator not in ("auto", "gauss_newton"):
        text = f"got {penalty.estimator} with perturbation.name {perturbation.name}; expected gauss_newton, which moves no weights."
        yield ("penalty.estimator", "perturbation.name"), f"{text} Change one of them."


def _estimator_contradictions(recipe: "Recipe", penalty: CurvaturePenalty) -> Iterator[Problem]:
    """Yield settings that the chosen estimator of the traces has no use for, or cannot work with."""
    estimator = penalty.estimator
    if penalty.gradient is not None and estimator != "hutchinson":
        text = f"got {penalty.gradient!r} with estimator {estimator}; expected null: only hutchinson has a choice. Remove it."
        yield ("penalty.gradient", "penalty.estimator"), text
    if penalty.radius is not None and (estimator in ("gauss_newton", "top_layer") or penalty.gradient == "autograd"):
        text = f"got {penalty.radius:g}, but {estimator} makes no finite differences here; expected null. Remove it."
        yield ("penalty.radius", "penalty.estimator", "penalty.gradient"), text
    if estimator == "top_layer" and penalty.num_probes > 1:
        text = f"got {penalty.num_probes}, but top_layer is a closed form; expected 1. Remove it."
        yield ("penalty.num_probes", "penalty.estimator"), text
    if estimator == "top_layer" and (penalty.layers not in (None, "weights") or penalty.split_qkv):
        text = (
            f"got {penalty.layers!r}, but top_layer's only layer is the head's weight; expected 'weights'. Remove it."
        )
        yield ("penalty.layers", "penalty.estimator", "penalty.split_qkv"), text
    if recipe.train.compile and estimator not in ("auto", "two_point"):
        text = f"got {estimator} with train.compile; expected auto or two_point: compiled models differentiate once. Change one."
        yield ("penalty.estimator", "train.compile"), text


def _time_contradictions(recipe: "Recipe") -> Iterator[Problem]:
    schedule, train = recipe.schedule, recipe.train
    differentiates_twice = recipe.input_regularizer.name != "none" or recipe.objective.name == "grad_align"
    if train.compile and differentiates_twice:
        text = "got true with grad_align or an input-space regulariser; expected false: compiled models differentiate once."
        yield ("train.compile", "objective.name", "input_regularizer.name"), f"{text} Change one of them."
    if train.overfitting_guard == "stop" and recipe.objective.name not in ("fgsm_rs", "grad_align", "free"):
        text = f"got stop with objective {recipe.objective.name}, which has no single step to guard; expected warn, the default."
        yield ("train.overfitting_guard", "objective.name"), f"{text} Remove it."
    epochs = f"train.epochs = {train.epochs}"
    if train.swa_start_epoch is not None and train.swa_start_epoch >= train.epochs:
        text = f"got {train.swa_start_epoch}; expected less than {epochs}, or nothing is ever averaged. Lower it."
        yield ("train.swa_start_epoch", "train.epochs"), text
    if train.swa_start_epoch is not None and train.ema_decay is not None:
        text = f"got {train.swa_start_epoch} with train.ema_decay {train.ema_decay:g}; expected one kind of averaging. Remove one."
        yield ("train.swa_start_epoch", "train.ema_decay"), text
    if train.patience is not None and train.patience < recipe.evaluation.every:
        text = f"got {train.patience}; expected at least evaluation.every = {recipe.evaluation.every}. Raise it."
        yield ("train.patience", "evaluation.every"), text
    for section in ("perturbation", "penalty"):
        kind = getattr(recipe, section)
        if isinstance(kind, TimedKind) and kind.start_epoch >= train.epochs:
            text = f"got {kind.start_epoch}; expected less than {epochs}, for the {section} would never act. Lower it."
            yield (f"{section}.start_epoch", "train.epochs"), text
    if isinstance(schedule, PiecewiseSchedule):
        marks, keys = schedule.milestones, ("schedule.milestones", "train.epochs")
        if marks != sorted(set(marks)):
            yield keys[:1], f"got {marks}; expected increasing epochs. Sort them."
        if marks and max(marks) >= train.epochs:
            yield keys, f"got {marks}; expected epochs before {epochs}. Remove the later ones, or train longer."
    if recipe.threat.warmup_epochs > train.epochs:
        text = f"got {recipe.threat.warmup_epochs:g}; expected at most {epochs}. Lower it."
        yield ("threat.warmup_epochs", "train.epochs"), text
    for key in ("warmup_epochs", "peak_epoch"):
        if (getattr(schedule, key, None) or 0) > train.epochs:
            text = f"got {getattr(schedule, key):g}; expected at most {epochs}, or lr is never reached. Lower it."
            yield (f"schedule.{key}", "train.epochs"), text
    if train.batch_size % train.accumulate:
        text = (
            f"got {train.accumulate}; expected a divisor of train.batch_size = {train.batch_size}. Change one of them."
        )
        yield ("train.accumulate", "train.batch_size"), text
