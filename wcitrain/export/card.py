"""The model card and the RobustBench-style entry: what was measured of a run's weights, and what was not."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.results import percent
from wcitrain.method import fraction_text
from wcitrain.recipe import Recipe
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.report import load_run, results_table
from wcitrain.report.runs import differing_settings
from wcitrain.text import with_error

HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "svhn": "ufldl-stanford/svhn"}
PLACES = ("root", "num_workers", "in_memory", "download")  # where and how images are read, not which
TRAINING = "training run"


@dataclass
class Facts:
    """What a run's summary, evaluations and measures say of its weights after one epoch.

    Left out: results on other data or splits, and those of another epoch, such as of an unfinished run.
    """

    run: Path
    recipe: Recipe
    metadata: Mapping[str, str]  # of the exported weights
    at: str
    summary: Mapping[str, Any] = field(default_factory=dict)  # empty before the run has one
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # threat, attack, share, interval, N, where
    findings: list[str] = field(default_factory=list)
    index: dict[int, list[str]] = field(default_factory=dict)  # by epoch: before training and now

    def __post_init__(self) -> None:
        if (self.run / "summary.json").is_file():
            self.summary = files.read_json(self.run / "summary.json")
        self.epoch = int(self.metadata["epoch"])
        self.index = {0: [], self.epoch: []}
        ends = [self.summary.get(name) or {} for name in ("last", "best")]
        entry: dict[str, Any] = next((one for one in ends if one.get("epoch") == self.epoch), {})
        if test := entry.get("test"):
            attack = self.summary["attack"].replace(f" {self.recipe.threat}", "", 1)
            for threat, name, kind in ((None, "clean", "clean"), (self.recipe.threat, attack, "robust")):
                numbers = test[f"{kind}_accuracy"], test[f"{kind}_accuracy_interval"], test["num_examples"]
                self.rows.append((threat, name, *numbers, TRAINING))
        if entry.get("wci") is not None:
            num = entry["train"]["num_examples"]
            self._add_index(self.epoch, entry["wci"], entry["wci_stderr"], f"{num} train images, {TRAINING}")
        data = self.recipe.model_dump(mode="json")["data"]
        for path in [*sorted(self.run.glob("evaluations/*.json")), *sorted(self.run.glob("measures/*.json"))]:
            document = files.read_json(path)
            try:
                same = [data[k] == v for k, v in document["data"].items() if k in data and k not in PLACES]
                if all(same):
                    (self._add_evaluation if "attacks" in document else self._add_measures)(document)
            except (KeyError, TypeError) as error:
                rule = "what this version writes. Move it out of the run."
                raise ValueError(f"{path}: got a file without {error}; expected {rule}") from error

    def _add_index(self, epoch: int, value: float, error: float | None, what: str) -> None:
        number = f"{value:.4g}" if error is None else with_error(value, error)
        self.index[epoch].append(f"{number} ({what})")

    def _add_measures(self, document: Mapping[str, Any]) -> None:
        one = document["measures"].get("wci") or {}
        if one.get("value") is not None and document["epoch"] in self.index:
            what = f"{one['num_examples']} {document['split']} images, {one['settings']}"
            self._add_index(document["epoch"], one["value"], one["stderr"], what)

    def _add_evaluation(self, document: Mapping[str, Any]) -> None:
        # Evaluations of before have no epoch; null is that of a run that was not finished.
        is_own = document["epoch"] == self.epoch if "epoch" in document else document["at"] == self.at
        if not is_own or document["split"] != "test":
            return
        settings, attacked = document["settings"], [one["threat"] for one in document["attacks"]]
        keys = [key for key in ("eot", "bpda", "pyautoattack", "seed") if settings.get(key)]
        source = ", ".join(["evaluation", *(f"{key} {settings[key]}" for key in keys)])
        worst = [one | {"attack": "worst case"} for one in document["worst_case"]]
        worst = [one for one in worst if attacked.count(one["threat"]) > 1]
        for one in [document["clean"] | {"attack": "clean"}, *document["attacks"], *worst]:
            threat = ThreatModel(**one["threat"]) if "threat" in one else None
            numbers = one["accuracy"], one["interval"], document["num_examples"]
            self.rows.append((threat, one["attack"], *numbers, source))
        told = [f"{one['severity']}: {one['name']}: {one['text']}" for one in document["findings"]]
        if document["corrupted_accuracy"] is not None:
            told.append(f"mean accuracy on corruptions: {percent(document['corrupted_accuracy'])} %")
        self.findings += [text for text in [*document["notes"], *told] if text not in self.findings]

    def limits(self) -> list[str]:
        """Return what was not measured."""
        threats = list(dict.fromkeys(str(row[0]) for row in self.rows if row[0]))
        has_autoattack = any(row[1].startswith("autoattack") for row in self.rows)
        limits = {
            "Accuracies on test images: not measured at this epoch.": not self.rows,
            "AutoAttack: not measured. Every robust accuracy here is an upper bound.": not has_autoattack,
            "Whether gradients are masked: not checked.": all(row[-1] == TRAINING for row in self.rows),
            "The index after training: not measured.": not self.index[self.epoch],
            "The index before training: not measured.": not self.index[0],
            f"Perturbations other than {', '.join(threats)}: not measured.": bool(threats),
            "Corrupted images: not measured.": not any("corruptions:" in text for text in self.findings),
        }
        return [text for text, is_so in limits.items() if is_so]


def robustbench(facts: Facts) -> dict[str, Any]:
    """Return an entry in the form of RobustBench's ``model_info``; what is not measured or known is None.

    Accuracies are those of all test images; ``autoattack_acc`` of the standard version alone, and
    ``reported`` the lowest of all attacks within the recipe's threat; ``unreliable``: checks found something.
    """
    recipe, model = facts.recipe, facts.recipe.model
    num = next((row[4] for row in facts.rows if row[-1] == TRAINING and recipe.data.max_test is None), None)
    shares = [(threat, attack, share) for threat, attack, share, _, n, _ in facts.rows if n == num]
    robust = [share for threat, _, share in shares if threat == recipe.threat]
    standard = [share for t, attack, share in shares if (t, attack) == (recipe.threat, "autoattack")]

    def lowest(values: list[float]) -> str | None:
        return f"{100 * min(values):.2f}" if values else None

    return {
        "link": None,
        "name": facts.metadata["method"],
        "authors": None,
        "additional_data": bool(recipe.extra.path or model.pretrained or model.checkpoint_path),
        "number_forward_passes": 1,
        "dataset": recipe.data.name or recipe.data.source,
        "venue": None,
        "architecture": model.name + " (cifar stem)" * (model.stem == "cifar"),
        "eps": str(fraction_text(recipe.threat.eps)),
        "clean_acc": lowest([share for threat, _, share in shares if threat is None]),
        "reported": lowest(robust),
        "autoattack_acc": lowest(standard),
        "unreliable": any(text.startswith("warning") for text in facts.findings) if standard else None,
    }


def write_card(
    facts: Facts,
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    license: str | None,
    programs: list[str],
) -> str:
    """Return the text of ``README.md``: front matter for the hub, and the card of ``card.md.j2``.

    ``config`` is the content of ``config.json``, ``origin`` timm's configuration of pretrained weights.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    recipe = facts.recipe
    front = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": license,
        "tags": ["image-classification", "timm", "adversarial-robustness", "wcitrain"],
        "datasets": [HUB_NAMES[recipe.data.source]] if recipe.data.source in HUB_NAMES else None,
        "base_model": origin.get("hf_hub_id") if recipe.model.pretrained else None,
    }
    options: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    return page.get_template("card.md.j2").render(
        front=yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False),
        facts=facts,
        percent=percent,
        entry=robustbench(facts),
        config=config,
        origin=origin,
        license=license,
        programs=programs,
        siblings=_siblings(facts),
        recipe=to_yaml_text(_without_places(recipe.model_dump(mode="json"))),
        version=version("wcitrain"),
    )


def _siblings(facts: Facts) -> str:
    """Return the table over the run's seeds, where runs beside it differ in nothing else."""
    group, runs = facts.summary.get("group"), []
    for path in sorted(facts.run.resolve().parent.glob(f"{group}-s*/summary.json")):
        with suppress(ValueError):  # a damaged neighbour is no reason to stop
            runs.append(load_run(path.parent))
    runs = [run for run in runs if run.is_finished and run.group == group]
    return "" if len(runs) < 2 or differing_settings(runs) else results_table(runs)


def _without_places(settings: Any) -> Any:
    """Return settings in which a path of this machine is its last part."""
    if isinstance(settings, dict):
        return {key: _without_places(value) for key, value in settings.items()}
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings
