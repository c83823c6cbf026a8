"""What a run writes down about where its result comes from."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compress.config.load import load_pipeline
from compress.report.provenance import describe_provenance, find_commit, read_licences

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with one committed file."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "model.py").write_text("net = 1\n", encoding="utf-8")
    git(folder, "add", "model.py")
    git(folder, "commit", "-q", "-m", "First")
    return folder


def test_a_commit_is_found_and_a_change_is_told(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert find_commit(repository) == {"commit": commit, "modified": False}
    (repository / "untracked.txt").write_text("a run", encoding="utf-8")
    assert find_commit(repository) == {"commit": commit, "modified": False}
    (repository / "model.py").write_text("net = 2\n", encoding="utf-8")
    assert find_commit(repository) == {"commit": commit, "modified": True}


def test_a_folder_outside_of_a_repository_has_no_commit(tmp_path: Path) -> None:
    assert find_commit(tmp_path) is None


def test_a_repository_without_a_commit_has_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert find_commit(tmp_path) is None


def test_variables_that_lead_git_elsewhere_do_not_count(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    (tmp_path / "other").mkdir()
    assert find_commit(tmp_path / "other") is None


def test_a_machine_without_git_has_no_commits(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_commit(repository) is None


@pytest.mark.parametrize(
    ("text", "licences"),
    [
        ("licence: MIT\ndata: {name: Cats, licence: CC0}\n", ("MIT", "CC0", "Cats")),
        ("licence: MIT\n", ("MIT", None, None)),
        ("data: Cats\n", (None, None, None)),
        ("licence: [MIT]\ndata: {name: 3}\n", (None, None, None)),
        ("- licence\n", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_licences_are_those_of_the_card(tmp_path: Path, text: str, licences: tuple[str | None, ...]) -> None:
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    warnings: list[str] = []
    assert tuple(read_licences(tmp_path, warnings.append).values()) == licences
    assert warnings == []


def test_no_card_states_nothing(tmp_path: Path) -> None:
    nothing = {"model": None, "data": None, "data_name": None}
    assert read_licences(tmp_path, pytest.fail) == nothing
    assert read_licences(None, pytest.fail) == nothing


@pytest.mark.parametrize("content", [b"licence: [", b"\xff\xfe\x00"])
def test_a_card_that_cannot_be_read_is_a_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.yaml").write_bytes(content)
    warnings: list[str] = []
    assert set(read_licences(tmp_path, warnings.append).values()) == {None}
    assert len(warnings) == 1
    assert "card.yaml' cannot be read, so that the report states no licence: " in warnings[0]


def test_everything_is_put_together(tmp_path: Path) -> None:
    pipeline = load_pipeline(ROOT / "pipelines" / "quickstart.yaml", environ={})
    (tmp_path / "model.onnx").write_bytes(b"a model")
    components: dict[str, Any] = {
        "data": {"train": "1", "evaluation": "2", "calibration": 10},
        "files": {"weights": "3", "factory": "4:build"},
    }
    made = describe_provenance(pipeline, components, {"model.onnx": tmp_path / "model.onnx"}, pytest.fail)
    assert made["files"] == {"model.onnx": hashlib.sha256(b"a model").hexdigest()}
    assert (made["data"], made["weights"], made["factory"]) == ({"train": "1", "evaluation": "2"}, "3", "4")
    assert made["licence"]["model"] == "Apache-2.0"
    assert made["licence"]["data"] == "CC BY-SA 3.0"
    assert made["git"].keys() == {"pipeline", "model"}


def test_a_network_of_torchvision_has_neither_card_nor_factory(tmp_path: Path) -> None:
    pipeline = load_pipeline(ROOT / "tests" / "config" / "good" / "torchvision.yaml", environ={})
    made = describe_provenance(pipeline, {"files": {"weights": "3"}}, {}, pytest.fail)
    assert (made["factory"], made["git"]["model"], made["licence"]["model"]) == (None, None, None)
