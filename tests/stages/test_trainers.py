"""Lightning inside of finetune, where it is installed: the example of the documentation."""

import shutil
from pathlib import Path

import pytest
from smallrun import make_world
from typer.testing import CliRunner, Result

from compress.cli.commands import app

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "lightning_loop.py", tmp_path)
    world = make_world(tmp_path / "world")
    (tmp_path / "killed.py").write_text(
        "import lightning_loop\n"
        "def train(model, context, **kwargs):\n"
        "    marker = context.folder / 'killed'\n"
        "    if not marker.exists():\n"
        "        marker.touch()\n"
        "        lightning_loop.train(model, context, epochs=1)\n"
        "        raise SystemExit('killed')\n"
        "    assert (context.folder / 'last.ckpt').exists()\n"
        "    return lightning_loop.train(model, context, epochs=2, **kwargs)\n",
        encoding="utf-8",
    )
    values = world.values()
    values["stages"][2] = {"stage": "finetune", "own": str(tmp_path / "killed.py:train"), "kwargs": {"rate": 0.005}}
    path = world.write(values)
    stopped = call("run", path, "--runs-dir", world.runs)
    assert stopped.exit_code == 3, stopped.output
    ended = call("run", path, "--runs-dir", world.runs)
    assert ended.exit_code in (0, 6), ended.output
    assert "prune: unchanged" in ended.stdout
