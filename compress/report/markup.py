"""How do values become HTML? Escaping, tables and number formats; the only place where text turns into markup."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"


def escape(value: Any) -> str:
    """Return `value` as text that is safe inside elements and quoted attributes.

    >>> escape("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    return MISSING if value is None else html.escape(str(value), quote=True)


def render_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = (), kind: str = ""
) -> str:
    """Return a table inside a box that scrolls sideways on narrow screens.

    Args:
        head: Column titles, plain text.
        rows: Cells that are HTML already; the first of each row is its header.
        numeric: Columns that are set flush right.
        kind: CSS class of the table.
    """

    def attribute(column: int) -> str:
        return ' class="number"' if column in numeric else ""

    titles = "".join(f'<th scope="col"{attribute(i)}>{escape(title)}</th>' for i, title in enumerate(head))
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td{attribute(i)}>{cell}</td>" for i, cell in enumerate(rest, start=1))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
    table = f'<table class="{kind}">\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>'
    return f'<div class="scroll">{table}</div>\n'


def render_facts(facts: Iterable[tuple[str, Any]]) -> str:
    """Return a list of names and values (plain text); facts whose value is None are left out."""
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value is not None
    )
    return f'<dl class="facts">{entries}</dl>\n' if entries else ""


def render_split(facts: str, figure: str) -> str:
    """Return facts and a picture side by side where the screen is wide enough, else one above the other."""
    return f'<div class="split">{facts}{figure}</div>\n' if facts and figure else facts + figure


def render_section(title: str, *parts: str) -> str:
    """Return a titled section, or "" when every part is empty."""
    body = "".join(parts)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def render_details(summary: str, body: str) -> str:
    """Return a part that is folded until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def render_figure(svg: str, caption: str = "") -> str:
    """Return a picture with a caption (HTML), or "" when there is no picture."""
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{svg}{text}</figure>\n" if svg else ""


def format_count(value: float | None) -> str:
    """Return a count in three or four digits.

    >>> format_count(40551424), format_count(272474), format_count(64)
    ('40.55 M', '272.5 k', '64')
    """
    if value is None:
        return MISSING
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.1f} {unit}" if abs(scaled) >= 100 else f"{scaled:.2f} {unit}"
    return f"{value:g}"


def format_whole(value: int | None) -> str | None:
    """Return a whole number with its thousands set apart; None stays None.

    >>> format_whole(10000)
    '10,000'
    """
    return None if value is None else f"{value:,}"


def format_bytes(value: float | None) -> str:
    """Return a file size in powers of ten.

    >>> format_bytes(1094000), format_bytes(512)
    ('1.09 MB', '512 B')
    """
    return MISSING if value is None else f"{format_count(value)}{'' if abs(value) >= 1e3 else ' '}B"


def format_share(value: float | None) -> str:
    """Return a share in percent.

    >>> format_share(0.9173)
    '91.73 %'
    """
    return MISSING if value is None else f"{value:.2%}".replace("%", " %")


def format_interval(estimate: Any) -> str | None:
    """Return a share with its 95 % interval, in percent; None where it is not known.

    Args:
        estimate: {"value", "low", "high"}; anything may be missing.

    >>> format_interval({"value": -0.002, "low": -0.012, "high": 0.008})
    '−0.20 % (−1.20 to 0.80)'
    """
    values = estimate if isinstance(estimate, dict) else {}
    value, low, high = (values.get(key) for key in ("value", "low", "high"))
    if value is None:
        return None
    interval = "" if low is None or high is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{format_share(value)}{interval}".replace("-", "−")


def format_known_share(value: float | None) -> str | None:
    """Return a share in percent; None stays None."""
    return None if value is None else format_share(value)


def format_known(value: float | None) -> str | None:
    """Return a number with four significant digits; None stays None."""
    return None if value is None else format_number(value)


def format_ms(value: float | None) -> str:
    """Return milliseconds with three digits.

    >>> format_ms(0.41234), format_ms(1.5), format_ms(12.3456), format_ms(1234.5)
    ('0.412 ms', '1.50 ms', '12.3 ms', '1,234 ms')
    """
    if value is None:
        return MISSING
    digits = next((digits for limit, digits in ((1, 3), (10, 2), (100, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f} ms"


def format_seconds(value: float | None) -> str:
    """Return a duration.

    >>> format_seconds(0.04), format_seconds(4.21), format_seconds(83.0), format_seconds(7290.0)
    ('0.04 s', '4.2 s', '1 min 23 s', '2 h 1 min')
    """
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_number(value: float | None) -> str:
    """Return a number with four significant digits; whole numbers and large ones in full.

    >>> format_number(11723008.0), format_number(0.00123456), format_number(None)
    ('11,723,008', '0.001235', '–')
    """
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.4g}"


def format_measure(value: float | None, unit: str) -> str:
    """Return a checked value in its unit: "ms", "x", "share", "bytes" or any other text.

    >>> format_measure(1.6234, "x"), format_measure(0.0021, "share"), format_measure(3.2e-06, "")
    ('1.62×', '0.21 %', '3.2e-06')
    """
    if value is None:
        return MISSING
    known = {"ms": format_ms, "share": format_share, "bytes": format_bytes}
    if unit in known:
        return known[unit](value)
    if unit == "x":
        return f"{value:.2f}×"
    return f"{format_number(value)} {unit}".rstrip()
