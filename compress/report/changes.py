"""How is a change from the baseline to the slim network put? In words, in colour and as a bar."""

from collections.abc import Callable

from compress.report.markup import MISSING, escape, format_share

CHANGE_COLUMNS = ("", "baseline", "slim", "change", "slim / baseline")
CHANGE_KIND = "comparison"  # CSS class of such a table


def compare_figures(
    label: str,
    before: float | None,
    after: float | None,
    form: Callable[[float | None], str],
    less: str,
    more: str,
    *,
    more_is_better: bool = False,
) -> tuple[str, ...]:
    """Return the cells of `CHANGE_COLUMNS` (HTML) for a figure; () when neither value is known.

    Args:
        label: Plain text.
        before: Of the baseline.
        after: Of the slim network.
        form: Shows a value.
        less: The word for a smaller value, such as "faster".
        more: The word for a larger one, such as "slower".
        more_is_better: Whether a larger value is a gain.
    """
    if before is None and after is None:
        return ()
    change, bar = MISSING, ""
    if before and after:
        is_gain = after > before if more_is_better else after < before
        tone = "" if after == before else "gain" if is_gain else "loss"
        change = f'<span class="{tone}">{escape(describe_ratio(before, after, less, more))}</span>'
        bar = render_bar(after / before)
    return escape(label), escape(form(before)), escape(form(after)), change, bar


def compare_shares(label: str, before: float | None, after: float | None) -> tuple[str, ...]:
    """Return the cells of `CHANGE_COLUMNS` (HTML) for a share such as top-1."""
    change = MISSING if before is None or after is None else describe_points(before, after)
    return escape(label), format_share(before), format_share(after), escape(change), ""


def describe_ratio(before: float, after: float, less: str, more: str) -> str:
    """Return by how many times a figure became smaller or larger.

    >>> describe_ratio(2.0, 1.0, "faster", "slower"), describe_ratio(1.0, 1.5, "faster", "slower")
    ('2.00× faster', '1.50× slower')
    """
    ratio = before / after
    if f"{ratio:.2f}" == "1.00":
        return "about the same" if before != after else "the same"
    return f"{ratio:.2f}× {less}" if ratio > 1 else f"{1 / ratio:.2f}× {more}"


def describe_points(before: float, after: float) -> str:
    """Return a change of a share in percentage points.

    >>> describe_points(0.92, 0.9135), describe_points(0.5, 0.5)
    ('−0.65 points', 'no change')
    """
    points = 100 * (after - before)
    return "no change" if f"{points:.2f}" in ("0.00", "-0.00") else f"{points:+.2f} points".replace("-", "−")


def render_bar(share: float) -> str:
    """Return a bar that is filled as far as the slim network's figure reaches of the baseline's."""
    return (
        f'<svg class="share" role="img" aria-label="{share:.0%}"><rect width="100%" height="100%" rx="3"/>'
        f'<rect width="{min(1.0, share):.1%}" height="100%" rx="3"/></svg>'
    )
