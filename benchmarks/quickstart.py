"""Output and picture of the quickstart, as the README shows them.

    python benchmarks/quickstart.py                       runs the quickstart, prints the end of its output
    python benchmarks/quickstart.py --write README.md     puts output and picture between the markers `quickstart`

The picture is an SVG made of the report's own verdict, values and plots; it needs no browser. Where Chromium or Chrome
is installed, `python tests/browser.py runs/quickstart/report.html FOLDER` takes pictures of the page itself.
"""

import argparse
import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from made import write_marked

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = "pipelines/quickstart.yaml"
PICTURE = ROOT / "docs" / "assets" / "report.svg"
SHOWN = ("MACs", "params", "size", "top1", "latency p50")  # rows of the last table
DRAWN = {  # beginning of a plot's title -> title in the picture
    "Top-1 over latency": "Accuracy, latency and MACs",
    "Channels of": "Channels before and after pruning",
}
WIDTH, MARGIN, GAP = 1000.0, 28.0, 24.0
PLOT = re.compile(r'<svg class="plot" viewBox="([^"]+)"[^>]*><title[^>]*>([^<]*)</title>(.*?)</svg>', re.DOTALL)
COLOR = re.compile(r"(--[\w-]+): (#[0-9a-f]{3,8})")


def last_table(output: str) -> str:
    """Return the end of a run's output, from the title of its last table on; paths relative to the current folder."""
    lines = output.rstrip().splitlines()
    titles = [number for number, line in enumerate(lines) if re.fullmatch(r"\S[^:]*:", line)]
    return "\n".join(lines[titles[-1] :])


def shortened(table: str) -> str:
    """Return a table with "..." in place of the rows that the README omits; other lines are kept."""
    kept: list[str] = []
    for number, line in enumerate(table.splitlines()):
        if number < 2 or not line.startswith("  ") or line.strip().startswith(SHOWN):
            kept.append(line)
        elif kept[-1] != "  ...":
            kept.append("  ...")
    return "\n".join(kept)


def plots_of(page: str) -> list[tuple[str, tuple[float, float], str]]:
    """Return title, size and content of every plot of a report's page, with the colours of its light theme."""
    colors: dict[str, str] = {}
    for name, value in COLOR.findall(page):
        colors.setdefault(name, value)
    found = []
    for box, title, content in PLOT.findall(page):
        width, height = (float(number) for number in box.split()[2:])
        found.append((title, (width, height), re.sub(r"var\((--[\w-]+)\)", lambda name: colors[name[1]], content)))
    return found


def value_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return metric, baseline and slim value of a report."""
    before, after = report["baseline"], report["slim"]
    return [
        ("MACs", f"{before['macs'] / 1e6:.2f} M", f"{after['macs'] / 1e6:.2f} M"),
        ("params", f"{before['params'] / 1e3:.1f} k", f"{after['params'] / 1e3:.1f} k"),
        ("size", f"{before['size_bytes'] / 1e6:.3f} MB", f"{after['size_bytes'] / 1e6:.3f} MB"),
        ("top-1", f"{100 * before['quality']['top1']:.2f} %", f"{100 * after['quality']['top1']:.2f} %"),
        ("latency p50", f"{before['latency_ms']['p50']:.3f} ms", f"{after['latency_ms']['p50']:.3f} ms"),
    ]


def draw(report: Mapping[str, Any], page: str) -> str:
    """Return the picture: verdict and values of a run above plots of its report.

    Args:
        report: Of `report.json`.
        page: Of `report.html`.
    """
    passed = report["verdict"]["passed"]
    tone = "#14763a" if passed else "#b42318"
    head = f"{report['name']}: {'passed' if passed else 'failed'}"
    parts = [_text(MARGIN + 20, 62, head, 26, tone, "bold"), *_table(value_rows(report))]
    found = plots_of(page)
    plots = [(title, *one[1:]) for start, title in DRAWN.items() for one in found if one[0].startswith(start)]
    wide, top = (WIDTH - 2 * MARGIN - GAP) / 2, 180.0
    tall = 60 + max(((wide - 32) * height / width for _, (width, height), _ in plots), default=0.0)
    for number, (title, (width, _), content) in enumerate(plots):
        x, scale = MARGIN + number * (wide + GAP), (wide - 32) / width
        parts += [
            f'<rect x="{x:g}" y="{top:g}" width="{wide:g}" height="{tall:g}" rx="10" fill="#fff" stroke="#e1e5ea"/>',
            _text(x + 16, top + 30, title, 15, "#1b2330", "bold"),
            f'<g transform="translate({x + 16:g} {top + 44:g}) scale({scale:.4f})">{content}</g>',
        ]
    height, card = top + tall + MARGIN, f'x="{MARGIN:g}" y="20" height="142"'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{WIDTH:g}" height="{height:g}" viewBox="0 0 {WIDTH:g} {height:g}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#f5f6f8"/>',
        f'<rect {card} width="{WIDTH - 2 * MARGIN:g}" rx="10" fill="#fff" stroke="#e1e5ea"/>',
        f'<rect {card} width="6" rx="3" fill="{tone}"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return one column for each metric, baseline above slim."""
    parts = [_text(MARGIN + 20, y, label, 14, "#5a6475") for y, label in ((122, "baseline"), (148, "slim"))]
    step = (WIDTH - 2 * MARGIN - 140) / len(rows)
    for number, (name, before, after) in enumerate(rows):
        x = MARGIN + 130 + number * step
        parts += [_text(x, 96, name, 14, "#5a6475"), _text(x, 122, before, 16, "#1b2330")]
        parts.append(_text(x, 148, after, 16, "#0f766e", "bold"))
    return parts


def _text(x: float, y: float, text: str, size: int, color: str, weight: str = "normal") -> str:
    said = html.escape(html.unescape(text))
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{color}">{said}</text>'


def main() -> None:
    """Run the quickstart, print the end of its output, write output and picture where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="page with the markers")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "compress", "run", PIPELINE, "--runs-dir", str(arguments.runs_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    output = shortened(last_table(done.stdout)).replace(f"{arguments.runs_dir}{os.sep}", "runs/")
    print(output)
    if arguments.write is not None:
        folder = arguments.runs_dir / "quickstart"
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        PICTURE.write_text(draw(report, (folder / "report.html").read_text(encoding="utf-8")), encoding="utf-8")
        place = os.path.relpath(PICTURE, arguments.write.resolve().parent)
        text = f"```text\n{output}\n```\n\n![Report of the quickstart: verdict, values, plots]({place})"
        write_marked(arguments.write, text, "quickstart", "python benchmarks/quickstart.py")


if __name__ == "__main__":
    main()
