"""Inline SVG from matplotlib, in the colours and fonts of the page.

matplotlib draws with stand-in colours. `_to_inline` replaces them by the CSS variables of `style.css`, so that one
picture is right on light, dark and paper. Text stays text: it can be searched, copied and read aloud.
"""

import io
import re
import warnings
from collections.abc import Callable
from importlib import resources
from typing import Any

from markupsafe import Markup, escape

INK, MUTED, GRID, BASELINE, SLIM, MARK, CARD = (f"#0102{number:02x}" for number in range(1, 8))
RUNS = tuple(f"#0102{number:02x}" for number in range(16, 22))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    BASELINE: "--baseline",
    SLIM: "--slim",
    MARK: "--mark",
    CARD: "--card",
    **{color: f"--run-{number}" for number, color in enumerate(RUNS, start=1)},
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress-report",  # else element ids differ from run to run
    "text.parse_math": False,  # a layer may be called "$x$"
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
WIDTH_INCHES = 4.8  # narrow, so that text stays readable on a phone
Draw = Callable[[Any], None]


def render_svg(key: str, title: str, height_inches: float, draw: Draw) -> Markup:
    """Return a drawing as an element of the page.

    Args:
        key: Unique in the page; prefix of the picture's ids.
        title: Text for screen readers.
        height_inches: Height of the drawing, which is `WIDTH_INCHES` wide.
        draw: Function that draws on a matplotlib `Figure` in the stand-in colours.
    """
    # Imported here: matplotlib takes a second to import, and neither the command line nor a run that finds everything
    # unchanged draws anything. `Figure` without pyplot keeps no global state and needs no display.
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser draws the text, so a glyph that matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True)
    return _to_inline(buffer.getvalue(), key, title)


def _to_inline(text: str, key: str, title: str) -> Markup:
    """Turn matplotlib's SVG file into an element of the page: its colours, its fonts, ids of its own, a title."""
    size = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index("<g id=") :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(<(?:path|clipPath)\b[^>]*?\bid=")', rf"\g<1>{key}-", body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"'DejaVu Sans'[^\";]*", "system-ui, sans-serif", body)
    for color, variable in VARIABLES.items():
        body = re.sub(rf"(fill|stroke): {color}", rf"\g<1>: var({variable})", body)
    return Markup(
        f'<svg class="plot" viewBox="{size.group(1) if size else ""}" role="img" aria-labelledby="{key}-title">'
        f'<title id="{key}-title">{escape(title)}</title>\n{body}'
    )


def to_standalone(picture: str) -> str:
    """Return a picture as an SVG file, in the light colours of the page."""
    sheet = resources.files("compress.report").joinpath("style.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]+)", sheet.partition("}")[0]))
    plain = re.sub(r"var\((--[\w-]+)\)", lambda found: colors[found[1]], picture)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{plain.replace('<svg', f'<svg {names}', 1)}\n"


def shorten(name: str, longest: int = 32) -> str:
    """Return a name cut to a length; of a module's path, the end is kept.

    >>> shorten("layer1.0.conv1"), shorten("a.very.long.path.of.modules.conv1", 14)
    ('layer1.0.conv1', '…modules.conv1')
    """
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
