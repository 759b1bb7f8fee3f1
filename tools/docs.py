"""Write the generated parts of the documents; with ``--check`` only say whether they are up to date.

    python tools/docs.py [--check]

``wcitrain/METHODS.md`` comes from the classes, every table of ``recipes/results/README.md`` from the JSON
beside it, between the marks ``<!-- name -->`` and ``<!-- /name -->``.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"


def table(rows, texts=1):
    """Return rows, a header first, as a Markdown table; the first ``texts`` columns stand to the left."""
    marks = ["---" if i < texts else "---:" for i in range(len(rows[0]))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], marks, *rows[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def read(name):
    """Return what a JSON file of the results holds."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def share(value):
    """Return ".77" or "−.08", as correlations are written."""
    text = f"{abs(value):.2f}".removeprefix("0") if abs(value) < 0.995 else "1"
    return f"−{text}" if value < 0 else text


def correlation():
    """Return how measures go with the robust gap and the test loss, the strongest first."""

    def estimate(one):
        return f"{share(one['value'])} ({share(one['low'])} to {share(one['high'])})"

    gap, loss = (
        read("correlation")["correlations"][key] for key in ("robust gap (loss)", "robust loss on test")
    )
    rows = [
        ["measure", "τ with the gap in robust loss", "Ψ", "information", "τ with the robust loss on test"]
    ]
    for name, one in sorted(gap.items(), key=lambda pair: -abs(pair[1]["kendall"]["value"])):
        information = f"{one['information']:.2f}"
        both = [estimate(one["kendall"]), estimate(one["granulated"]), information]
        rows.append([f"`{name}`", *both, estimate(loss[name]["kendall"])])
    return table(rows)


def yamada():
    """Return means over seeds at no and at the largest eps of every data set, threat and kind of noise."""
    chosen = [("Gaussians, apart", "l2"), ("Gaussians, overlapping", "l2"), ("digits 3 and 8", "l2")]
    chosen += [("Fashion 5 and 7", "l2"), ("Gaussians, apart", "linf"), ("Fashion 5 and 7", "linf")]
    rows = [["data, threat", "training, eps", "λ_max", "Tr H", "WCI", "rise at ‖w‖"]]
    for data, norm in chosen:
        mine = [
            row for row in read("yamada_logistic")["rows"] if (row["dataset"], row["norm"]) == (data, norm)
        ]
        largest = max(row["eps"] for row in mine)
        kinds = [("plain", "adversarial", 0.0)] if norm == "l2" else []
        kinds += [("adversarial", "adversarial", largest), ("noise", "noise", largest)]
        for place, (label, training, eps) in enumerate(kinds):
            same = [row["numbers"] for row in mine if (row["training"], row["eps"]) == (training, eps)]
            numbers = [
                f"{fmean(one[key] for one in same):.3g}" for key in ("lambda_max", "trace", "wci", "rise")
            ]
            first = "" if place else f"{data}, {norm.capitalize()}"
            rows.append([first, f"{label}, {eps:g}", *numbers])
    return table(rows, texts=2)


def penalty_steps():
    """Return the cost of a penalty step by estimator."""
    counted = {
        "gauss_newton": "3x",
        "hutchinson": "5.7x",
        "top_layer": "1x",
        "gauss_newton, trace alone": "1x",
    }
    rows = [["estimator", "time", "range", "by counting passes"]]
    for name, count in counted.items():
        one = read("bench_penalty_steps")[name]
        rows.append([name, f"{one['median']:.2f}x", f"{one['lowest']:.2f} to {one['highest']:.2f}", count])
    return table(rows)


def trace_cost():
    """Return the seconds to a standard error of 5 % on the layers' traces and on their sum."""
    names = {"ours: gauss_newton": "gauss_newton, chunks of 8 examples"}
    names |= {"curvlinops": "curvlinops, Hutchinson, one operator a layer"}
    names |= {"PyHessian": "PyHessian, the same, graph kept"}
    names |= {"ours: hutchinson": "our hutchinson, one full probe for all layers"}
    results = read("bench_curvature")
    ours = results["ours: gauss_newton"]
    rows = [["method", "per layer", "ratio", "whole", "ratio", "peak memory added"]]
    for key, name in names.items():
        cells = [name]
        for seconds in ("layer_seconds", "whole_seconds"):
            value = results[key][seconds]
            useless = value > 1e6
            cells += [
                "no use" if useless else f"{value:,.0f} s",
                "" if useless else f"{value / ours[seconds]:.0f}x",
            ]
        rows.append([*cells, f"{results[key]['memory_mb']:,.0f} MB"])
    return table(rows)


