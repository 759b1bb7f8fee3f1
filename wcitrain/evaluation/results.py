"""``Evaluation``: who survived what, example by example; its tables and file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.intervals import bootstrap_interval, wilson_interval
from wcitrain.evaluation.minimal import MINIMAL, MinimalEps, minimal_cells
from wcitrain.text import aligned

CLEAN, WORST = "clean", "worst case"
THIS_MODEL = " (this model)"  # behind the name of a transfer from a model to itself


@dataclass(frozen=True)
class Finding:
    """What a check found and what to do; ``"error"``: numbers mean nothing, ``"warning"``: may mislead."""

    name: str
    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack did within one threat model."""

    threat: ThreatModel
    attack: str  # see ``parse_attack``
    is_robust: Tensor  # truth values [N]: right without an attack and after every restart or part of it
    losses: Tensor  # cross-entropies [N] of all after a gradient attack's first restart (AutoAttack: NaN)
    after: Mapping[str, float] = field(default_factory=dict)  # robust accuracy after each restart or part
    furthest: float = 0.0  # longest perturbation that fooled the model, in the threat's norm
    fell_in: Tensor | None = None  # [N] 0: wrong at once, k: broken in the k-th of ``after``, -1: robust
    images: Tensor | None = None  # [N, *dims], where they were asked for: see ``AttackState``; not in files

    @property
    def is_on_cross_entropy(self) -> bool:
        """Whether it raises the loss in ``losses``, which are not its maximum after an attack on another."""
        return self.attack.startswith(("pgd-", "fgsm"))

    @property
    def is_transferred(self) -> bool:
        """Whether the images were made on another model."""
        return self.attack.startswith("transfer ")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model on N examples, clean, under attacks and corrupted."""

    labels: Tensor  # classes [N]
    is_clean: Tensor  # truth values [N]: right without an attack
    clean_losses: Tensor  # cross-entropies [N] without an attack
    attacks: tuple[AttackResult, ...] = ()  # one for each threat and attack, threats outside
    corrupted: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)  # [N] by name and severity
    digest: str = ""  # of images and labels; equal for the same examples in the same order
    settings: Mapping[str, Any] = field(default_factory=dict)  # seed, batch size, versions
    findings: tuple[Finding, ...] = ()
    index: Tensor | None = None  # places [N] of the examples in their split; None: the first N
    minimal: tuple[MinimalEps, ...] = ()  # smallest radii, where they were asked for

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def threats(self) -> tuple[ThreatModel, ...]:
        """The threat models, in order."""
        return tuple(dict.fromkeys(result.threat for result in self.attacks))

    @property
    def clean_accuracy(self) -> float:
        """Share of examples the model is right on."""
        return mean(self.is_clean)

    def result(self, threat: ThreatModel, attack: str) -> AttackResult:
        """Return one attack's result; KeyError where there is none."""
        return {(result.threat, result.attack): result for result in self.attacks}[threat, attack]

    def worst(self, *threats: ThreatModel) -> Tensor:
        """Return truth values [N]: robust to every attack within each of ``threats`` (by default all)."""
        flags = [r.is_robust for r in self.attacks if not threats or r.threat in threats]
        return torch.stack([self.is_clean, *flags]).all(0)

    def robust_accuracy(self, *threats: ThreatModel) -> float:
        """Return the share that survives every attack within each of ``threats`` (by default all)."""
        return mean(self.worst(*threats))

    def fell_to(self, threat: ThreatModel) -> Tensor:
        """Return the first attack each fell to [N]: k-th within ``threat``, 0: wrong at once, -1: none."""
        flags = torch.stack([self.is_clean, *(r.is_robust for r in self.attacks if r.threat == threat)])
        return torch.where(flags.all(0), -1, flags.int().argmin(0))

    def falls(self, threat: ThreatModel) -> list[tuple[int, int, int]]:
        """Return for every attack within ``threat`` how many it broke, it first, and it alone."""
        robust = torch.stack([r.is_robust for r in self.attacks if r.threat == threat])
        broken, first = ~robust & self.is_clean, self.fell_to(threat)
        alone = broken & (broken.sum(0) == 1)
        counts = zip(broken.sum(1).tolist(), alone.sum(1).tolist(), strict=True)
        return [(num, int((first == k).sum()), only) for k, (num, only) in enumerate(counts, 1)]

    def corrupted_accuracy(self) -> float:
        """Mean accuracy over corruptions and severities; NaN without any."""
        shares = [mean(flags) for flags in self.corrupted.values()]
        return float(np.mean(shares)) if shares else math.nan

    def table(self) -> str:
        """Return accuracies in %, losses, Wilson and bootstrap 95 % intervals, a row an attack; findings.

        Where a threat met several attacks also how many examples each broke, it first, and it alone.
        """
        has_restarts = any(len(r.after) > 1 for r in self.attacks if r.is_on_cross_entropy)
        loss = "CE, first restart" if has_restarts else "CE"
        has_falls = len(self.attacks) > len(self.threats)
        none = ("", "", "") if has_falls else ()
        falls = ("broken", "first", "alone") if has_falls else ()
        rows = [("threat", "attack", "accuracy %", "95 % interval", *falls, loss, "95 % interval")]
        rows.append(("", CLEAN, *_cells(self.is_clean, none, self.clean_losses)))
        for threat in self.threats:
            results = [r for r in self.attacks if r.threat == threat]
            for r, counts in zip(results, self.falls(threat), strict=True):
                losses = r.losses if r.is_on_cross_entropy else None
                cells = tuple(map(str, counts)) if has_falls else ()
                rows.append((str(threat), r.attack, *_cells(r.is_robust, cells, losses)))
            if len(results) > 1:
                rows.append((str(threat), WORST, *_cells(self.worst(threat), none)))
        if len(self.threats) > 1:
            rows.append(("all threats", WORST, *_cells(self.worst(), none)))
        smallest = [MINIMAL, *(minimal_cells(one.as_dict()) for one in self.minimal)]
        told = "\n".join(f"{finding.severity}: {finding}" for finding in self.findings)
        corrupted = self._corruption_table() if self.corrupted else ""
        parts = by_threat(rows), aligned(smallest) if self.minimal else "", corrupted, told
        return "\n\n".join(filter(None, parts))

    def _corruption_table(self) -> str:
        severities = sorted({severity for _, severity in self.corrupted})
        rows = [("corruption", *(f"severity {severity}" for severity in severities), "mean")]
        for name in dict.fromkeys(name for name, _ in self.corrupted):
            shares = [mean(self.corrupted[name, severity]) for severity in severities]
            rows.append((name, *map(percent, [*shares, float(np.mean(shares))])))
        rows.append(("mean", *[""] * len(severities), percent(self.corrupted_accuracy())))
        return aligned(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the flags; a number that is not finite becomes None."""
        attacks = []
        falls = {threat: iter(self.falls(threat)) for threat in self.threats}
        for r in self.attacks:
            loss = mean(r.losses) if r.is_on_cross_entropy else None
            row = {"threat": asdict(r.threat), "attack": r.attack, **_share(r.is_robust), "loss": loss}
            names = ("num_broken", "num_broken_first", "num_broken_alone")
            row |= zip(names, next(falls[r.threat]), strict=True)
            attacks.append(row | {"accuracy_after": dict(r.after), "furthest": r.furthest})
        corruptions: dict[str, dict[str, float]] = {}
        for (name, severity), flags in self.corrupted.items():
            corruptions.setdefault(name, {})[str(severity)] = mean(flags)
        document = {
            "num_examples": self.num_examples,
            "digest": self.digest,
            "settings": dict(self.settings),
            "clean": _share(self.is_clean) | {"loss": mean(self.clean_losses)},
            "attacks": attacks,
            "worst_case": [{"threat": asdict(t), **_share(self.worst(t))} for t in self.threats],
            "worst_case_of_all": _share(self.worst()),
            "minimal_eps": [one.as_dict() for one in self.minimal],
            "corruptions": corruptions,
            "corrupted_accuracy": self.corrupted_accuracy(),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return dict(files.without_nan(document))

    def save(self, path: str | Path) -> Path:
        """Write flags, losses, labels and indices as .npz with a JSON header, no pickle; return the path."""
        index = torch.arange(self.num_examples) if self.index is None else self.index
        arrays: dict[str, Any] = {"labels": self.labels, "index": index}
        arrays |= {"clean": self.is_clean, "clean_losses": self.clean_losses}
        header = {"format": 1, "digest": self.digest, "settings": dict(self.settings)}
        header["attacks"] = attacks = []
        for k, r in enumerate(self.attacks):
            row = {"threat": asdict(r.threat), "attack": r.attack}
            attacks.append(row | {"after": dict(r.after), "furthest": r.furthest})
            arrays |= {f"robust_{k}": r.is_robust, f"losses_{k}": r.losses}
            arrays |= {} if r.fell_in is None else {f"fell_in_{k}": r.fell_in}
        header["minimal"] = [one.header() for one in self.minimal]
        arrays |= {f"minimal_{k}": one.eps for k, one in enumerate(self.minimal)}
        header["corruptions"] = list(self.corrupted)
        arrays |= {f"corrupted_{k}": flags for k, flags in enumerate(self.corrupted.values())}
        header["findings"] = [asdict(finding) for finding in self.findings]
        return files.save_arrays(Path(path), arrays | {"header": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Return what ``save`` wrote; ValueError for other files."""
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as saved:
                    header = json.loads(str(saved["header"]))
                    names = [name for name in saved.files if name != "header"]
                    arrays = {name: torch.from_numpy(saved[name]) for name in names}
                attacks = []
                for k, row in enumerate(header["attacks"]):
                    tensors = arrays[f"robust_{k}"], arrays[f"losses_{k}"]
                    named = ThreatModel(**row["threat"]), row["attack"]
                    after: tuple[Any, ...] = row["after"], row["furthest"], arrays.get(f"fell_in_{k}")
                    attacks.append(AttackResult(*named, *tensors, *after))
                keys = enumerate(map(tuple, header["corruptions"]))
                corrupted: dict[Any, Tensor] = {key: arrays[f"corrupted_{k}"] for k, key in keys}
                findings = tuple(Finding(**finding) for finding in header["findings"])
                examples = arrays["labels"], arrays["clean"], arrays["clean_losses"], tuple(attacks)
                about = header["digest"], header["settings"], findings, arrays["index"]
                rows = enumerate(header.get("minimal", ()))
                minimal = tuple(MinimalEps.read(arrays[f"minimal_{k}"], row) for k, row in rows)
                return cls(*examples, corrupted, *about, minimal)
            except Exception as error:  # zipfile, zlib, NumPy and json raise many kinds for damaged files
                text = f"got another file ({error}); expected one of Evaluation.save. Check the path."
                raise ValueError(f"{path}: {text}") from error


def percent(share: float) -> str:
    """Return "12.3" for 0.123."""
    return f"{100 * share:.1f}"


def mean(values: Tensor) -> float:
    """Return the mean of truth values or numbers, in float64."""
    return float(values.double().mean())


def _share(flags: Tensor) -> dict[str, Any]:
    return {"accuracy": mean(flags), "interval": wilson_interval(mean(flags), len(flags))}


def _cells(flags: Tensor, falls: tuple[str, ...], losses: Tensor | None = None) -> tuple[str, ...]:
    """Return accuracy, interval, ``falls``, loss, interval as texts."""
    share, loss, interval = mean(flags), "", ""
    if losses is not None and bool(losses.isfinite().all()):
        loss, interval = f"{mean(losses):.3f}", " to ".join(f"{x:.3f}" for x in bootstrap_interval(losses))
    ends = " to ".join(map(percent, wilson_interval(share, len(flags))))
    return percent(share), ends, *falls, loss, interval


def by_threat(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first two columns, threat and attack, are to the left."""
    width = max(len(row[0]) for row in rows)
    return aligned([(f"{threat:<{width}}  {attack}", *cells) for threat, attack, *cells in rows])
