"""Two models compared on the same examples, by McNemar's test."""

from dataclasses import dataclass

import torch

from wcitrain.evaluation.intervals import mcnemar
from wcitrain.evaluation.results import CLEAN, WORST, Evaluation, by_threat, mean, percent


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
        return by_threat(rows)


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
    rows = ((threat, name, mean(f), mean(g), *mcnemar(f, g)) for threat, name, f, g in pairs)
    return Comparison(tuple(rows), a.num_examples)
