"""What a measure says of generalisation beyond hyper-parameters, and how often chance says as much.

Legend: M models, μ [M] a measure, g [M] what it should predict, θ_i a hyper-parameter, S a set of them,
P rearrangements.

    K_S = I( sign Δμ ; sign Δg | θ_S, θ_S' ) / H( sign Δg | θ_S, θ_S' ),     K = min over |S| <= 2 of K_S  (1)

over pairs of models of different runs: the conditional mutual information of Jiang et al. 2020 (arXiv
1912.02178, section 2.3). A measure that only copies hyper-parameters in S says nothing given S. A tie is a
sign of its own, zero, except that pairs with equal g are left out.

From few models K is above zero whatever the measure, the more the finer the conditions. Shuffled over *all*
runs a measure forgets its hyper-parameters, and is no null for one that has some. Here values change places
among runs of equal θ_S only, where the order means nothing if the measure says nothing beyond θ_S:

    p_S = (1 + #{ rearrangements whose K_S is as large }) / (1 + P),     p = max_S p_S                     (2)

K > 0 says K_S > 0 for every S, so the largest p is the one to go by (Berger 1982, Technometrics 24(4)); it is
cautious. Checkpoints of a run move together. A condition under which nothing is left to predict is left out
of both. Where every cell holds one run p is 1: repeat the runs under other seeds. In simulated designs of 22
to 96 runs 0 to 7 % of measures that copy one or two hyper-parameters have p <= 5 %; shuffled over all runs 7
to 100 % exceeded the 95 % level. One that copies three is beyond |S| <= 2, and found in 57 % at 22 runs.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FIRST, ENOUGH = 99, 0.3  # a p above this by so many rearrangements needs no more of them


def conditional_information(
    mu: Floats, g: Floats, run: Ints, columns: Sequence[Ints], num: int, generator: Generator
) -> tuple[float, float]:
    """Return K of (1) and p of (2) by ``num`` rearrangements (0: NaN); NaN where nothing is to predict.

    ``run`` and the hyper-parameters ``columns`` are codes 0, 1, ... [M].
    """
    is_pair = (run[:, None] != run[None, :]) & (g[:, None] != g[None, :])
    first, second = np.nonzero(is_pair)  # in both orders
    shares, chances = [], []
    for labels in _conditions(columns, len(g)):
        known = _share_of(mu, g, (first, second), labels)
        share = float(known(np.arange(len(g))[None])[0])
        if not math.isfinite(share):
            continue
        shares.append(share)
        reached = np.zeros(0, dtype=bool)
        for many in (FIRST, num - FIRST) if num > FIRST else (num,):
            if many and (not len(reached) or chance(reached) <= ENOUGH):
                found = np.concatenate([known(one) for one in rearranged(run, labels, many, generator)])
                reached = np.concatenate([reached, found >= share - 1e-9])
        chances += [chance(reached)] * (num > 0)
    return max(0.0, min(shares)) if shares else math.nan, max(chances, default=math.nan)


def rearranged(run: Ints, labels: Ints, num: int, generator: Generator) -> list[Ints]:
    """Return places [num, M], in some pieces: model i has the value of model places[:, i], of a run alike.

    Runs are alike if their models have the same ``labels`` [M] in the same order, and as many.
    """
    alike: dict[tuple[int, ...], list[Ints]] = {}
    for members in (np.flatnonzero(run == r) for r in np.unique(run)):
        alike.setdefault(tuple(labels[members].tolist()), []).append(members)
    places = np.tile(np.arange(len(run)), (num, 1))
    for blocks in map(np.stack, alike.values()):  # [runs, models of each]
        order = generator.random((num, len(blocks))).argsort(1)
        places[:, blocks.ravel()] = blocks[order].reshape(num, blocks.size)
    return np.array_split(places, 1 + num * len(run) ** 2 // 10**6)  # some MB at once


def chance(reached: npt.NDArray[np.bool_]) -> float:
    """Return p, the share of rearrangements that reached what was found, which counts as one of them."""
    return (1 + int(reached.sum())) / (1 + len(reached))


def _conditions(columns: Sequence[Ints], num: int) -> list[Ints]:
    """Return for every set S of at most two hyper-parameters which of its values each model has [M]."""
    chosen = itertools.chain.from_iterable(itertools.combinations(columns, size) for size in range(3))
    rows = (np.stack([np.zeros(num, dtype=np.int64), *one]) for one in chosen)
    return [np.unique(one, axis=1, return_inverse=True)[1].reshape(-1) for one in rows]


def _share_of(mu: Floats, g: Floats, pairs: tuple[Ints, Ints], labels: Ints) -> Callable[[Ints], Floats]:
    """Return K_S [P] as a function of places [P, M] of the measure; NaN where g has no entropy left."""
    first, second = pairs
    cell = np.unique(labels[first] * len(g) + labels[second], return_inverse=True)[1].reshape(-1)
    num, code = int(cell.max(initial=-1)) + 1, 6 * cell + 2 + (g[first] > g[second])
    logs = np.arange(len(first) + 1.0)
    logs[1:] *= np.log(logs[1:])  # n ln n for all counts there can be

    def known(places: Ints) -> Floats:
        signs = np.sign(mu[places[:, first]] - mu[places[:, second]]).astype(np.int64)
        own = 6 * num * np.arange(len(places))[:, None]
        table = np.bincount((own + code + 2 * signs).ravel(), minlength=6 * num * len(places))
        table = table.reshape(len(places), num, 3, 2)
        entropy = logs[table.sum((2, 3))].sum(1) - logs[table.sum(2)].sum((1, 2))  # of g given S, times pairs
        left = logs[table.sum(3)].sum((1, 2)) - logs[table].sum((1, 2, 3))  # ... and given the measure
        share = np.full(len(places), math.nan)
        return np.divide(entropy - left, entropy, out=share, where=entropy > 1e-9 * len(first))

    return known
