"""``Recipe``: all settings of a run, and which do not go together; a method's section is the method."""

import re
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from wcitrain.attacks import ThreatModel
from wcitrain.averaging import AVERAGES, Averaging
from wcitrain.data import Augmentation, Data, Extra, LabelNoise, Mixing
from wcitrain.freezing import Freezing
from wcitrain.learning_rate import SCHEDULES, Piecewise, Schedule, TimmSchedule
from wcitrain.method import Choice, Count, Nested, SettingError, Text, fields_of, refuse, setting, show
from wcitrain.objectives import INPUT_REGULARIZERS, OBJECTIVES, PGDAT, InputRegularizer, Objective
from wcitrain.optim import PENALTIES, PERTURBATIONS, Penalty, WeightPerturbation
from wcitrain.optim.base import OPTIMIZERS, SGD, BaseOptimizer, TimmOptimizer
from wcitrain.optim.penalty import layers_for
from wcitrain.recipe import sections
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.recipe.sections import Section


def _check_folder_name(value: str) -> str:
    """Refuse names that are no plain folder name, such as ``a/b`` and ``..``."""
    if not re.fullmatch(r"[\w.-]+", value, re.ASCII) or not value.strip("."):
        raise ValueError("letters, digits, '-', '_' and '.', and not dots alone")
    return value


Regularizer = Annotated[InputRegularizer | None, Choice(INPUT_REGULARIZERS, can_be_none=True)]
Perturbation = Annotated[WeightPerturbation | None, Choice(PERTURBATIONS, can_be_none=True)]
PenaltyOrNone = Annotated[Penalty | None, Choice(PENALTIES, can_be_none=True)]
Optimizer = Annotated[BaseOptimizer, Choice(OPTIMIZERS, fallback=TimmOptimizer)]
Average = Annotated[Averaging | None, Choice(AVERAGES, can_be_none=True)]


