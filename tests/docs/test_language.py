"""Words and headings of the pages: one established term for each thing, no riddles, no questions.

The list follows the faults in the language of the project (docs/glossary.md has the terms to use). Words that are also
plain English, such as "part" or "place", are only listed in the phrases in which they were private terms.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = ("README.md", "CONTRIBUTING.md", "docs", "compress")
EXEMPT = ("docs/experiments", "docs/decisions/0")  # kept as they were written
PLOTS = ("compress/report/plots.py", "compress/report/svg.py")  # a matplotlib figure is the field's term

# fault -> what to write
FAULTS: dict[str, str] = {
    r"untouched": "baseline",
    r"the original network|the original's|than the original\b": "baseline",
    r"whole networks?": "baseline; complete network; candidate",
    r"what (goes|stays|is left|is kept|stands|passes|was not|holds)": "removed / kept channels; final",
    r"what decides": "primary metric",
    r"what (\w+ )?(table|file|figure)s? (says|say|tells?)": "latency table, cost table",
    r"can(not)? be cut\b": "prunable, not prunable",
    r"(left|stays?|kept|stand) whole": "not prunable, excluded",
    r"trunks?": "residual stream",
    r"channels (that run )?along shortcuts": "residual stream",
    r"silenc(e|ed|es|ing)|in silence": "mask, masked; silently",
    r"the figure that decides|figures?": "metric, value, result",
    r"lessons?": "training task, imitation of the baseline",
    r"crews?": "ranks, workers, process group",
    r"teams?": "ranks, workers, process group",
    r"choice (that )?stands": "the choice is final",
    r"(is|are|was|were|be|and) said|says so|say so": "reported, logged, warned, stated",
    r"told": "reported, logged, distinguished",
    r"taken back": "rolled back",
    r"other predictions|predictions that are others": "prediction churn",
    r"spoilt|harder|stand as much|stands? less": "corrupted, perturbed, less robust",
    r"(other|another|more|that|such a) places?": "target device, runtime, location",
    r"images a call|milliseconds a call|joules of a place": "batch size",
    r"\d( %)? points?|(half|tenths?) (a|of a) point|points of (top-1|accuracy)": "percentage points",
    r"lost [−-]\d": "accuracy drop",
    r"meetings?": "latency loop",
    r"as (it was|they were|it stands|it comes)": "cached, unchanged",
    r"fault of its own|a bug in this program": "internal error",
    r"who(ever)? (reads|computes|wants)": "name the layer or the setting",
    r"remembered by|is no part of": "not part of the cache key",
    r"must be there|there is none|it is none|has none to": "state it: no ... found",
    r"it differs by|must equal the slim": "differs from PyTorch by",
    r"found by trying|tried and named": "test-pruned; listed with the reason",
}
ASKS = r"(?:What|Which|Where|How|Whether|Why|When|Does|Do|Is|Are|On which)\b"
DOCSTRING_ASKS = r"(?:What|Which|Where|How|Whether|Why|When|Who)\b"
QUESTION = re.compile(rf"^#+ .*\?\s*$|^#+ {ASKS}.*$", re.MULTILINE)
CODE = re.compile(r"^```(?:text|console)\n.*?^```", re.MULTILINE | re.DOTALL)
MADE = re.compile(r"^<!-- ([\w-]+): begin -->\n<!-- made .*?^<!-- \1: end -->", re.MULTILINE | re.DOTALL)


def _pages() -> list[Path]:
    found: list[Path] = []
    for name in PATHS:
        path = ROOT / name
        found += [path] if path.is_file() else sorted({*path.rglob("*.md"), *path.rglob("*.py")})
    return [path for path in found if not path.relative_to(ROOT).as_posix().startswith(EXEMPT)]


def prose(text: str) -> str:
    """Return a page with what programs wrote and inline code blanked; its lines keep their numbers."""
    for pattern in (MADE, CODE, re.compile(r"`[^`\n]+`"), re.compile(r"\]\([^)\n]*\)")):
        text = pattern.sub(lambda match: "\n" * match.group().count("\n"), text)
    return text


def _asking_docstrings(source: str) -> list[str]:
    """Return the first lines of docstrings that are questions or begin like one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    firsts = (docstring.partition("\n")[0].rstrip() for docstring in docstrings)
    return [first for first in firsts if re.match(DOCSTRING_ASKS, first) or first.endswith("?")]


def faults(text: str) -> list[str]:
    """Return "line: word -> what to write" for every fault of a page."""
    found = []
    plain = prose(text)
    for fault, better in FAULTS.items():
        pattern = re.compile(rf"\b(?:{fault})(?!\w)".replace(" ", r"\s+"), re.IGNORECASE)
        for match in pattern.finditer(plain):
            line = plain.count("\n", 0, match.start()) + 1
            found.append(f"{line}: '{' '.join(match.group().split())}' -> {better}")
    return found


@pytest.mark.parametrize("path", _pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_is_written_in_the_terms_of_the_project(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":  # names that files of earlier revisions have
        text = re.sub(r"^.*\bearlier revisions?\b.*$", "", text, flags=re.MULTILINE)
    if path.relative_to(ROOT).as_posix() in PLOTS:
        text = re.sub(r"\bfigure\b", "plot", text, flags=re.IGNORECASE)
    assert faults(text) == []
    if path.suffix == ".md":
        assert QUESTION.findall(prose(text)) == []
    else:
        assert _asking_docstrings(text) == []


def test_enough_pages_are_looked_at() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in _pages()}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/verification.md",
        "docs/methods/gsm.md",
        "compress/errors.py",
    } <= names
    assert "docs/experiments/README.md" not in names
    assert len(names) > 300


@pytest.mark.parametrize(
    "text",
    [
        "Next to the untouched network.",
        "What goes is decided.",
        "Channels that cannot be cut stay whole.",
        "Every figure\nis measured.",
        "It is masked, and that is said.",
        "the class that lost 1.3 points",
        "The network is kept as it was.",
    ],
)
def test_a_fault_is_found(text: str) -> None:
    assert faults(text)


def test_code_output_and_measured_tables_are_not_prose() -> None:
    assert faults("`figure`\n\n```text\nwhat is said\n```\n") == []
    mark = "<!-- made 2026-11-29 by `y` with source 012345678901 -->"
    assert faults(f"<!-- x: begin -->\n{mark}\n| not told apart |\n<!-- x: end -->\n") == []
    assert faults("a\n\n```yaml\nkey: 1  # the untouched network\n```\n") == ["4: 'untouched' -> baseline"]


@pytest.mark.parametrize("heading", ["# What is in it", "## Why not?", "### How sure is that", "## Which one?"])
def test_a_heading_that_asks_is_found(heading: str) -> None:
    assert QUESTION.findall(heading)
    assert not QUESTION.findall("## Whatever comes\n## Checks\n")


def test_a_docstring_that_asks_is_found() -> None:
    asking = 'def one():\n    """How many there are."""\n\ndef two():\n    """Is it so?"""\n'
    assert _asking_docstrings(asking) == ["How many there are.", "Is it so?"]
    assert _asking_docstrings('"""Howling."""\nx = 1\n') == []
