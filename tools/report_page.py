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
th, .matrix td { white-space: nowrap }
.matrix td { min-width: 0 }
mark { color: inherit; padding: .1em .15em; border-radius: .2em }
.share { display: inline-block; min-width: 4rem; padding: .2rem .5rem; text-align: right }
svg { width: 21rem; max-width: 100%; height: auto; font-family: system-ui, sans-serif }
@media (max-width: 45rem) { /* a phone: each row becomes a list of names and values */
  body { margin: 1rem auto; font-size: 14px }
  .rows tr:first-child { display: none }
  .rows tr { display: block; padding: .5rem 0; border-bottom: 1px solid #e4e4e4 }
  .rows td { display: inline-block; min-width: 0; padding: 0 1rem 0 0; border: none }
  .rows td::before { content: attr(data-name) " "; color: #777 }
}
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


def table(rows: Iterable[Sequence[Any]], head: Sequence[str], kind: str = 'rows') -> str:
    """Returns a table of cells, which are escaped unless they are Html.

    `kind`: a phone shows 'rows' as lists; 'matrix' and 'facts' are narrow and stay tables.
    """

    def row(cells: Sequence[Any], tag: str) -> str:
        named = zip(head, cells, strict=True)
        return ''.join(
            f'<{tag} data-name="{html.escape(name)}">{escaped(cell)}</{tag}>'
            for name, cell in named
        )

    lines = [row(head, 'th'), *(row(cells, 'td') for cells in rows)]
    return f'<table class="{kind}">' + '\n'.join(f'<tr>{line}</tr>' for line in lines) + '</table>'


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


def marked(text: str, color: str, attributes: str = '') -> Html:
    """Returns text on a background color."""
    return Html(f'<mark style="background: {color}" {attributes}>{html.escape(text)}</mark>')