class Recipe(Section):
    """All settings of a run. Build one with ``load_recipe`` or ``recipe_from_dict``."""

    name: Annotated[str, AfterValidator(_check_folder_name)] = setting("run", "Name of run and folder.")
    seed: Count = setting(0, "Seed of weights, batches, attacks and probes.")
    output: Text = setting("runs", "Folder that holds the run folders.")
    data: Annotated[Data, Nested()] = setting(Data(), "Which images are read.")
    augment: Annotated[Augmentation, Nested()] = setting(Augmentation(), "Augmentation after crop and flip.")
    mixing: Annotated[Mixing, Nested()] = setting(Mixing(), "How the images of a batch are mixed.")
    extra: Annotated[Extra, Nested()] = setting(Extra(), "Generated or unlabelled training images.")
    label_noise: Annotated[LabelNoise, Nested()] = setting(LabelNoise(), "Random training labels.")
    model: sections.Model = setting(sections.Model, "The timm backbone.")
    threat: Annotated[ThreatModel, Nested()] = setting(ThreatModel(), "What the adversary may do.")
    objective: Annotated[Objective, Choice(OBJECTIVES, without=("threat",))] = setting(
        PGDAT(), "The loss that is minimised."
    )
    input_regularizer: Regularizer = setting(None, "What is asked of the input gradient.")
    perturbation: Perturbation = setting(None, "How weights are moved for the gradient.")
    penalty: PenaltyOrNone = setting(None, "What is added to the loss.")
    wrapper: sections.Wrapper = setting(sections.Wrapper, "Where perturbation and penalty act.")
    optimizer: Optimizer = setting(SGD(), "The base optimizer.")
    schedule: Annotated[Schedule, Choice(SCHEDULES)] = setting(Piecewise(), "The learning rate over time.")
    freezing: Annotated[Freezing, Nested()] = setting(Freezing(), "Which parts train, and from when.")
    averaging: Average = setting(None, "The average of the weights that is evaluated.")
    early_stopping: sections.EarlyStopping = setting(sections.EarlyStopping, "When training ends early.")
    train: sections.Train = setting(sections.Train, "The training loop.")
    evaluation: sections.Evaluation = setting(sections.Evaluation, "What is measured.")
    measures: sections.Measures = setting(sections.Measures, "What else is measured while training.")
    checkpoint: sections.Checkpoint = setting(sections.Checkpoint, "When the run is saved.")
    tracking: sections.Tracking = setting(sections.Tracking, "Where metrics go.")

    @model_validator(mode="after")
    def _complete_and_check(self) -> "Recipe":
        """Give the objective its threat; refuse settings that are fine alone and wrong together."""
        own = getattr(self.objective, "threat", self.threat)
        if own not in (self.threat, type(own)()):
            refuse("objective.threat", f"got {own}; expected the recipe's, {self.threat}. Set threat.")
        if "threat" in fields_of(type(self.objective)):
            self.__dict__["objective"] = replace(self.objective, threat=self.threat)  # type: ignore[type-var]
        _check_sections(self)
        _check_attack(self)
        _check_rules(self)
        _check_times(self)
        _check_effects(self)
        return self

    @property
    def method(self) -> str:
        """The short name of what is trained, for tables and figures: "AT", "TRADES β=6 + AWP γ=0.005", ...

        Plain adversarial training is left out where something else names the method.
        """
        first = str(self.objective)
        if self.threat.norm != "linf" and "threat" in fields_of(type(self.objective)):
            first += f" {self.threat.norm}"
        smoothing = getattr(self.objective, "label_smoothing", 0.0)
        named: list[tuple[object, object]] = [  # what, and whether it is on
            (self.input_regularizer, self.input_regularizer),
            (self.perturbation, self.perturbation),
            (self.penalty, self.penalty and max(self.penalty.strengths) > 0),
            ("eps warm-up", self.train.eps_full_epoch),
            (self.augment, self.augment.policy != "none"),
            (self.mixing, self.mixing.is_active),
            (self.extra, self.extra.path),
            (self.label_noise, self.label_noise.share),
            (f"label smoothing {smoothing:g}", smoothing),
            (self.freezing, self.freezing != Freezing()),
            (self.averaging, self.averaging),
            ("early stopping", self.early_stopping.patience),
        ]
        parts = [str(what) for what, is_on in named if is_on]
        return " + ".join(parts if first == "AT" and parts else [first, *parts])

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default written out; loading the text gives an equal recipe."""
        return to_yaml_text(self.model_dump(mode="json"))


def _check_attack(recipe: Recipe) -> None:
    """An attack flatters the model when its steps leave the ball at once or do not reach its surface."""
    eps, objective = recipe.threat.eps, recipe.objective
    if eps == 0 and (objective.attack_passes() != (0, 0) or objective.attacks_in_backward):
        refuse("threat.eps", f"got 0 with objective {objective}; expected a positive radius. Set it.")
    attacks: dict[str, Any] = {"evaluation": recipe.evaluation}
    if "threat" in fields_of(type(objective)):  # else it has radii of its own
        attacks["objective"] = objective
    for section, attack in attacks.items():
        step, num_steps = (getattr(attack, key, None) for key in ("step_size", "num_steps"))
        if step is None or eps == 0:
            continue
        if step > 2 * eps:
            text = f"got {step:.4g}; expected at most twice the radius of {recipe.threat}. Shorten it."
            refuse(f"{section}.step_size", text)
        # The relative slack is for rounding: 4 * (2/255) may fall short of 8/255 by its last bit. In l1 ten
        # steps of eps / 4 leave twice as many right as ten of eps, and twenty no more.
        times = min(num_steps or 1, 5) if recipe.threat.norm == "l1" else 1
        if num_steps is not None and step * num_steps < times * eps * (1 - 1e-9):
            radius = "the radius" if times == 1 else f"{times} times the radius"
            rule = f"{radius} of {recipe.threat} within num_steps = {num_steps}. Set it to null."
            refuse(f"{section}.step_size", f"got {step:.4g}; expected to reach {rule}")


def _check_sections(recipe: Recipe) -> None:
    """Half a normalisation would leave the other half to timm; two measures of a kind have one metric."""
    mean, std = recipe.model.mean, recipe.model.std
    if (mean is None) != (std is None):
        missing, given = ("mean", "std") if mean is None else ("std", "mean")
        refuse(f"model.{missing}", f"got null; expected a list like model.{given}. Set both or none.")
    if recipe.model.pretrained and recipe.model.checkpoint_path:
        refuse(
            "model.pretrained", "got true with checkpoint_path; expected one source of weights. Remove one."
        )
    for key, of in {"in_chans": "data.channels", "num_classes": "data.num_classes or the data"}.items():
        if key in recipe.model.kwargs:
            text = f"got {recipe.model.kwargs[key]}; expected none, as {of} says it. Set that instead."
            refuse(f"model.kwargs.{key}", text)
    if recipe.augment.crop_scale and recipe.data.crop_padding:
        refuse("data.crop_padding", "got it beside augment.crop_scale; expected one crop. Remove one.")
    names = [Choice(sections.WHILE_TRAINING).name_of(measure) for measure in recipe.measures.take]
    if twice := next((name for name in names if names.count(name) > 1), None):
        refuse("measures.take", f"got {twice} twice; expected each measure once. Remove one of the two.")


def _check_rules(recipe: Recipe) -> None:
    """Perturbation and penalty must be one objective, and a backward pass that attacks the only one."""
    objective, perturbation, penalty = recipe.objective, recipe.perturbation, recipe.penalty
    try:
        layers_for(perturbation, penalty, recipe.wrapper.layers)
    except SettingError as error:
        refuse("wrapper.layers" if error.key == "layers" else error.key, error.text)
    twice = recipe.input_regularizer or (objective if objective.needs_double_backward else None)
    if recipe.train.compile and twice:
        text = f"got true with {twice}, which differentiates a gradient; expected false. Change one of them."
        refuse("train.compile", text)
    if recipe.train.compile and recipe.train.gradient_checkpointing:
        refuse("train.gradient_checkpointing", "got true with compile, which recomputes; expected false.")
    size, parts = recipe.train.batch_size, recipe.train.accumulate
    if size % parts:
        text = f"got {parts}; expected a divisor of train.batch_size = {size}. Change one of them."
        refuse("train.accumulate", text)
    if not objective.attacks_in_backward:
        return
    has_passes = (penalty and penalty.estimator) or (perturbation and perturbation.combination().here)
    if has_passes:
        text = f"got {objective} with a rule whose passes would move its image perturbation too;"
        refuse("objective.name", f"{text} expected another rule or objective. Change one of them.")
    if parts > 1:
        text = f"got {parts} with {objective}, whose perturbation moves in every pass; expected 1."
        refuse("train.accumulate", f"{text} Lower train.batch_size instead.")


def _check_times(recipe: Recipe) -> None:
    """What begins after the last epoch never acts, and what ends after it is never complete."""
    epochs, schedule = recipe.train.epochs, recipe.schedule
    rules = {"perturbation": recipe.perturbation, "penalty": recipe.penalty}
    starts = {f"{key}.schedule.start": rule.schedule.start for key, rule in rules.items() if rule}
    starts["averaging.start_epoch"] = getattr(recipe.averaging, "start_epoch", 0)
    starts["schedule.milestones"] = max(getattr(schedule, "milestones", ()), default=0)
    starts["freezing.head_epochs"] = recipe.freezing.head_epochs
    starts["train.eps_zero_epochs"] = recipe.train.eps_zero_epochs
    ends = {"train.eps_warmup_epochs, with eps_zero_epochs": recipe.train.eps_full_epoch}
    ends["schedule.warmup_epochs"] = getattr(schedule, "warmup_epochs", 0)
    ends["schedule.peak_epoch"] = getattr(schedule, "peak_epoch", None) or 0
    for key, value in (starts | ends).items():
        if value >= epochs if key in starts else value > epochs:
            rule = "less than" if key in starts else "at most"
            refuse(key, f"got {value:g}; expected {rule} train.epochs = {epochs}. Lower it, or train longer.")
    if isinstance(schedule, TimmSchedule):
        try:
            schedule.check(epochs)
        except SettingError as error:
            refuse(f"schedule.{error.key}", error.text)


def _check_effects(recipe: Recipe) -> None:
    """A setting without effect stops the run: whoever set it expects one."""
    objective, regularizer, rule = recipe.objective, recipe.input_regularizer, recipe.perturbation
    has_attack = objective.attack_passes() != (0, 0) or objective.attacks_in_backward
    has_radius = has_attack or (regularizer is not None and regularizer.scaled(0.5) != regularizer)
    takes_traces = (rule and rule.measures_traces) or (recipe.penalty and recipe.penalty.estimator)
    has_rule, decay = rule or recipe.penalty, sections.Wrapper().trace_decay
    settings: list[tuple[str, object, object, object, str]] = [  # key, value, default, is it used, by what
        ("train.eps_zero_epochs", recipe.train.eps_zero_epochs, 0, has_radius, "an attack"),
        ("train.eps_warmup_epochs", recipe.train.eps_warmup_epochs, 0, has_radius, "an attack"),
        ("wrapper.layers", recipe.wrapper.layers, None, has_rule, "a perturbation or penalty"),
        ("wrapper.split_qkv", recipe.wrapper.split_qkv, False, has_rule, "a perturbation or penalty"),
        ("wrapper.trace_decay", recipe.wrapper.trace_decay, decay, takes_traces, "a rule that takes traces"),
        ("perturbation.attack_at", getattr(rule, "attack_at", None), None, has_attack, "an attack"),
    ]
    if recipe.train.overfitting_guard == "stop":
        one = "an objective of a single step"
        settings.append(("train.overfitting_guard", "stop", "warn", objective.is_single_step, one))
    for key, value, default, is_used, by in settings:
        if value != default and not is_used:
            refuse(key, f"got {show(value)}, which nothing uses; expected {by} beside it. Remove it.")
    patience, every = recipe.early_stopping.patience, recipe.evaluation.every
    if patience is not None and patience < every:
        text = f"got {patience}, over before the next measurement; expected at least {every}. Raise it."
        refuse("early_stopping.patience", text)
