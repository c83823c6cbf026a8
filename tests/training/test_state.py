"""The saved state: whole or absent, of one run, kept or removed at the end."""

from pathlib import Path

import pytest
import torch

from compress.errors import ArtifactError
from compress.training.state import STATE_MARK, StateFile, read_state

IDENTITY = {"seed": 0, "epochs": 3.0, "task": "classification, top1"}


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state.pt")
    assert file.read(IDENTITY, pytest.fail) is None
    file.write({"identity": IDENTITY, "step": 4, "module": {"weight": torch.arange(3.0)}})
    state = file.read(IDENTITY, pytest.fail)
    assert state is not None
    assert state["step"] == 4
    assert state["module"]["weight"].tolist() == [0, 1, 2]
    assert file.path.read_bytes().startswith(STATE_MARK)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_of_another_run_names_the_differences(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state.pt")
    file.write({"identity": {**IDENTITY, "seed": 1, "hooks": "Gsm"}})
    with pytest.raises(ArtifactError, match=r"of one with seed 1 instead of 0, hooks Gsm instead of None"):
        file.read(IDENTITY, pytest.fail)
    many = {f"setting {number}": number for number in range(6)}
    with pytest.raises(ArtifactError, match=r"setting 3 None instead of 3, 4 more"):
        file.read({**many, **IDENTITY}, pytest.fail)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"no state"])
def test_a_damaged_state_is_warned_about_and_not_read(tmp_path: Path, damage) -> None:
    file, warnings = StateFile(tmp_path / "state.pt"), []
    file.write({"identity": IDENTITY})
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert file.read(IDENTITY, warnings.append) is None
    (warning,) = warnings
    assert warning.startswith("The saved training state is unreadable, training starts again: ")


def test_a_state_without_digest_is_that_of_an_older_version(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"identity": IDENTITY, "step": 2}, path)
    assert torch.load(read_state(path), weights_only=True)["step"] == 2
    state = StateFile(path).read(IDENTITY, pytest.fail)
    assert state is not None
    assert state["step"] == 2


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_file_stays_at_the_end_only_where_it_is_kept(tmp_path: Path, is_kept: bool) -> None:
    file = StateFile(tmp_path / "state.pt", is_kept)
    file.write({"identity": IDENTITY})
    file.finish()
    assert file.path.exists() is is_kept
    file.finish()  # a file that is gone is no error
