"""The report of the data doctor as HTML that loads nothing: pictures are data URIs, charts are inline SVG."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd
from PIL import ImageOps

from .images import open_image

_EXAMPLES, _SIDE, _BARS = 10, 240, 14  # cards of a finding, pixels of a picture, bars of a chart
_STYLE = """
.doctor {--ink: #1d2430; --soft: #5d6778; --card: #fff; --line: #dfe3ea; --mark: #b3541e; --bar: #4c78a8;
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: auto; padding: 8px 20px 40px}
@media (prefers-color-scheme: dark) {.doctor {--ink: #e6e9ef; --soft: #9aa4b5; --card: #1e242e; --line: #333c4a;
  --mark: #f0a06a; --bar: #6f9fd0}}
.doctor h1 {font-size: 24px; margin: 16px 0 4px} .doctor h2 {font-size: 18px; margin: 30px 0 2px}
.doctor b {color: var(--mark); margin-left: 4px} .doctor p {color: var(--soft); margin: 2px 0 10px}
.doctor h1, .doctor p, .doctor figcaption {overflow-wrap: anywhere}
.doctor pre {overflow-x: auto; font-size: 13px}
.doctor nav {display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0}
.doctor a {color: inherit; text-decoration: none; padding: 3px 12px; border-radius: 99px}
.doctor a, .doctor figure {background: var(--card); border: 1px solid var(--line)}
.doctor section {display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px}
.doctor section.charts {grid-template-columns: repeat(auto-fill, minmax(300px, 1fr))}
.doctor figure {margin: 0; padding: 10px; border-radius: 10px; min-width: 0; font-size: 13px}
@media (min-width: 480px) {.doctor figure.pair {grid-column: span 2}}
.doctor figure > div {display: flex; gap: 8px; margin-bottom: 6px}
.doctor img, .doctor i {flex: 1; min-width: 0; height: 150px; object-fit: contain}
.doctor i {display: grid; place-items: center; color: var(--soft); border: 1px dashed var(--line)}
.doctor figcaption > * {display: block} .doctor small {color: var(--soft)}
.doctor svg {width: 100%} .doctor rect {fill: var(--bar)} .doctor text {fill: var(--soft); font-size: 11px}
"""


def page(report) -> str:
    """A `doctor.Report` as a whole HTML page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(report.source)}</title>'
        "<style>body {margin: 0; background: light-dark(#f6f7f9, #14181f)}</style></head>"
        f"<body>{body(report)}</body></html>\n"
    )


def body(report) -> str:
    """The same as a part of another page, such as a notebook."""
    picture = functools.cache(lambda name: _picture(report.folder / name))
    links, sections = [], []
    for name, title, effect, rows in report.in_order():
        shown = rows if name == "misfits" else rows.head(_EXAMPLES)  # those are few, and to be looked at
        heading = f"{escape(title)} <b>{len(rows):,}</b>"
        links.append(f'<a href="#{name}">{heading}</a>')
        sections.append(f'<h2 id="{name}">{heading}</h2><p>{escape(effect)}</p><section>')
        sections += [_card(row, picture) for row in shown.to_dict("records")]
        sections.append("</section>")
        sections += [f"<p>and {len(rows) - len(shown):,} more</p>"] if len(rows) > len(shown) else []
    understood = "".join(f"<p>{escape(line)}</p>" for line in report.understood)
    return (
        f'<style>{_STYLE}</style><div class="doctor"><h1>{escape(report.source)}</h1>{understood}'
        f"<pre>{escape(report.counts())}</pre><nav>{''.join(links) or 'Nothing is wrong with it.'}</nav>"
        f'{"".join(sections)}<h2>What is in it</h2><section class="charts">{_charts(report.table, report.images)}'
        "</section></div>"
    )


def _card(row: dict, picture: Callable[[str], str]) -> str:
    names = [name for name in (row["image"], row["other"]) if name]
    pictures = "".join(
        f'<img alt="" src="{picture(name)}">' if picture(name) else "<i>no picture</i>" for name in names
    )
    where = ", ".join(filter(None, [*names, row["file"], f"row {row['row']}" if row["file"] else "", row["split"]]))
    caption = escape(shorten(row["caption"], 300))
    lines = f"<strong>{escape(row['detail'])}</strong><span>{caption}</span><small>{escape(where)}</small>"
    kind = "pair" if row["other"] else "one"
    return f'<figure class="{kind}"><div>{pictures}</div><figcaption>{lines}</figcaption></figure>'


def _picture(path: Path) -> str:
    """A data URI of a small JPEG; "" where the image cannot be read."""
    try:
        with open_image(path) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        return ""
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _charts(table: pd.DataFrame, images: pd.DataFrame) -> str:
    charts = {
        "Captions of an image": table.groupby("image").size(),
        "Words of a caption": table["caption"].str.split().str.len(),
        "Pixels of an image's width": images["width"], "Pixels of an image's height": images["height"],
    }  # fmt: skip
    drawn = [_bar_chart(f"{title}, median {n.median():g}", _binned(n)) for title, n in charts.items() if len(n)]
    if "label" in table:
        labels = table.drop_duplicates("image")["label"].value_counts()
        drawn.append(_bar_chart(f"Images of a label, of {len(labels):,} labels the largest", labels.head(_BARS)))
    return "".join(drawn)


def _binned(values: pd.Series) -> pd.Series:
    """How many of the whole numbers are in each of at most `_BARS` equal intervals, named by their ends."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _BARS)
    edges = np.arange(low, high + width + 1, width)
    names = [f"{edge:,}" + (f" to {edge + width - 1:,}" if width > 1 else "") for edge in edges[:-1]]
    return pd.Series(np.histogram(values, edges - 0.5)[0], names)


def _bar_chart(title: str, counts: pd.Series) -> str:
    bars = "".join(
        f'<text x="108" y="{17 * i + 12}" text-anchor="end">{escape(str(name)[:18]) or "(none)"}</text>'
        f'<rect x="114" y="{17 * i + 2}" width="{150 * n / counts.max():.1f}" height="13"></rect>'
        f'<text x="{118 + 150 * n / counts.max():.1f}" y="{17 * i + 12}">{n:,}</text>'
        for i, (name, n) in enumerate(counts.items())
    )
    chart = f'<svg viewBox="0 0 310 {17 * len(counts) + 4}">{bars}</svg>'
    return f"<figure><strong>{escape(title)}</strong>{chart}</figure>"
