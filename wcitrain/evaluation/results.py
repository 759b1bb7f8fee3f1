"""``Evaluation``: who survived what, example by example; its table and file, and two models compared."""

import io
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
from wcitrain.text import aligned

CLEAN, WORST = "clean", "worst case"


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a binomial share p observed on n examples, z = 1.96.

    ( p + z²/2n ± z sqrt( p(1−p)/n + z²/4n² ) ) / (1 + z²/n)
    """
    z = 1.96
    centre = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean (Efron & Tibshirani 1993, chapter 13).

    The 2.5 % and 97.5 % quantiles of the means of 2000 samples of the values [N], drawn with replacement.
    """
    numbers, generator = values.detach().cpu().double().numpy(), np.random.default_rng(0)
    means: list[float] = []
    while len(means) < 2000:  # a hundred at a time: ten thousand values take 8 MB, not 160
        means += numbers[generator.integers(len(numbers), size=(100, len(numbers)))].mean(1).tolist()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(a_flags: Tensor, b_flags: Tensor) -> tuple[int, int, float]:
    """Return b, c and the p-value of McNemar's exact test (1947) of truth values [N] on the same examples.

        p = min( 1, 2 P[ X ≤ min(b, c) ] ),  X ~ Binomial(b + c, 1/2)

    with b examples that only the first model gets right and c that only the second does.
    """
    only_a, only_b = int((a_flags & ~b_flags).sum()), int((b_flags & ~a_flags).sum())
    num = only_a + only_b
    total = sum(math.comb(num, k) for k in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * total / 2**num)


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
        has_restarts = any(len(r.after) > 1 for r in self.attacks if r.is_on_cross_entropy)
        loss = "CE, first restart" if has_restarts else "CE"
        rows = [("threat", "attack", "accuracy %", "95 % interval", loss, "95 % interval")]
        rows.append(("", CLEAN, *_cells(self.is_clean, self.clean_losses)))
        for threat in self.threats:
            results = [r for r in self.attacks if r.threat == threat]
            for r in results:
                losses = r.losses if r.is_on_cross_entropy else None
                rows.append((str(threat), r.attack, *_cells(r.is_robust, losses)))
            if len(results) > 1:
                rows.append((str(threat), WORST, *_cells(self.worst(threat))))
        if len(self.threats) > 1:
            rows.append(("all threats", WORST, *_cells(self.worst())))
        return f"{_by_threat(rows)}\n\n{self._corruption_table()}" if self.corrupted else _by_threat(rows)

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
            loss = _mean(r.losses) if r.is_on_cross_entropy else None
            row = {"threat": asdict(r.threat), "attack": r.attack, **_share(r.is_robust), "loss": loss}
            attacks.append(row | {"accuracy_after": dict(r.after), "furthest": r.furthest})
        corruptions: dict[str, dict[str, float]] = {}
        for (name, severity), flags in self.corrupted.items():
            corruptions.setdefault(name, {})[str(severity)] = _mean(flags)
        document = {
            "num_examples": self.num_examples,
            "digest": self.digest,
            "settings": dict(self.settings),
            "clean": _share(self.is_clean) | {"loss": _mean(self.clean_losses)},
            "attacks": attacks,
            "worst_case": [{"threat": asdict(t), **_share(self.worst(t))} for t in self.threats],
            "worst_case_of_all": _share(self.worst()),
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
                    header = json.loads(str(saved["header"]))
                    names = [name for name in saved.files if name != "header"]
                    arrays = {name: torch.from_numpy(saved[name]) for name in names}
                attacks = []
                for k, row in enumerate(header["attacks"]):
                    tensors = arrays[f"robust_{k}"], arrays[f"losses_{k}"]
                    named = ThreatModel(**row["threat"]), row["attack"]
                    attacks.append(AttackResult(*named, *tensors, row["after"], row["furthest"]))
                keys = enumerate(map(tuple, header["corruptions"]))
                corrupted: dict[Any, Tensor] = {key: arrays[f"corrupted_{k}"] for k, key in keys}
                findings = tuple(Finding(**finding) for finding in header["findings"])
                examples = arrays["labels"], arrays["clean"], arrays["clean_losses"], tuple(attacks)
                about = header["digest"], header["settings"], findings, arrays["index"]
                return cls(*examples, corrupted, *about)
            except Exception as error:  # zipfile, zlib, NumPy and json raise many kinds for damaged files
                text = f"got another file ({error}); expected one of Evaluation.save. Check the path."
                raise ValueError(f"{path}: {text}") from error


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples: for each threat and attack both accuracies and McNemar's test."""

    rows: tuple[tuple[str, str, float, float, int, int, float], ...]  # ..., accuracies, `mcnemar`
    num_examples: int

    def table(self) -> str:
        """Return one row a threat and attack: accuracies in %, examples only one gets right, p-value."""
        rows = [("threat", "attack", "A %", "B %", "B - A", "only A", "only B", "p (McNemar)")]
        for threat, attack, a, b, only_a, only_b, p in self.rows:
            shares = percent(a), percent(b), f"{100 * (b - a):+.1f}"
            rows.append((threat, attack, *shares, str(only_a), str(only_b), f"{p:.2g}"))
        return _by_threat(rows)


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two models on the same examples with McNemar's exact test.

    Clean, under every attack that both met, and in the worst case of a threat where both met the same attacks
    in it. The p-values are not corrected for their number. ValueError for other examples or attacks.
    """
    if not torch.equal(a.labels, b.labels) or a.digest != b.digest:
        got = "examples that are not the same images in one order"
        raise ValueError(f"compare: got {got}; expected the same. Evaluate both on one split.")
    pairs = [("", CLEAN, a.is_clean, b.is_clean)]
    for threat in a.threats:
        ours, theirs = ({r.attack: r.is_robust for r in e.attacks if r.threat == threat} for e in (a, b))
        pairs += [(str(threat), name, ours[name], theirs[name]) for name in ours if name in theirs]
        if set(ours) == set(theirs) and len(ours) > 1:
            pairs.append((str(threat), WORST, a.worst(threat), b.worst(threat)))
    if len(pairs) == 1 and (a.attacks or b.attacks):
        raise ValueError("compare: got no attack that both met; expected a shared one. Evaluate under one.")
    rows = ((threat, name, _mean(f), _mean(g), *mcnemar(f, g)) for threat, name, f, g in pairs)
    return Comparison(tuple(rows), a.num_examples)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz file; a kill at any moment leaves the former file or this one."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    files.replace(path, content.getvalue())


def percent(share: float) -> str:
    """Return "12.3" for 0.123."""
    return f"{100 * share:.1f}"


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _share(flags: Tensor) -> dict[str, Any]:
    return {"accuracy": _mean(flags), "interval": wilson_interval(_mean(flags), len(flags))}


def _cells(flags: Tensor, losses: Tensor | None = None) -> tuple[str, str, str, str]:
    """Return accuracy, interval, loss, interval as texts."""
    share, loss, interval = _mean(flags), "", ""
    if losses is not None and bool(losses.isfinite().all()):
        loss, interval = f"{_mean(losses):.3f}", " to ".join(f"{x:.3f}" for x in bootstrap_interval(losses))
    return percent(share), " to ".join(map(percent, wilson_interval(share, len(flags)))), loss, interval


def _by_threat(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first two columns, threat and attack, are to the left."""
    width = max(len(row[0]) for row in rows)
    return aligned([(f"{threat:<{width}}  {attack}", *cells) for threat, attack, *cells in rows])
