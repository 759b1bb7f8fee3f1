"""``Evaluation``: who survived what, example by example; its table and file, and two models compared."""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.findings import Finding
from wcitrain.evaluation.intervals import McNemar, bootstrap_interval, mcnemar, wilson_interval

FORMAT = 1  # of the file
CLEAN, WORST = "clean", "worst case"


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack did within one threat model.

    Args:
        threat: Norm and radius.
        attack: Name, see ``parse_attack``.
        is_robust: Truth values [N]: right without an attack and after every restart or part of it.
        losses: Cross-entropies [N] of all examples after a gradient attack's first restart (AutoAttack: NaN).
        after: Robust accuracy after each restart or part, by its name.
        furthest: Longest perturbation that fooled the model, in the threat's norm.
        notes: What was left out, and why.
    """

    threat: ThreatModel
    attack: str
    is_robust: Tensor
    losses: Tensor
    after: Mapping[str, float] = field(default_factory=dict)
    furthest: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy after the first restart: the robust loss of PGD and FGSM. NaN for AutoAttack."""
        return float(self.losses.double().mean())

    @property
    def is_on_cross_entropy(self) -> bool:
        """Whether it raises the loss in ``losses``, which are not its maximum after an attack on another."""
        return self.attack.startswith(("pgd-", "fgsm"))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model on N examples, clean, under attacks and corrupted.

    Args:
        labels: Classes [N].
        is_clean: Truth values [N]: right without an attack.
        clean_losses: Cross-entropies [N] without an attack.
        attacks: One result for each threat and attack, threats outside.
        corrupted: Truth values [N] by (corruption, severity): right on the corrupted image.
        digest: Of images and labels; equal for the same examples in the same order.
        settings: How it was done: seed, batch size, versions.
        findings: What the checks found.
        index: Places [N] of the examples in the split they were taken from; None: the first N.
    """

    labels: Tensor
    is_clean: Tensor
    clean_losses: Tensor
    attacks: tuple[AttackResult, ...] = ()
    corrupted: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    digest: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    index: Tensor | None = None

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
        return _share(self.is_clean)

    def result(self, threat: ThreatModel, attack: str) -> AttackResult:
        """Return one attack's result.

        Raises:
            KeyError: There is none.
        """
        for result in self.attacks:
            if (result.threat, result.attack) == (threat, attack):
                return result
        raise KeyError(f"{attack} within {threat}")

    def worst(self, *threats: ThreatModel) -> Tensor:
        """Return truth values [N]: robust to every attack within each of ``threats`` (by default all)."""
        flags = [r.is_robust for r in self.attacks if not threats or r.threat in threats]
        return torch.stack([self.is_clean, *flags]).all(0)

    def robust_accuracy(self, *threats: ThreatModel) -> float:
        """Return the share that survives every attack within each of ``threats`` (by default all)."""
        return _share(self.worst(*threats))

    def corrupted_accuracy(self) -> float:
        """Mean accuracy over corruptions and severities; NaN without any."""
        return (
            float(np.mean([_share(flags) for flags in self.corrupted.values()]))
            if self.corrupted
            else math.nan
        )

    def table(self) -> str:
        """Return accuracies in per cent and mean losses, with 95 % intervals, one row an attack.

        Intervals of accuracies are Wilson's, those of losses from a bootstrap. The loss is the cross-entropy
        of all examples after the first restart, for attacks on it.
        """
        rows = [("", CLEAN, *self._numbers(self.is_clean, self.clean_losses))]
        for threat in self.threats:
            results = [result for result in self.attacks if result.threat == threat]
            rows += [
                (
                    str(threat),
                    r.attack,
                    *self._numbers(r.is_robust, r.losses if r.is_on_cross_entropy else None),
                )
                for r in results
            ]
            if len(results) > 1:
                rows.append((str(threat), WORST, *self._numbers(self.worst(threat))))
        if len(self.threats) > 1:
            rows.append(("all threats", WORST, *self._numbers(self.worst())))
        loss = (
            "CE, first restart"
            if any(len(r.after) > 1 for r in self.attacks if r.is_on_cross_entropy)
            else "CE"
        )
        text = _aligned(("threat", "attack", "accuracy %", "95 % interval", loss, "95 % interval"), rows)
        return "\n\n".join([text, *([self._corruption_table()] if self.corrupted else [])])

    def _numbers(self, flags: Tensor, losses: Tensor | None = None) -> tuple[str, str, str, str]:
        """Return accuracy, interval, loss, interval as texts."""
        low, high = wilson_interval(_share(flags), len(flags))
        first = (f"{100 * _share(flags):.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
        if losses is None or not bool(losses.isfinite().all()):
            return (*first, "", "")
        start, end = bootstrap_interval(losses)
        return (*first, f"{float(losses.double().mean()):.3f}", f"{start:.3f} to {end:.3f}")

    def _corruption_table(self) -> str:
        """Return accuracies by corruption and severity, with means."""
        severities = sorted({severity for _, severity in self.corrupted})
        rows = []
        for name in dict.fromkeys(name for name, _ in self.corrupted):
            shares = [_share(self.corrupted[name, severity]) for severity in severities]
            rows.append((name, *(f"{100 * share:.1f}" for share in [*shares, float(np.mean(shares))])))
        rows.append(("mean", *[""] * len(severities), f"{100 * self.corrupted_accuracy():.1f}"))
        return _aligned(("corruption", *(f"severity {severity}" for severity in severities), "mean"), rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the flags; a number that is not finite becomes None."""

        def share(flags: Tensor) -> dict[str, Any]:
            return {"accuracy": _share(flags), "interval": list(wilson_interval(_share(flags), len(flags)))}

        return {
            "num_examples": self.num_examples,
            "digest": self.digest,
            "settings": dict(self.settings),
            "clean": share(self.is_clean) | {"loss": _finite(float(self.clean_losses.double().mean()))},
            "attacks": [
                {
                    "threat": asdict(r.threat),
                    "attack": r.attack,
                    **share(r.is_robust),
                    "loss": _finite(r.mean_loss) if r.is_on_cross_entropy else None,
                    "accuracy_after": dict(r.after),
                    "furthest": r.furthest,
                    "notes": list(r.notes),
                }
                for r in self.attacks
            ],
            "worst_case": [
                {"threat": asdict(threat), **share(self.worst(threat))} for threat in self.threats
            ],
            "worst_case_of_all": share(self.worst()),
            "corruptions": {
                name: {
                    str(severity): _share(flags)
                    for (n, severity), flags in self.corrupted.items()
                    if n == name
                }
                for name, _ in self.corrupted
            },
            "corrupted_accuracy": _finite(self.corrupted_accuracy()),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def save(self, path: str | Path) -> Path:
        """Write flags, losses, labels and indices as .npz with a JSON header, no pickle; return the path."""
        path = Path(path)
        header = {
            "format": FORMAT,
            "digest": self.digest,
            "settings": dict(self.settings),
            "attacks": [
                {
                    "threat": asdict(r.threat),
                    "attack": r.attack,
                    "after": dict(r.after),
                    "furthest": r.furthest,
                }
                | {"notes": list(r.notes)}
                for r in self.attacks
            ],
            "corruptions": [list(key) for key in self.corrupted],
            "findings": [asdict(finding) for finding in self.findings],
        }
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps(header)),
            "labels": self.labels.numpy(),
            "index": np.arange(self.num_examples) if self.index is None else self.index.numpy(),
            "clean": self.is_clean.numpy(),
            "clean_losses": self.clean_losses.numpy(),
            **{f"robust_{k}": result.is_robust.numpy() for k, result in enumerate(self.attacks)},
            **{f"losses_{k}": result.losses.numpy() for k, result in enumerate(self.attacks)},
            **{f"corrupted_{k}": flags.numpy() for k, flags in enumerate(self.corrupted.values())},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(unfinished, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Return what ``save`` wrote.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as saved:
                arrays = {key: saved[key] for key in saved.files}
            header = json.loads(str(arrays.pop("header")))
            found = header["format"]
            if found == FORMAT:
                return cls._of(header, {key: torch.from_numpy(value) for key, value in arrays.items()})
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise ValueError(
                f"{path}: got another file ({error}); expected one of Evaluation.save. Check the path."
            ) from error
        raise ValueError(f"{path}: got format {found}; expected {FORMAT}. Evaluate the model again.")

    @classmethod
    def _of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Evaluation":
        """Return what the header and the arrays of a file say."""
        return cls(
            labels=tensors["labels"],
            is_clean=tensors["clean"],
            clean_losses=tensors["clean_losses"],
            attacks=tuple(
                AttackResult(
                    ThreatModel(**row["threat"]),
                    row["attack"],
                    tensors[f"robust_{k}"],
                    tensors[f"losses_{k}"],
                    row["after"],
                    row["furthest"],
                    tuple(row["notes"]),
                )
                for k, row in enumerate(header["attacks"])
            ),
            corrupted={
                (name, s): tensors[f"corrupted_{k}"] for k, (name, s) in enumerate(header["corruptions"])
            },
            digest=header["digest"],
            settings=header["settings"],
            findings=tuple(Finding(**finding) for finding in header["findings"]),
            index=tensors["index"],
        )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples: for each threat and attack both accuracies and McNemar's test."""

    rows: tuple[tuple[str, str, float, float, McNemar], ...]
    num_examples: int

    def table(self) -> str:
        """Return one row a threat and attack: accuracies in %, examples only one gets right, p-value."""
        rows = []
        for threat, attack, a, b, test in self.rows:
            shares = f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}"
            rows.append((threat, attack, *shares, str(test.only_a), str(test.only_b), f"{test.p_value:.2g}"))
        return _aligned(("threat", "attack", "A %", "B %", "B - A", "only A", "only B", "p (McNemar)"), rows)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two models on the same examples with McNemar's exact test.

    Clean, and under every attack that both met. The worst case of a threat is compared where both met the
    same attacks in it. The p-values are not corrected for their number.

    Raises:
        ValueError: The examples differ (labels, or the digest of the images), or no attack is shared.
    """
    if a.labels.shape != b.labels.shape or not torch.equal(a.labels, b.labels) or a.digest != b.digest:
        raise ValueError(
            f"compare: got evaluations of {a.num_examples} and {b.num_examples} examples that are not the "
            "same images and labels in the same order; expected the same. Evaluate both on one split."
        )
    pairs = [("", CLEAN, a.is_clean, b.is_clean)]
    for threat in a.threats:
        ours, theirs = ({r.attack: r.is_robust for r in e.attacks if r.threat == threat} for e in (a, b))
        pairs += [(str(threat), name, ours[name], theirs[name]) for name in ours if name in theirs]
        if set(ours) == set(theirs) and len(ours) > 1:
            pairs.append((str(threat), WORST, a.worst(threat), b.worst(threat)))
    if len(pairs) == 1 and (a.attacks or b.attacks):
        met = ["; ".join(f"{r.attack} {r.threat}" for r in e.attacks) or "none" for e in (a, b)]
        raise ValueError(
            f"compare: got attacks {met[0]} and {met[1]}; expected a shared one. Evaluate under one."
        )
    return Comparison(
        tuple((t, n, _share(f), _share(g), mcnemar(f, g)) for t, n, f, g in pairs), a.num_examples
    )


def _share(flags: Tensor) -> float:
    """Return the share of true values."""
    return float(flags.double().mean())


def _finite(value: float) -> float | None:
    """Return None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns under their heads, the first of texts to the left, all others to the right."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    left = [k < 2 and not any(row[k].replace(".", "").isdigit() for row in rows) for k in range(len(head))]
    lines = (
        "  ".join(
            cell.ljust(w) if is_left else cell.rjust(w)
            for cell, w, is_left in zip(row, widths, left, strict=True)
        )
        for row in [head, *rows]
    )
    return "\n".join(line.rstrip() for line in lines)
