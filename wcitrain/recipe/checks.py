"""Settings of different sections that are fine alone and wrong together: one small function for each pair.

What concerns one method or section alone is in its class.
"""

from collections.abc import Callable, Iterator
from typing import Any

from wcitrain.learning_rate import Piecewise
from wcitrain.method import SettingError, fields_of, fraction_text, show
from wcitrain.optim.refusals import default_layers, refuse_what_does_not_compose
from wcitrain.recipe.fields import RecipeFields

Problem = tuple[tuple[str, ...], str]  # dotted keys, the one to blame first; "got ...; expected ... ."


class ContradictionError(ValueError):
    """Settings of different sections that are fine alone and wrong together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"{keys[0]}: {text}" for keys, text in problems))
        self.problems = problems


# ---- attack ------------------------------------------------------------------------------------------------


def radius_of_an_attack(recipe: RecipeFields) -> Iterator[Problem]:
    """An attack needs a radius, and a radius that grows needs an attack."""
    objective, regularizer = recipe.objective, recipe.input_regularizer
    has_attack = objective.attack_passes() != (0, 0) or objective.attacks_in_backward
    if has_attack and recipe.threat.eps == 0:
        text = f"got 0 with objective {objective}; expected a positive radius."
        yield ("threat.eps", "objective.name"), f"{text} Set it, or objective.name to standard."
    uses_radius = has_attack or (regularizer is not None and regularizer.scaled(0.5) != regularizer)
    if (epochs := recipe.train.eps_warmup_epochs) and not uses_radius:
        text = f"got {epochs:g} with objective {objective}, which attacks nothing; expected 0. Remove it."
        yield ("train.eps_warmup_epochs", "objective.name"), text


def steps_of_an_attack(recipe: RecipeFields) -> Iterator[Problem]:
    """An attack flatters the model when its steps leave the ball at once or do not reach its surface."""
    eps = recipe.threat.eps
    attacks: dict[str, Any] = {"evaluation": recipe.evaluation}
    if "threat" in fields_of(type(recipe.objective)):  # else it has radii of its own
        attacks["objective"] = recipe.objective
    for section, attack in attacks.items():
        step, num_steps = (getattr(attack, key, None) for key in ("step_size", "num_steps"))
        if step is None or eps == 0:
            continue
        keys = (f"{section}.step_size", "threat.eps", f"{section}.num_steps")
        got, radius = f"got {fraction_text(step)}; expected", f"threat.eps = {fraction_text(eps)}"
        if step > 2 * eps:
            hint = f"Did you mean {step:g}/255?" if step >= 1 else "Lower it."
            yield keys, f"{got} at most twice {radius}: a longer step leaves the ball from any point. {hint}"
        # The relative slack is for rounding: 4 * (2/255) may fall short of 8/255 by its last bit.
        if num_steps is not None and step * num_steps < eps * (1 - 1e-9):
            advice = "Take more or longer steps, or set it to null."
            yield keys, f"{got} at least {radius} over num_steps = {num_steps}. {advice}"


def attack_in_the_backward_pass(recipe: RecipeFields) -> Iterator[Problem]:
    """A backward pass that moves the perturbation too must be the only one."""
    objective, perturbation, penalty = recipe.objective, recipe.perturbation, recipe.penalty
    if not objective.attacks_in_backward:
        return
    rules: list[object] = [penalty] if penalty and penalty.estimator else []
    rules += [perturbation] if perturbation and perturbation.combination().here else []
    if rules:
        text = f"got {objective} with {rules[0]}, whose passes would move its image perturbation too;"
        keys = ("objective.name", "penalty.name", "perturbation.name")
        yield keys, f"{text} expected another rule or objective. Change one of them."
    if (parts := recipe.train.accumulate) > 1:
        text = f"got {parts} with {objective}, whose perturbation moves in every pass; expected 1."
        yield ("train.accumulate", "objective.name"), f"{text} Lower train.batch_size instead."


def what_the_objective_does_not_do(recipe: RecipeFields) -> Iterator[Problem]:
    """Only one attack step overfits catastrophically; what differentiates a gradient cannot be compiled."""
    objective, regularizer = recipe.objective, recipe.input_regularizer
    if recipe.train.overfitting_guard == "stop" and not objective.is_single_step:
        text = f"got stop with objective {objective}, which has no single step to guard;"
        yield ("train.overfitting_guard", "objective.name"), f"{text} expected the default, warn. Remove it."
    twice = regularizer or (objective if objective.needs_double_backward else None)
    if recipe.train.compile and twice:
        text = f"got true with {twice}, which differentiates a gradient; expected false. Change one of them."
        yield ("train.compile", "objective.name", "input_regularizer.name"), text


# ---- perturbation and penalty ------------------------------------------------------------------------------


def perturbation_beside_penalty(recipe: RecipeFields) -> Iterator[Problem]:
    """The two must be one objective, on the same layers."""
    try:
        refuse_what_does_not_compose(recipe.perturbation, recipe.penalty)
        if recipe.wrapper.layers is None:
            default_layers(recipe.perturbation, recipe.penalty)
    except SettingError as error:
        key = "wrapper.layers" if error.key == "layers" else f"{error.key}.name"
        yield (key, "perturbation.name", "penalty.name"), error.text


def wrapper_without_a_rule(recipe: RecipeFields) -> Iterator[Problem]:
    """Where a rule acts has no effect without one, nor has the decay of traces that nobody measures."""
    perturbation, penalty = recipe.perturbation, recipe.penalty
    takes_traces = (perturbation and perturbation.measures_traces) or (penalty and penalty.estimator)
    for key, field in fields_of(type(recipe.wrapper)).items():
        value = getattr(recipe.wrapper, key)
        user = takes_traces if key == "trace_decay" else perturbation or penalty
        if value != field.default and not user:
            rule = f"the default, {show(field.default)}. Remove it."
            text = f"got {show(value)} without a rule that uses it; expected {rule}"
            yield (f"wrapper.{key}", "perturbation.name", "penalty.name"), text


# ---- time --------------------------------------------------------------------------------------------------


def starts_before_the_end(recipe: RecipeFields) -> Iterator[Problem]:
    """What begins after the last epoch has no effect, and what ends after it is never complete."""
    epochs, end = recipe.train.epochs, f"train.epochs = {recipe.train.epochs}"
    schedule, rules = recipe.schedule, {"perturbation": recipe.perturbation, "penalty": recipe.penalty}
    starts = {f"{key}.schedule.start": rule.schedule.start for key, rule in rules.items() if rule}
    starts["averaging.start_epoch"] = getattr(recipe.averaging, "start_epoch", 0)
    for key, value in starts.items():
        if value >= epochs:
            text = f"got {value:g}; expected less than {end}, or it never acts. Lower it."
            yield (key, "train.epochs"), text
    if isinstance(schedule, Piecewise) and max(schedule.milestones, default=0) >= epochs:
        text = f"got {list(schedule.milestones)}; expected epochs before {end}."
        yield ("schedule.milestones", "train.epochs"), f"{text} Remove the later ones, or train longer."
    ends = {
        "train.eps_warmup_epochs": recipe.train.eps_warmup_epochs,
        "schedule.warmup_epochs": getattr(schedule, "warmup_epochs", 0),
        "schedule.peak_epoch": getattr(schedule, "peak_epoch", 0),
    }
    for key, value in ends.items():
        if (value or 0) > epochs:
            text = f"got {value:g}; expected at most {end}, or its end is never reached. Lower it."
            yield (key, "train.epochs"), text


def patience_between_measurements(recipe: RecipeFields) -> Iterator[Problem]:
    """Patience that is over before the next measurement stops every run."""
    patience, every = recipe.early_stopping.patience, recipe.evaluation.every
    if patience is not None and patience < every:
        text = f"got {patience}; expected at least evaluation.every = {every}. Raise it."
        yield ("early_stopping.patience", "evaluation.every"), text


def equal_micro_batches(recipe: RecipeFields) -> Iterator[Problem]:
    """A batch is cut into equal parts."""
    size, parts = recipe.train.batch_size, recipe.train.accumulate
    if size % parts:
        text = f"got {parts}; expected a divisor of train.batch_size = {size}. Change one of them."
        yield ("train.accumulate", "train.batch_size"), text


RULES: tuple[Callable[[RecipeFields], Iterator[Problem]], ...] = (
    radius_of_an_attack,
    steps_of_an_attack,
    attack_in_the_backward_pass,
    what_the_objective_does_not_do,
    perturbation_beside_penalty,
    wrapper_without_a_rule,
    starts_before_the_end,
    patience_between_measurements,
    equal_micro_batches,
)


def contradictions(recipe: RecipeFields) -> list[Problem]:
    """Return every set of settings that cannot all be meant."""
    return [problem for rule in RULES for problem in rule(recipe)]
