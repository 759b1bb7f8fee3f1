"""``Evaluation``: who survived what, example by example; its table and file, and two models compared."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.intervals import McNemar, bootstrap_interval, mcnemar, wilson_interval
from wcitrain.text import aligned

FORMAT = 1  # of the file
CLEAN, WORST = "clean", "worst case"


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
    notes: tuple[str, ...] = ()  # what was left out, and why

    @property
    def is_on_cross_entropy(self) -> bool:
        """Whether it raises the loss in ``losses``, which are not its maximum after an attack on another."""
        return self.attack.startswith(("pgd-", "fgsm"))


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
        return _mean(self.is_clean)

    def result(self, threat: ThreatModel, attack: str) -> AttackResult:
        """Return one attack's result; KeyError where there is none."""
        return {(result.threat, result.attack): result for result in self.attacks}[threat, attack]

    def worst(self, *threats: ThreatModel) -> Tensor:
        """Return truth values [N]: robust to every attack within each of ``threats`` (by default all)."""
        flags = [r.is_robust for r in self.attacks if not threats or r.threat in threats]
        return torch.stack([self.is_clean, *flags]).all(0)

    def robust_accuracy(self, *threats: ThreatModel) -> float:
        """Return the share that survives every attack within each of ``threats`` (by default all)."""
        return _mean(self.worst(*threats))

    def corrupted_accuracy(self) -> float:
        """Mean accuracy over corruptions and severities; NaN without any."""
        shares = [_mean(flags) for flags in self.corrupted.values()]
        return float(np.mean(shares)) if shares else math.nan

    def table(self) -> str:
        """Return accuracies in %, losses, Wilson and bootstrap 95 % intervals, a row an attack."""
        rows = [("", CLEAN, *_cells(self.is_clean, self.clean_losses))]
        for threat in self.threats:
            results = [r for r in self.attacks if r.threat == threat]
            for r in results:
                losses = r.losses if r.is_on_cross_entropy else None
                rows.append((str(threat), r.attack, *_cells(r.is_robust, losses)))
            if len(results) > 1:
                rows.append((str(threat), WORST, *_cells(self.worst(threat))))
        if len(self.threats) > 1:
            rows.append(("all threats", WORST, *_cells(self.worst())))
        has_restarts = any(len(r.after) > 1 for r in self.attacks if r.is_on_cross_entropy)
        loss = "CE, first restart" if has_restarts else "CE"
        text = _by_threat([("threat", "attack", "accuracy %", "95 % interval", loss, "95 % interval"), *rows])
        return f"{text}\n\n{self._corruption_table()}" if self.corrupted else text

    def _corruption_table(self) -> str:
        severities = sorted({severity for _, severity in self.corrupted})
        rows = [("corruption", *(f"severity {severity}" for severity in severities), "mean")]
        for name in dict.fromkeys(name for name, _ in self.corrupted):
            shares = [_mean(self.corrupted[name, severity]) for severity in severities]
            rows.append((name, *map(percent, [*shares, float(np.mean(shares))])))
        rows.append(("mean", *[""] * len(severities), percent(self.corrupted_accuracy())))
        return aligned(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the flags; a number that is not finite becomes None."""
        attacks = []
        for r in self.attacks:
            loss = _finite(_mean(r.losses)) if r.is_on_cross_entropy else None
            row = {"threat": asdict(r.threat), "attack": r.attack, **_share(r.is_robust), "loss": loss}
            row |= {"accuracy_after": dict(r.after), "furthest": r.furthest, "notes": list(r.notes)}
            attacks.append(row)
        corruptions: dict[str, dict[str, float]] = {}
        for (name, severity), flags in self.corrupted.items():
            corruptions.setdefault(name, {})[str(severity)] = _mean(flags)
        return {
            "num_examples": self.num_examples,
            "digest": self.digest,
            "settings": dict(self.settings),
            "clean": _share(self.is_clean) | {"loss": _finite(_mean(self.clean_losses))},
            "attacks": attacks,
            "worst_case": [{"threat": asdict(t), **_share(self.worst(t))} for t in self.threats],
            "worst_case_of_all": _share(self.worst()),
            "corruptions": corruptions,
            "corrupted_accuracy": _finite(self.corrupted_accuracy()),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def save(self, path: str | Path) -> Path:
        """Write flags, losses, labels and indices as .npz with a JSON header, no pickle; return the path."""
        index = torch.arange(self.num_examples) if self.index is None else self.index
        arrays: dict[str, Any] = {"labels": self.labels, "index": index}
        arrays |= {"clean": self.is_clean, "clean_losses": self.clean_losses}
        header = {"format": FORMAT, "digest": self.digest, "settings": dict(self.settings)}
        header["attacks"] = attacks = [asdict(result) for result in self.attacks]
        for k, attack in enumerate(attacks):
            arrays |= {f"robust_{k}": attack.pop("is_robust"), f"losses_{k}": attack.pop("losses")}
        header["corruptions"] = list(self.corrupted)
        arrays |= {f"corrupted_{k}": flags for k, flags in enumerate(self.corrupted.values())}
        header["findings"] = [asdict(finding) for finding in self.findings]
        save_arrays(Path(path), arrays | {"header": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Return what ``save`` wrote; ValueError for other files."""
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as saved:
                    arrays = {key: saved[key] for key in saved.files}
                header = json.loads(str(arrays.pop("header")))
                if (form := header["format"]) == FORMAT:
                    return cls._of(header, {key: torch.from_numpy(value) for key, value in arrays.items()})
            except Exception as error:  # zipfile, zlib, NumPy and json raise many kinds for damaged files
                text = f"got another file ({error}); expected one of Evaluation.save. Check the path."
                raise ValueError(f"{path}: {text}") from error
        raise ValueError(f"{path}: got format {form}; expected {FORMAT}. Evaluate the model again.")

    @classmethod
    def _of(cls, header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Evaluation":
        """Return what the header and the arrays of a file say."""
        attacks = []
        for k, row in enumerate(header["attacks"]):
            row |= {"threat": ThreatModel(**row["threat"]), "notes": tuple(row["notes"])}
            row |= {"is_robust": arrays[f"robust_{k}"], "losses": arrays[f"losses_{k}"]}
            attacks.append(AttackResult(**row))
        corrupted = {tuple(key): arrays[f"corrupted_{k}"] for k, key in enumerate(header["corruptions"])}
        findings = tuple(Finding(**finding) for finding in header["findings"])
        examples = (arrays["labels"], arrays["clean"], arrays["clean_losses"])
        digest, settings = header["digest"], header["settings"]
        return cls(*examples, tuple(attacks), corrupted, digest, settings, findings, arrays["index"])


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples: for each threat and attack both accuracies and McNemar's test."""

    rows: tuple[tuple[str, str, float, float, McNemar], ...]
    num_examples: int

    def table(self) -> str:
        """Return one row a threat and attack: accuracies in %, examples only one gets right, p-value."""
        rows = [("threat", "attack", "A %", "B %", "B - A", "only A", "only B", "p (McNemar)")]
        for threat, attack, a, b, test in self.rows:
            shares = percent(a), percent(b), f"{100 * (b - a):+.1f}"
            rows.append((threat, attack, *shares, str(test.only_a), str(test.only_b), f"{test.p_value:.2g}"))
        return _by_threat(rows)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two models on the same examples with McNemar's exact test.

    Clean, and under every attack that both met. The worst case of a threat is compared where both met the
    same attacks in it. The p-values are not corrected for their number. ValueError where the examples differ
    or no attack is shared.
    """
    if not torch.equal(a.labels, b.labels) or a.digest != b.digest:
        got = f"{a.num_examples} and {b.num_examples} examples that are not the same images in one order"
        raise ValueError(f"compare: got {got}; expected the same. Evaluate both on one split.")
    pairs = [("", CLEAN, a.is_clean, b.is_clean)]
    for threat in a.threats:
        ours, theirs = ({r.attack: r.is_robust for r in e.attacks if r.threat == threat} for e in (a, b))
        pairs += [(str(threat), name, ours[name], theirs[name]) for name in ours if name in theirs]
        if set(ours) == set(theirs) and len(ours) > 1:
            pairs.append((str(threat), WORST, a.worst(threat), b.worst(threat)))
    if len(pairs) == 1 and (a.attacks or b.attacks):
        met = " and ".join(", ".join(f"{r.attack} {r.threat}" for r in e.attacks) or "none" for e in (a, b))
        raise ValueError(f"compare: got attacks {met}; expected a shared one. Evaluate under one.")
    rows = ((threat, name, _mean(f), _mean(g), mcnemar(f, g)) for threat, name, f, g in pairs)
    return Comparison(tuple(rows), a.num_examples)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz file; a kill at any moment leaves the former file or this one."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, content.getvalue())


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _share(flags: Tensor) -> dict[str, Any]:
    share = _mean(flags)
    return {"accuracy": share, "interval": list(wilson_interval(share, len(flags)))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def percent(share: float) -> str:
    """Return "12.3" for 0.123."""
    return f"{100 * share:.1f}"


def _cells(flags: Tensor, losses: Tensor | None = None) -> tuple[str, str, str, str]:
    """Return accuracy, interval, loss, interval as texts."""
    share, loss, interval = _mean(flags), "", ""
    if losses is not None and bool(losses.isfinite().all()):
        loss, interval = f"{_mean(losses):.3f}", " to ".join(f"{x:.3f}" for x in bootstrap_interval(losses))
    return percent(share), " to ".join(map(percent, wilson_interval(share, len(flags)))), loss, interval


def _by_threat(rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first two columns, threat and attack, are to the left."""
    rows = list(rows)
    width = max(len(row[0]) for row in rows)
    return aligned([(f"{threat:<{width}}  {attack}", *cells) for threat, attack, *cells in rows])
