"""Every good file loads and reads back; every bad file is refused with exactly the message beside it."""

from pathlib import Path

import pytest

from compress.config.document import dump_document
from compress.config.load import load_pipeline
from compress.errors import ConfigError, ConfigSyntaxError, ConfigValueError, StageOrderError

HERE = Path(__file__).parent
GOOD = sorted((HERE / "good").glob("*.yaml"))
BAD = sorted((HERE / "bad").glob("*.yaml"))


def test_the_collections_are_large_enough() -> None:
    assert len(GOOD) >= 5
    assert len(BAD) >= 45
    assert {path.stem for path in BAD} == {path.stem for path in (HERE / "bad").glob("*.txt")}


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_file_loads_and_its_resolved_form_loads_equal_from_anywhere(path: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(path, environ={})
    again = tmp_path / "resolved.yaml"
    again.write_text(pipeline.to_yaml(), encoding="utf-8")
    reloaded = load_pipeline(again, environ={})
    assert reloaded.config == pipeline.config
    assert reloaded.resolved == pipeline.resolved
    assert dump_document(reloaded.resolved) == again.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_file_is_refused_with_the_exact_message(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    expected = path.with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n")
    with pytest.raises(ConfigError, match=path.name.replace(".", r"\.")) as caught:
        load_pipeline(Path(path.name), environ={})
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("order_prune_after_export", StageOrderError),
        ("order_no_verify", StageOrderError),
        ("many_at_once", ConfigSyntaxError),
        ("duplicate_key", ConfigSyntaxError),
        ("tab_indent", ConfigSyntaxError),
        ("empty_file", ConfigSyntaxError),
        ("criterion_unknown", ConfigValueError),
        ("target_missing", ConfigValueError),
    ],
)
def test_the_class_of_the_error_says_what_kind_of_fault_it_is(name: str, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        load_pipeline(HERE / "bad" / f"{name}.yaml", environ={})
    assert type(caught.value) is kind
    assert caught.value.exit_code == 2
