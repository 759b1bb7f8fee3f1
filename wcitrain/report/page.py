"""The report as one HTML page that needs nothing else: no server, no network, no library.

Style and script are the files beside this one, put inside the page; every chart is SVG made here. The page is
complete without its script. A section says what the run folders say; one without data is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from wcitrain.report import overview, results, sections, settings
from wcitrain.report.markup import Markup, element, html, join
from wcitrain.report.runs import COLOURS, MARKERS, Row
from wcitrain.report.svg import NUM_MARKERS, Entry, swatch
from wcitrain.report.words import count, few

_STICKY = 8  # a longer legend does not stay on the screen


def report_page(rows: Sequence[Row], *, at: str = "last") -> str:
    """Return the page of these rows; the table of ``at``, "last" or "best", is not folded away."""
    runs = [run for row in rows for run in row.runs]
    entries = legend_entries(rows)
    title = (
        runs[0].name
        if len(runs) == 1
        else f"{count(len({run.group for run in runs}), 'method')}, {len(runs)} runs"
    )
    parts = {
        "results": ("Results", results.results(rows, entries, at)),
        "settings": ("Settings", settings.settings_section(runs)),
        "curves": ("Training curves", sections.curves(rows, entries)),
        "layers": ("Weight-Curvature Index by layer", sections.layers(rows, entries)),
        "evaluations": ("Evaluations", sections.evaluations(rows, entries)),
        "measures": ("Measures", sections.measured_afterwards(runs)),
        "during": ("Measures during training", sections.training_measures(rows, entries)),
        "cost": ("Cost", results.costs(rows, entries)),
        "pictures": ("Landscapes and figures", sections.gallery(runs)),
        "runs": ("Runs", overview.runs_table(runs)),
    }
    present = {key: value for key, value in parts.items() if value[1]}
    links = join(element("li", element("a", name, href=f"#{key}")) for key, (name, _) in present.items())
    blocks = [
        f'<section id="{key}" aria-labelledby="{key}-title">\n'
        f'<h2 id="{key}-title">{escape(name)}</h2>\n{content}</section>\n'
        for key, (name, content) in present.items()
    ]
    # A finished run knows its method.
    methods = {run.group: run.method for run in sorted(runs, key=lambda run: run.is_finished)}
    names = list(dict.fromkeys(methods[run.group] for run in runs))
    here = Path(__file__)
    style, dark, script = (
        here.with_name(name).read_text("utf-8") for name in ("page.css", "dark.css", "page.js")
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · wcitrain report</title>
<style>
{style}</style>
<style id="dark" media="screen and (prefers-color-scheme: dark)">
{dark}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<button type="button" class="theme" hidden>Theme</button>
<p class="lead">Robust training: {html(few(names, 12))}</p>
{overview.facts(rows)}{overview.findings(rows)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{_legend(entries)}{"".join(blocks)}</main>
<footer>Written by wcitrain report from {count(len(runs), "run folder")}.</footer>
<script>
{script}</script>
</body>
</html>
"""


def legend_entries(rows: Sequence[Row]) -> list[Entry]:
    """Return how each row looks: the group's colour, and a marker that tells neighbouring colours apart."""
    entries = []
    for row in rows:
        colour = COLOURS.index(row.colour)
        entries.append(
            Entry(row.label, colour, (colour + MARKERS.index(row.marker)) % NUM_MARKERS, row.is_finished)
        )
    return entries


def _legend(entries: Sequence[Entry]) -> Markup:
    """Return the legend of all charts: buttons that hide a row's lines."""
    items = [
        f'<li><button type="button" aria-pressed="true" data-entry="{i}">'
        f"{swatch(entry)}{escape(entry.label)}</button></li>"
        for i, entry in enumerate(entries)
    ]
    if len(entries) > 2:
        choices = (("all", "Show all"), ("none", "Hide all"))
        items += [
            f'<li><button type="button" data-all="{key}" hidden>{text}</button></li>' for key, text in choices
        ]
    few = " few" * (len(entries) <= _STICKY)
    return Markup(
        f'<ul class="legend{few}" aria-label="Legend; a button hides its lines">{"".join(items)}</ul>\n'
    )
