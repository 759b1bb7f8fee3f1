"""How many chunks and probes an index needs for a target error, planned so that the estimate stays unbiased.

Legend: K chunks, m probes a chunk, x_kj [L] traces of chunk k by probe j, a_l = ||W_l||_F², t_l = Tr(H_l).

Near the estimate the index is linear in the traces, with c_l = ½ sqrt(a_l / t_l), which splits the variance:

    Var WCI ≈ ( σ_b² + σ_w² / m ) / K,  σ_w² = Var_j Σ_l c_l x_kjl  within a chunk,  σ_b² between chunks   (1)

A chunk costs c_a passes for its attack and forward, c_p for each probe. The least variance for a cost has

    m* = sqrt( c_a σ_w² / (c_p σ_b²) )                                                                     (2)

For a target relative error r a *pilot* of 16 chunks with 2 probes estimates (1). m follows from (2), K from

    ( σ_b² + σ_w² / m ) / K = (r WCI)² / s,     s = ν / χ²_ν(5 %),  ν = K_pilot − 1,                       (3)

where s covers the error of the variance itself. The stage so planned is made on fresh examples with fresh
random numbers, and the pilot's samples are thrown away: adding to them until the error looks small enough
would stop where the estimate is low by chance, since the two are correlated (two stages as in Stein 1945). If
the stage misses all the same, one time in eight to forty in simulations, its variance plans a larger one. The
result is the last stage alone; what bias is left, that of taking the first stage that did not miss, was below
a tenth of a standard error there.
"""

import math
import sys

PILOT_CHUNKS = 16  # also the fewest of any stage: a standard error from fewer is itself too uncertain
PILOT_PROBES = 2  # the fewest that tell σ_w² from σ_b²
MAX_PROBES = 16  # m*, where σ_b² comes out near zero
MAX_PROBES_WITHOUT_EXAMPLES = 64  # where probes are all that can be added
MAX_STAGES = 4  # after the pilot
TINY = sys.float_info.min


def plan(between: float, within: float, variance: float, passes: int, passes_a_probe: int) -> tuple[int, int]:
    """Return K by (3) and m by (2), or fewer probes where the fewest chunks leave room for that."""
    best = math.sqrt(passes * within / (passes_a_probe * between)) if between > 0 else MAX_PROBES
    num_probes = min(max(1, round(best)), MAX_PROBES, probes_for(between, within, variance, PILOT_CHUNKS))
    return max(PILOT_CHUNKS, math.ceil((between + within / num_probes) / max(variance, TINY))), num_probes


def probes_for(between: float, within: float, variance: float, num_chunks: int) -> int:
    """Return the fewest probes with which so many chunks reach a variance, from equation (1).

    If the spread between chunks alone exceeds it: those within an eighth of the error of endless probes.
    """
    room = num_chunks * variance - between
    return max(1, math.ceil(within / (room if room > 0 else max(between / 4, TINY))))


def safety(nu: int) -> float:
    """Return s of equation (3), at most 10; the quantile of χ² by Wilson and Hilferty's cube."""
    root = 1 - 2 / (9 * nu) - 1.645 * math.sqrt(2 / (9 * nu))
    return min(10.0, 1 / max(root, TINY) ** 3)
