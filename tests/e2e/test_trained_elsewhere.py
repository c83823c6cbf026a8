"""A run that stops before finetune, a training outside of it, and the run that goes on from those weights."""

import runpy
from pathlib import Path

import pytest
import torch
from smallrun import World

import compress


def test_out_and_in_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**world.values(), "name": "outside"}
    stopped = world.call("run", values, "--until", "finetune")
    assert stopped.exit_code == 0, stopped.output
    folder = world.runs / "outside"
    assert {file.name for file in folder.iterdir()} >= {"slim", "load_slim.py"}
    assert not (folder / "model.onnx").exists()
    model = runpy.run_path(str(folder / "load_slim.py"))["model"]
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.99)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    monkeypatch.chdir(tmp_path)
    continued = world.call("run", values, "--weights", "trained.pt")
    assert continued.exit_code == 0, continued.output
    assert "prune: unchanged" in continued.output
    final = compress.load(folder).state_dict()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
    again = world.call("run", values, "--weights", "trained.pt")
    assert "Nothing to do" in again.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--until", "verify"), 2, "--until must be a stage of"),
        (("--until", "load"), 2, "takes a torch network (prune, finetune, export), got load"),
        (("--weights", "missing.pt"), 4, "missing.pt"),
    ],
)
def test_what_cannot_be_gone_on_with(world: World, options: tuple[str, ...], code: int, message: str) -> None:
    ended = world.call("run", world.values(), *options)
    assert ended.exit_code == code, ended.output
    assert message in ended.output
