"""What later commands left in a run folder: evaluations, measures and pictures.

Their files are read with forbearance: a key that is absent leaves a gap, a file that is no JSON object is
left out with a warning. Nothing is measured here.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.attacks import ThreatModel
from wcitrain.report.runs import Run, number


@dataclass(frozen=True)
class Accuracy:
    """One accuracy of an evaluation: the share right under an attack and its 95 % interval; NaN: unknown."""

    where: str  # epoch, split and images, "last test, 100 examples"; the seed where it is not 0
    digest: str  # of the images; empty where unknown
    norm: str  # empty where nothing is attacked
    eps: float  # NaN where nothing is attacked
    attack: str  # "pgd-20", "clean", "worst case", "corruption fog"
    value: float
    low: float
    high: float

    @property
    def name(self) -> str:
        """Threat and attack in words: "linf 8/255, pgd-20"."""
        return f"{_threat_text(self.norm, self.eps)}, {self.attack}" if self.norm else self.attack


@dataclass(frozen=True)
class Measured:
    """One measure of a measure file; ``settings`` says how it was taken."""

    name: str
    value: float
    stderr: float
    where: str  # epoch and split
    settings: str


def accuracies(run: Run) -> list[Accuracy]:
    """Return the accuracies in ``evaluations/*.json``: clean, each attack, the worst case, corruptions.

    A corruption's accuracy is its mean over the severities.
    """
    return [
        found for _, document in _documents(run.folder / "evaluations") for found in _accuracies(document)
    ]


def findings(run: Run) -> list[str]:
    """Return what the checks of the evaluations found about the model under attack: "warning, name: text"."""
    entries = [
        entry
        for _, document in _documents(run.folder / "evaluations")
        for entry in _entries(document, "findings")
    ]
    texts = (f"{e.get('severity', 'note')}, {e.get('name', 'unnamed')}: {e.get('text', '')}" for e in entries)
    return list(dict.fromkeys(texts))


def _accuracies(document: Mapping[str, Any]) -> Iterator[Accuracy]:
    where = _joined(
        _where(document), *_images(document, document), *_seed(number(document, "settings", "seed"))
    )
    digest = str(document.get("digest") or "")

    def accuracy(entry: Any, attack: str) -> Accuracy:
        threat = entry.get("threat")
        norm = str(threat.get("norm", "")) if isinstance(threat, dict) else ""
        low, high = number(entry, "interval", 0), number(entry, "interval", 1)
        return Accuracy(
            where, digest, norm, number(threat, "eps"), attack, number(entry, "accuracy"), low, high
        )

    if isinstance(document.get("clean"), dict):
        yield accuracy(document["clean"], "clean")
    attacked = _entries(document, "attacks")
    for entry in attacked:
        yield accuracy(entry, str(entry.get("attack", "attack")))
    for entry in _entries(document, "worst_case"):
        if sum(other.get("threat") == entry.get("threat") for other in attacked) > 1:
            yield accuracy(entry, "worst case")
    corruptions = document.get("corruptions")
    for name, shares in corruptions.items() if isinstance(corruptions, dict) else ():
        known = [number(shares, severity) for severity in shares] if isinstance(shares, dict) else []
        if known:
            yield accuracy({"accuracy": sum(known) / len(known)}, f"corruption {name}")
    if math.isfinite(number(document, "corrupted_accuracy")):
        yield accuracy({"accuracy": document["corrupted_accuracy"]}, "corruptions, mean")


def _entries(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the mappings in a list of the document; none where there is no list."""
    entries = document.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _where(document: Mapping[str, Any]) -> str:
    return " ".join(str(document[key]) for key in ("at", "split") if isinstance(document.get(key), str))


def _threat_text(norm: str, eps: float) -> str:
    try:
        return str(ThreatModel(norm, eps))  # type: ignore[arg-type]
    except ValueError:  # a norm that this version does not know
        return f"{norm} {eps:g}"


def measures(run: Run) -> list[Measured]:
    """Return the numbers in ``measures/*.json``: of ``wci`` files, and of files with ``measures``."""
    found = []
    for path, document in _documents(run.folder / "measures"):
        where = _where(document)
        if isinstance(document.get("measures"), dict):
            for name, entry in document["measures"].items():
                entry = entry if isinstance(entry, dict) else {"value": entry}
                settings = _protocol(_settings_text(entry.get("settings", "")), entry, document)
                found.append(
                    Measured(str(name), number(entry, "value"), number(entry, "stderr"), where, settings)
                )
        if "wci" in document:
            about = _joined(document.get("estimator"), document.get("loss"), _layers_text(document))
            settings = _protocol(about, document, document)
            found.append(
                Measured("wci", number(document, "wci"), number(document, "wci_stderr"), where, settings)
            )
        if "wci" not in document and not isinstance(document.get("measures"), dict):
            warnings.warn(f"{path}: got neither a WCI nor measures; left out of the report", stacklevel=2)
    return found


def _layers_text(document: Mapping[str, Any]) -> str:
    layers = document.get("layers_counted", "weights")
    return _joined(
        f"layers {layers}" if layers != "weights" else "", "split qkv" if document.get("split_qkv") else ""
    )


def _protocol(settings: str, entry: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the settings and what else changes a measure: threat, number of images, seed."""
    images, threat = _images(entry, document), document.get("threat")
    if isinstance(threat, dict):
        threat = _threat_text(str(threat.get("norm", "")), number(threat, "eps"))
    named = [threat] if images and isinstance(threat, str) and threat not in settings else []
    return _joined(settings, *named, *images, *_seed(number(document, "seed")))


def _images(entry: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    error, num = number(document, "target_relative_error"), number({**document, **entry}, "num_examples")
    if math.isfinite(error):  # as many as it took
        return [f"to a relative error of {error:g}"]
    return [f"{num:.0f} examples"] if math.isfinite(num) else []


def _seed(seed: float) -> list[str]:
    return [f"seed {seed:.0f}"] if math.isfinite(seed) and seed else []


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _settings_text(settings: Any) -> str:
    if isinstance(settings, dict):
        return ", ".join(f"{key} {value}" for key, value in settings.items())
    return str(settings)


def pictures(run: Run, ours: frozenset[str]) -> list[Path]:
    """Return the landscapes and the figures of a run, without the report's own ``ours``."""
    folders = (run.folder / name for name in ("landscapes", "figures"))
    return [path for folder in folders for path in sorted(folder.glob("*.png")) if path.name not in ours]


def _documents(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the JSON objects in a folder, in the order of their names."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text("utf-8"))
        except ValueError as error:  # includes json.JSONDecodeError and UnicodeDecodeError
            warnings.warn(f"{path}: got no JSON ({error}); left out of the report", stacklevel=3)
            continue
        if isinstance(document, dict):
            documents.append((path, document))
    return documents
