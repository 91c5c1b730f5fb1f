"""A report as one HTML page: tables, figures and notes, with nothing that lies outside of the file.

What is given as text is escaped here; the functions return HTML for ``page`` and ``section``.
"""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from html import escape

DPI = 150  # of figures

_STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #5b6670; --line: #dfe3e7; --tint: #f5f7f9; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; border-bottom-color: #b9c1c8; }
tbody th { font-weight: 400; }
.numbers th + th, .numbers td { text-align: right; padding-left: .9rem; }
.numbers td { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.25rem; margin: 0 0 1rem;
  padding: .9rem 1.1rem; background: var(--tint); border-radius: .4rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
figure { margin: .75rem 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
ul.notes { margin: .75rem 0; padding: .6rem 1rem .6rem 2rem; max-width: 52rem; background: #fff8e6;
  border-left: 3px solid #d9a400; font-size: .92rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--soft); }
a { color: #0a58a8; }
@media (max-width: 36rem) {
  body { font-size: 15px; }
  main { padding: 1rem .9rem 3rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .45rem; }
}
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr, dl, ul.notes { break-inside: avoid; }
  .wide { overflow: visible; }
  a { color: inherit; text-decoration: none; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def page(title: str, blocks: Sequence[str]) -> str:
    """Return the page: a title and its blocks of HTML."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(blocks))


def section(name: str, title: str, blocks: Sequence[str]) -> str:
    """Return a section; ``name`` is what ``link`` leads to."""
    body = "\n".join(blocks)
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def link(name: str, text: str) -> str:
    """Return a link to a section of the page."""
    return f'<a href="#{escape(name)}">{escape(text)}</a>'


def facts(rows: Mapping[str, str], *, code: Sequence[str] = ()) -> str:
    """Return names with what they stand for; those in ``code`` in the type of code."""
    lines = []
    for name, value in rows.items():
        text = f"<code>{escape(value)}</code>" if name in code else escape(value)
        lines.append(f"<dt>{escape(name)}</dt><dd>{text}</dd>")
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return a paragraph, in a softer colour where that is asked for."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def notes(texts: Sequence[str]) -> str:
    """Return remarks that the reader is to see, nothing if there are none."""
    lines = "\n".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes">\n{lines}\n</ul>' if texts else ""


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    numbers: bool = True,
    linked: Mapping[str, str] | None = None,
) -> str:
    """Return a table, whose first column names the rows.

    Args:
        header: a name for each column.
        rows: texts.
        caption: what it shows.
        numbers: whether the other columns are numbers, at the right.
        linked: first texts of rows that lead to a section, with its name.
    """
    linked = linked or {}
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines.append(f"<thead><tr>{head}</tr></thead>\n<tbody>")
    for first, *rest in rows:
        named = link(linked[first], first) if first in linked else escape(first)
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f'<tr><th scope="row">{named}</th>{cells}</tr>')
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def folded(summary: str, content: str) -> str:
    """Return HTML that is shown when the reader asks for it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def figure(png: bytes, alt: str, *, dpi: int = DPI) -> str:
    """Return an image, in the size it has in inches."""
    width, height = (round(pixels * 96 / dpi) for pixels in struct.unpack(">II", png[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{source}" alt="{escape(alt)}" width="{width}" height="{height}"></figure>'


def figures(items: Sequence[str]) -> str:
    """Return figures side by side, as far as there is room."""
    return '<div class="figures">\n' + "\n".join(items) + "\n</div>"


def number(value: float, digits: int = 2) -> str:
    """Return a number with so many digits after the point and a real minus sign; a dash for NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}f}".replace("inf", "\N{INFINITY}").replace("-", "\N{MINUS SIGN}")


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits and a real minus sign; a dash for NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}".replace("inf", "\N{INFINITY}").replace("-", "\N{MINUS SIGN}")


def with_error(value: float, error: float, digits: int = 2) -> str:
    """Return a number with its standard error."""
    if math.isnan(value) or math.isnan(error):
        return number(value, digits)
    return f"{number(value, digits)} ± {number(error, digits)}"
