"""Writes the HTML of the report. Every text is escaped, since it may come from data."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere }
section { overflow-x: auto }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: baseline; padding: .25rem .9rem .25rem .3rem;
         border-bottom: 1px solid #e4e4e4; max-width: 42rem }
th { font-weight: 600; color: #555 }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 5rem }
td:first-child { white-space: nowrap }
.wide td { white-space: nowrap }
.wide td:last-child { max-width: none; min-width: 20rem; white-space: normal }
mark { color: inherit; padding: .1em .15em; border-radius: .2em }
.share { display: inline-block; min-width: 4rem; padding: .2rem .5rem; text-align: right }
svg { max-width: 100%; min-width: 30rem; height: auto; font-family: system-ui, sans-serif }
@media (max-width: 40rem) { body { margin: 1rem auto; font-size: 14px } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the page loads nothing, runs no script


class Html(str):
    """Text that is HTML already."""


def document(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """Returns a whole page of sections (title, HTML)."""
    name = html.escape(title)
    body = '\n'.join(
        f'<h2>{html.escape(heading)}</h2>\n<section>{content}</section>'
        for heading, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n'
    )


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), wide: bool = False) -> str:
    """Returns a table of cells, which are escaped unless they are Html."""

    def row(cells: Sequence[Any], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{escaped(cell)}</{tag}>' for cell in cells) + '</tr>'

    lines = ([row(head, 'th')] if head else []) + [row(cells, 'td') for cells in rows]
    return f'<table{" class=wide" if wide else ""}>' + '\n'.join(lines) + '</table>'


def paragraph(text: str) -> str:
    """Returns a paragraph of plain text."""
    return f'<p>{html.escape(text)}</p>'


def escaped(cell: Any) -> str:
    """Returns a cell as HTML."""
    return cell if isinstance(cell, Html) else html.escape(str(cell))


def swatch(text: str, share: float, right: bool) -> Html:
    """Marks a number, the more strongly the larger its share of the row in [0, 1]."""
    color = '91, 140, 58' if right else '192, 57, 43'
    return marked(text, f'rgba({color}, {0.75 * share:.2f})', 'class="share"')


def shaded(words: Sequence[tuple[str, float]]) -> Html:
    """Marks words, each as strongly as its attention relative to the text's largest."""
    most = max((weight for _, weight in words), default=1.0) or 1.0
    colors = [(word, w, f'rgba(224, 122, 31, {0.8 * w / most:.2f})') for word, w in words]
    return Html(' '.join(marked(word, color, f'title="{w:.3f}"') for word, w, color in colors))


def marked(text: str, color: str, attributes: str) -> Html:
    """Returns text on a background color."""
    return Html(f'<mark style="background: {color}" {attributes}>{html.escape(text)}</mark>')
