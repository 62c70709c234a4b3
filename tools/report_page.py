"""The HTML of the report: every text is escaped, since it may come from data."""

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
         border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; max-width: 42rem }
th { font-weight: 600; color: #555 }
td { font-variant-numeric: tabular-nums }
td:first-child { white-space: nowrap }
.wide td:last-child { max-width: none }
.wide td { white-space: nowrap } .wide td:last-child { white-space: normal }
mark { color: inherit; padding: .1em .15em; border-radius: .2em }
.share { display: inline-block; min-width: 4rem; padding: .2rem .5rem; text-align: right }
svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, no script runs


class Html(str):
    """Text that is HTML already."""


def document(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page of sections (title, HTML)."""
    name = html.escape(title)
    body = '\n'.join(
        f'<h2>{html.escape(heading)}</h2>\n<section>{content}</section>'
        for heading, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n'
    )


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), wide: bool = False) -> str:
    """A table of cells, in which only Html is not escaped."""

    def row(cells: Sequence[Any], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{escaped(cell)}</{tag}>' for cell in cells) + '</tr>'

    lines = ([row(head, 'th')] if head else []) + [row(cells, 'td') for cells in rows]
    return f'<table{" class=wide" if wide else ""}>' + '\n'.join(lines) + '</table>'


def escaped(cell: Any) -> str:
    """A cell as HTML."""
    return cell if isinstance(cell, Html) else html.escape(str(cell))


def swatch(text: str, share: float, right: bool) -> Html:
    """A number on a ground that is the stronger, the larger its share of the row in [0, 1]."""
    color = '91, 140, 58' if right else '192, 57, 43'
    return marked(text, f'rgba({color}, {0.75 * share:.2f})', 'class="share"')


def shaded(words: Sequence[tuple[str, float]]) -> Html:
    """Words, each on a ground as strong as its part of the text's largest attention."""
    most = max((weight for _, weight in words), default=1.0) or 1.0
    colors = [(word, w, f'rgba(224, 122, 31, {0.8 * w / most:.2f})') for word, w in words]
    return Html(' '.join(marked(word, color, f'title="{w:.3f}"') for word, w, color in colors))


def marked(text: str, color: str, attributes: str) -> Html:
    """Text on a ground."""
    return Html(f'<mark style="background: {color}" {attributes}>{html.escape(text)}</mark>')