def traces():
    """Return what every source of traces costs the WCI posterior's bound, as its tool prints it."""
    one = read("bench_traces")
    drop = one["columns"].index("without the cap")
    rows = [one["columns"], *(row for row in one["rows"] if row[2] != "0.995")]
    return table([row[:drop] + row[drop + 1 :] for row in rows], one["texts"])


def third_party():
    """Return who finds which images robust: we, and each other attacker."""
    rows = [["data, training, threat, images, clean %", "attack", "against", "ours, %", "theirs, %"]]
    rows[0] += ["both", "neither", "only ours", "only theirs", "moved"]
    for model in read("third_party").values():
        percent = {
            (attack, who): f"{100 * flags.count('1') / len(flags):.1f}"
            for attack, by in model["robust"].items()
            for who, flags in by.items()
        }
        first = f"{model['data']}, {model['title']}, {model['threat']}, {model['images']}, "
        first += percent["clean", "ours"]
        for one in model["pairs"]:
            attack, who = one["attack"], one["other"]
            counts = [str(one[key]) for key in ("both", "neither", "only_ours", "only_theirs", "moved")]
            rows.append([first, attack, who, percent[attack, "ours"], percent[attack, who], *counts])
            first = ""
    return table(rows, texts=3)


def tables():
    """Return every table of the results by its mark; the runs of those in tables.json are not kept."""
    kept = {name: table([one["columns"], *one["rows"]], one["texts"]) for name, one in read("tables").items()}
    drawn = {"correlation": correlation, "yamada_logistic": yamada, "penalty_steps": penalty_steps}
    drawn |= {"trace_cost": trace_cost, "traces": traces, "third_party": third_party}
    return kept | {name: make() for name, make in drawn.items()}


def results_document(text, made):
    """Return the text with every table between its marks.

    Raises:
        ValueError: A table without marks, or marks without a table.
    """
    marks = re.findall(r"<!-- (\w+) -->\n(?:.*\n)*?<!-- /\1 -->", text)
    if sorted(marks) != sorted(made):
        raise ValueError(f"results: got marks {sorted(marks)}; expected one pair for each of {sorted(made)}.")
    for name, lines in made.items():
        pattern = rf"(<!-- {name} -->\n)(?:.*\n)*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}", text)
    return text


INTRODUCTION = """# Methods, measures, attacks and estimators

Every name that a recipe or an option takes, with its settings (default in brackets), cost and source.
`make docs` writes this file from the classes; `wcitrain list KIND` prints the same. In Python a name is a
class: what is `{name: awp, gamma: 0.01}` in YAML is `wcitrain.AWP(gamma=0.01)`.
"""
TITLES = {
    "objectives": "Objectives and input regularisers: `objective.name`, `input_regularizer.name`",
    "perturbations": "Weight perturbations: `perturbation.name`",
    "penalties": "Penalties on weights: `penalty.name`",
    "estimators": "Estimators of layer-wise traces: `penalty.estimator`, `--set wci.estimator=...`",
    "measures": "Measures: `--measures`, `measures.take`",
    "attacks": "Attacks of `wcitrain evaluate --attacks`",
}


def methods_document():
    """Return METHODS.md: a section for each table of names."""
    from wcitrain.commands.list import TABLES
    from wcitrain.listing import describe

    parts = [INTRODUCTION]
    for kind, title in TITLES.items():
        parts.append(f"## {title}")
        for entry in describe(TABLES[kind]):
            parts.append(wrapped(f"**`{entry.name}`**: {entry.summary}"))
            notes = [("cost", entry.cost), ("source", entry.source)]
            lines = [f"`{name}` ({default}): {meaning}" for name, default, meaning in entry.settings]
            lines += [f"{name}: {text}" for name, text in notes if text]
            parts.append("\n".join(wrapped(line, "- ", "  ") for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def wrapped(text, first="", rest=""):
    """Return a paragraph in lines of at most 110 columns."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 110, initial_indent=first, subsequent_indent=rest, **options)


def documents():
    """Return every generated document by its path."""
    results = RESULTS / "README.md"
    return {
        ROOT / "wcitrain" / "METHODS.md": methods_document(),
        results: results_document(results.read_text("utf-8"), tables()),
    }


def main():
    """Write the documents, or compare; return the exit status."""
    old = [path for path, text in documents().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        print(*(f"{path.relative_to(ROOT)} is out of date: make docs" for path in old), sep="\n")
        return int(bool(old))
    for path, text in documents().items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
