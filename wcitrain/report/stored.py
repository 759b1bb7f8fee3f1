"""What other commands left in a run folder: evaluations and measures; nothing is measured here.

A file that is damaged, or of another version, is left out with a warning.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from wcitrain.attacks import ThreatModel
from wcitrain.report.runs import Row, Run, number

T = TypeVar("T")


class Accuracy(NamedTuple):
    """The share right under an attack and its 95 % interval; NaN: unknown."""

    value: float
    low: float
    high: float


# By row and protocol: of each run its accuracies by threat and attack, such as "linf 8/255, pgd-20".
Evaluations = dict[tuple[int, str], list[dict[str, Accuracy]]]


def evaluations(rows: Sequence[Row]) -> Evaluations:
    """Return one accuracy a run and name; those of other images or another seed stand apart.

    Where several files of a run hold the same attack or worst case, the least counts: each is an upper bound.
    """
    taken = [
        (i, place, *entry)
        for i, row in enumerate(rows)
        for place, run in enumerate(row.runs)
        for entry in _parts(run.folder / "evaluations", _accuracies)
    ]
    digests: dict[str, set[str]] = {}
    for _, _, where, digest, *_ in taken:
        digests.setdefault(where, set()).add(digest)
    result: dict[tuple[int, str], dict[int, dict[str, Accuracy]]] = {}
    for i, place, where, digest, name, accuracy in taken:
        protocol = where + f", images {digest[:6]}" * (len(digests[where]) > 1)
        entries = result.setdefault((i, protocol), {}).setdefault(place, {})
        known = [one for one in (entries.get(name), accuracy) if one and math.isfinite(one.value)]
        entries[name] = min(known, key=lambda one: one.value, default=accuracy)
    return {key: list(per_run.values()) for key, per_run in result.items()}


def _accuracies(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Accuracy]]:
    """Give protocol, digest of the images, name and accuracy of all that an evaluation holds."""
    seed = document["settings"].get("seed")
    where = f"{document['at']} {document['split']}, {document['num_examples']} examples{_seed(seed)}"
    entries = [("clean", document["clean"])]
    attacked = document["attacks"]
    entries += [(f"{_threat(entry)}, {entry['attack']}", entry) for entry in attacked]
    for entry in document["worst_case"]:
        if sum(other["threat"] == entry["threat"] for other in attacked) > 1:
            entries.append((f"{_threat(entry)}, worst case", entry))
    for name, shares in document["corruptions"].items():
        entries.append((f"corruption {name}", {"accuracy": sum(shares.values()) / len(shares)}))
    if document["corrupted_accuracy"] is not None:
        entries.append(("corruptions, mean", {"accuracy": document["corrupted_accuracy"]}))
    for name, entry in entries:
        ends = (number(entry, "interval", i) for i in (0, 1))
        yield where, document["digest"], name, Accuracy(number(entry, "accuracy"), *ends)


def checks(run: Run) -> list[str]:
    """Return what the evaluations' checks of the model under attack say: "warning, name: text"."""
    return list(dict.fromkeys(_parts(run.folder / "evaluations", _findings)))


def _findings(document: Mapping[str, Any]) -> Iterator[str]:
    for one in document["findings"]:
        yield f"{one['severity']}, {one['name']}: {one['text']}"


def measures(run: Run) -> list[tuple[str, str, float, float]]:
    """Return name, protocol, value and standard error of the numbers in ``measures/*.json``."""
    return _parts(run.folder / "measures", _measures)


def _measures(document: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    threat, entries, target = document["threat"], document.get("measures"), None
    if entries is None:  # the index of a model in detail
        counted, target = document["layers_counted"], document.get("target_relative_error")
        taken = [document["estimator"], document["loss"]]
        taken += [f"layers {counted}"] * (counted != "weights") + ["split qkv"] * document["split_qkv"]
        one = {"value": document["wci"], "stderr": document["wci_stderr"], "settings": ", ".join(taken)}
        entries, threat = {"wci": document | one}, threat and _threat(document)
    for name, entry in entries.items():
        # The residual of an eigenvalue is a result, different in every run.
        settings = re.sub(r"(^|, )residual [-+.\de]+", "", entry["settings"]).removeprefix(", ")
        num = entry["num_examples"]
        parts = [f"{document['at']} {document['split']}", settings]
        parts += [threat] if num and threat and threat not in settings else []
        parts += [f"to a relative error of {target:g}" if target else f"{num} examples"] if num else []
        protocol = ", ".join(filter(None, parts)) + _seed(document["seed"])
        yield name, protocol, number(entry, "value"), number(entry, "stderr")


def _seed(seed: int | None) -> str:
    return f", seed {seed}" if seed else ""


def _threat(entry: Mapping[str, Any]) -> str:
    return str(ThreatModel(**entry["threat"]))


def _parts(folder: Path, read: Callable[[dict[str, Any]], Iterator[T]]) -> list[T]:
    """Return what ``read`` finds in the JSON files of a folder, in the order of their names."""
    parts: list[T] = []
    for path in sorted(folder.glob("*.json")):
        try:
            parts += read(json.loads(path.read_text("utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{path}: got {error!r}; expected what this version writes. It is left out of the report."
            warnings.warn(text, stacklevel=3)
    return parts
