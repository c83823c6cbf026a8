"""Tables of measured values say when, with which source and by which command they were made."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VALUES = "| network | top-1 |\n|---|---|\n| a | 91.2 % |\n"
EXPERIMENTS = sorted((ROOT / "docs" / "experiments").glob("*.md"))


@pytest.fixture
def made(monkeypatch):
    """The module of marks, which lies outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import made

    yield made
    sys.modules.pop("made", None)


def test_every_table_of_measured_values_in_the_readme_is_marked(made):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert made.unmarked(text) == []
    assert {name for name, _ in made.PLACE.findall(text)} == {"quickstart", "results"}


def test_every_table_of_results_is_marked_and_of_one_source(made):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert made.unmarked(text) == []
    assert len({source for _, _, source in made.marks(text)}) == 1
    assert {name for name, _ in made.PLACE.findall(text)} == {"torch-pruning"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_states_date_commit_and_command(made, path):
    text = path.read_text(encoding="utf-8")
    if re.match(r"\d{4}-", path.name):
        for fact in ("Date: 20", "Commit: `", "Command: `"):
            assert f"- {fact}" in text
        assert f"({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")
    else:
        assert made.unmarked(text) == []


@pytest.mark.parametrize(
    "values", ["91.2 %", "1.5×", "1.5x faster", "0.9 ms", "3.1 GB", "68 of 68", "12 s"], ids=lambda value: value
)
def test_a_table_without_a_mark_is_found(made, values):
    table = f"| network | value |\n|---|---|\n| a | {values} |\n"
    place = f"<!-- results: begin -->\n{table}<!-- results: end -->\n"
    assert made.unmarked(f"text\n\n{table}") == ["| network | value |"]
    assert made.unmarked(place) == ["| network | value |"]
    assert made.unmarked(place.replace("begin -->\n", f"begin -->\n{made.mark('make bench')}\n")) == []


def test_a_picture_without_a_mark_is_found_and_a_table_of_words_is_not(made):
    assert made.unmarked("![top-1](a.svg)\n") == ["![top-1](a.svg)"]
    assert made.unmarked("| exit code | meaning |\n|---|---|\n| 0 | passed |\n") == []


def test_a_marked_table_is_written_between_its_markers_and_replaces_the_last_one(made, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("head\n<!-- results: begin -->\n<!-- results: end -->\ntail\n", encoding="utf-8")
    for command in ("make demo", "make bench"):
        made.write_marked(path, VALUES.rstrip(), "results", command)
    text = path.read_text(encoding="utf-8")
    assert [(command, source) for _, command, source in made.marks(text)] == [("make bench", made.source_digest())]
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
    assert made.unmarked(text) == []
    with pytest.raises(ValueError, match="no place for a table"):
        made.write_marked(path, VALUES, "others", "make bench")


def test_the_digest_follows_the_source(made, tmp_path, monkeypatch):
    monkeypatch.setattr(made.compress, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "__init__.py").write_text("a = 1\n", encoding="utf-8")
    before = made.source_digest()
    (tmp_path / "__init__.py").write_text("a = 2\n", encoding="utf-8")
    assert made.source_digest() != before


def test_the_check_on_the_command_line_fails_for_another_source(made, tmp_path, monkeypatch, capsys):
    path = tmp_path / "page.md"
    for source, code in ((made.source_digest(), 0), ("0" * 12, 1)):
        text = f"{made.mark('make bench', source=source)}\n{VALUES}"
        path.write_text(f"<!-- results: begin -->\n{text}<!-- results: end -->\n", encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["made.py", str(path)])
        with pytest.raises(SystemExit) as ended:
            made.main()
        assert ended.value.code == code
    assert f"source {'0' * 12}: make bench" in capsys.readouterr().out
