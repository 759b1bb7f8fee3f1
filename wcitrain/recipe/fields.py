"""The keys of a recipe, section by section; a method's section is the method: ``recipe.perturbation``."""

import re
from typing import Annotated

from pydantic import AfterValidator

from wcitrain.attacks import ThreatModel
from wcitrain.averaging import AVERAGES, Averaging
from wcitrain.data import Augmentation, Data, Extra, LabelNoise, Mixing
from wcitrain.learning_rate import SCHEDULES, Piecewise, Schedule
from wcitrain.method import Choice, Count, Nested, Text, fields_of, setting
from wcitrain.objectives import INPUT_REGULARIZERS, OBJECTIVES, PGDAT, InputRegularizer, Objective
from wcitrain.optim import PENALTIES, PERTURBATIONS, Penalty, WeightPerturbation
from wcitrain.optim.base import OPTIMIZERS, SGD, BaseOptimizer, TimmOptimizer
from wcitrain.recipe import sections
from wcitrain.recipe.sections import Section
from wcitrain.stopping import EarlyStopping


def _check_folder_name(value: str) -> str:
    """Refuse names that are no plain folder name, such as ``a/b`` and ``..``."""
    if not re.fullmatch(r"[\w.-]+", value, re.ASCII) or not value.strip("."):
        raise ValueError("letters, digits, '-', '_' and '.', and not dots alone. It names a folder")
    return value


Regularizer = Annotated[InputRegularizer | None, Choice(INPUT_REGULARIZERS, can_be_none=True)]
Perturbation = Annotated[WeightPerturbation | None, Choice(PERTURBATIONS, can_be_none=True)]
PenaltyOrNone = Annotated[Penalty | None, Choice(PENALTIES, can_be_none=True)]
Optimizer = Annotated[BaseOptimizer, Choice(OPTIMIZERS, fallback=TimmOptimizer)]
Average = Annotated[Averaging | None, Choice(AVERAGES, can_be_none=True)]
Stopping = Annotated[EarlyStopping, Nested()]


class RecipeFields(Section):
    """All settings of a run, each checked by itself."""

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
    averaging: Average = setting(None, "The average of the weights that is evaluated.")
    early_stopping: Stopping = setting(EarlyStopping(), "When training ends before its last epoch.")
    train: sections.Train = setting(sections.Train, "The training loop.")
    evaluation: sections.Evaluation = setting(sections.Evaluation, "What is measured.")
    measures: sections.Measures = setting(sections.Measures, "What else is measured while training.")
    checkpoint: sections.Checkpoint = setting(sections.Checkpoint, "When the run is saved.")
    tracking: sections.Tracking = setting(sections.Tracking, "Where metrics go.")

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
            (self.penalty, self.penalty and self.penalty.is_active),
            ("eps warm-up", self.train.eps_warmup_epochs),
            (self.augment, self.augment.is_active),
            (self.mixing, self.mixing.is_active),
            (self.extra, self.extra.path),
            (self.label_noise, self.label_noise.share),
            (f"label smoothing {smoothing:g}", smoothing),
            (self.averaging, self.averaging),
            (self.early_stopping, self.early_stopping.patience),
        ]
        parts = [str(what) for what, is_on in named if is_on]
        return " + ".join(parts if first == "AT" and parts else [first, *parts])
