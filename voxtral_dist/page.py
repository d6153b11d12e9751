"""Pages to look at in a browser: one HTML file each, without script and without any address to load from.

    chart = line_chart("loss", [Series("asr", steps, losses)], x_label="step")
    write(path, render("run.html", title="a run", chart=chart))

Every function takes any text: what looks like markup or mathematics is shown as it is. The charts are made in charts.py
and row_charts.py.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from voxtral_dist import atomic
from voxtral_dist.charts import Series, histogram, line_chart, scatter
from voxtral_dist.report import number
from voxtral_dist.row_charts import bar_chart, heatmap, interval_chart

__all__ = [
    "Series",
    "bar_chart",
    "heatmap",
    "histogram",
    "interval_chart",
    "line_chart",
    "number",
    "percent",
    "player",
    "render",
    "scatter",
    "without_folders",
    "write",
]


def player(flac: bytes) -> Markup:
    """Plays FLAC bytes; they lie in the page itself."""
    data = base64.b64encode(flac).decode()
    return Markup('<audio controls preload="none" src="data:audio/flac;base64,{}"></audio>').format(data)


def without_folders(text: str) -> str:
    """A message in which every absolute path is cut to its last part, for pages that are passed on."""
    return re.sub(r"(?<![\w.:/-])~?/(?:[^\s/'\",;]+/)+([^\s/'\",;]*)", r"\1", text)


def percent(value: float | None) -> str:
    """One decimal, ``n/a`` for a share that is undefined."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "without_folders": without_folders}
    return environment


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: a file in ``templates/``; it extends ``base.html``.
        values: what the template asks for; a missing one is an error. Text is escaped, :class:`Markup` is not.
    """
    return _environment().get_template(template).render(**values)


def write(path: Path, html: str) -> None:
    """Publish a page, readable by its owner alone: pages show transcripts."""
    atomic.write_bytes(path, html.encode("utf-8", "replace"), private=True)
