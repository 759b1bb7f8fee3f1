"""Small pieces of HTML: text is escaped here, so that no name in a recipe can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""

    def __add__(self, other: str) -> Markup:
        return Markup(str(self) + html(other))


def html(text: str) -> Markup:
    """Return ``text`` as HTML; what is ``Markup`` stays as it is."""
    return text if isinstance(text, Markup) else Markup(escape(text))


def element(tag: str, text: str, **attributes: str) -> Markup:
    """Return ``<tag key="value">text</tag>``; ``class_`` stands for ``class``."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value)
    return Markup(f"<{tag}{written}>{html(text)}</{tag}>")


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Return the parts, escaped where needed, one after another."""
    return Markup(html(between).join(html(part) for part in parts))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> Markup:
    """Return a table in a box of its own that scrolls sideways; the first cell of a line names the line.

    A cell "80.0 [78.0, 82.0]" or "80.0 (78.0 to 82.0)" has its range in small type.
    """
    head = join(element("th", text, scope="col") for text in header)
    body = join(
        element("tr", join([element("th", line[0], scope="row"), *map(_cell, line[1:])])) + Markup("\n")
        for line in map(list, rows)
    )
    inside = join(
        [element("caption", caption), element("thead", element("tr", head)), element("tbody", body)]
    )
    box = element("table", inside, class_=class_)
    # A box that scrolls must be reachable by keyboard.
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{box}</div>\n'
    )


def _cell(text: str) -> Markup:
    if isinstance(text, Markup):
        return text if text.startswith("<td") else element("td", text)
    match = re.fullmatch(r"([^\[(±]+)( [\[(±].*)", text)
    if match:
        return element("td", join([match[1], element("small", match[2].strip())], " "))
    return element("td", text)


def folded(title: str, content: str, is_open: bool = False) -> Markup:
    """Return content that unfolds under its title."""
    return Markup(f"<details{' open' * is_open}>{element('summary', title)}{html(content)}</details>\n")


def charts(figures: Sequence[str], class_: str = "charts") -> Markup:
    """Return figures beside each other where the page is wide enough."""
    return element("div", Markup("".join(figures)), class_=class_) + Markup("\n") if figures else Markup("")
