"""Killed, interrupted, started twice: what is done stays, and the end is the same as without any of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import smallrun
from smallrun import World, statuses

from compress.errors import RunLocked
from compress.storage.digest import digest_file

if sys.platform == "win32":
    pytest.skip("processes are killed and interrupted by POSIX signals", allow_module_level=True)

TIMEOUT_S = 120
INTERRUPTED = "Interrupted; the stages that were completed are kept, the same command goes on from there.\n"

# Stops in the middle of an epoch until a file is there; so that no test has to be quick.
HANGING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from compress.training.loop import TrainingRun
train_step = TrainingRun.train_step
def step(run, batches):
    if run.step == {step}:
        print("hanging", flush=True)
    while run.step == {step} and not os.path.exists({release!r}):
        time.sleep(0.01)
    return train_step(run, batches)
TrainingRun.train_step = step
from compress.cli.commands import app
app({arguments!r})
"""


def values(world: World) -> dict[str, Any]:
    """Four epochs of six steps, with all that is random while training."""
    changed = world.values()
    changed["stages"][2] |= {"steps": 24, "augmentation": {"crop_padding": 2, "flip": True}}
    return changed


def release(world: World) -> Path:
    """The file that lets a run go on."""
    return world.folder / "go_on"


@contextmanager
def hanging(world: World, step: int, said: list[str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Start a run that stops at a step of finetune; it is there when the block starts, what it said until then too."""
    arguments = ["run", str(world.write(values(world))), "--runs-dir", str(world.runs)]
    code = HANGING.format(step=step, arguments=arguments, release=str(release(world)))
    lines = [] if said is None else said
    with smallrun.start(code=code) as process:
        try:
            assert process.stdout is not None
            for line in iter(process.stdout.readline, ""):
                lines.append(line)
                if line == "hanging\n":
                    break
            assert lines[-1:] == ["hanging\n"], process.communicate(timeout=TIMEOUT_S)
            assert list(world.store.glob(".work/*/training_state.pt"))
            yield process
        finally:
            process.kill()


def weights_digest(world: World) -> str:
    return digest_file(world.runs / "chain" / "slim" / "weights.safetensors")


def test_a_run_that_was_interrupted_and_killed_ends_as_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "undisturbed")
    with hanging(world, 8) as process:  # in the second epoch
        done = world.call("run", values(world))
        assert done.exit_code == 4
        assert f"is held by process {process.pid} on " in done.stderr
        assert "Hint: Wait for that run to end" in done.stderr
        with pytest.raises(RunLocked, match=f"process {process.pid} "):
            world.run(values(world))
        process.send_signal(signal.SIGINT)
        release(world).touch()
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        release(world).unlink()
        assert process.returncode == 130
        assert "Training stopped after step 9 of 24; it can go on there.\n" in stdout
        assert stderr == INTERRUPTED

    said: list[str] = []
    with hanging(world, 11, said) as process:
        assert "Training goes on after step 9 of 24.\n" in said
        for _ in range(2):  # a second one does not wait for the step to end
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, stderr) == (130, INTERRUPTED)
        assert "Training stopped" not in stdout

    with hanging(world, 20) as process:  # in the fourth epoch; the first was not repeated
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, stderr) == (-signal.SIGKILL, "")

    progress = smallrun.Notes()
    resumed = world.run(values(world), progress=progress)
    assert statuses(resumed) == ["load unchanged", "prune unchanged", "finetune ran", "export ran", "verify ran"]
    assert "Training goes on after epoch 3 of 4." in progress.notes
    assert not any(note.startswith("epoch 3 of 4") for note in progress.notes)
    finetune = resumed.report["stages"][2]["record"]
    assert [epoch["epoch"] for epoch in finetune["epochs"]] == [1, 2, 3, 4]
    assert not list(world.store.glob(".work/*"))

    undisturbed = World(tmp_path / "undisturbed")
    outcome = undisturbed.run(values(undisturbed))
    assert statuses(outcome)[:3] == ["load unchanged", "prune unchanged", "finetune ran"]
    assert weights_digest(world) == weights_digest(undisturbed)


def test_an_unreadable_training_state_is_told_and_training_starts_again(world: World) -> None:
    with hanging(world, 8) as process:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
    (state,) = world.store.glob(".work/*/training_state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    progress = smallrun.Notes()
    outcome = world.run(values(world), progress=progress)
    assert outcome.verdict.passed
    assert any("training state is unreadable, training starts again" in text for text in progress.warnings)
    assert any(note.startswith("epoch 1 of 4") for note in progress.notes)


def test_a_kill_while_a_result_is_written_leaves_nothing_half_written(world: World) -> None:
    code = (
        "import os, sys, pathlib\nfrom compress import persist, runner\nfrom compress.cli.commands import app\n"
        "def save(artifact, folder):\n"
        "    (folder / 'recipe.json').write_text('{')\n    os.kill(os.getpid(), 9)\n"
        "runner.save_artifact = save\n"
        f"app(['run', {str(world.write(values(world)))!r}, '--runs-dir', {str(world.runs)!r}])\n"
    )
    with smallrun.start(code=code) as process:
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    assert len([path for path in world.store.glob(".partial/*") if path.is_dir()]) == 1
    progress = smallrun.Notes()
    outcome = world.run(values(world), progress=progress)
    assert statuses(outcome) == ["load unchanged", "prune unchanged", "finetune ran", "export ran", "verify ran"]
    assert progress.warnings == []
    assert not list(world.store.glob(".partial/*"))


def test_no_epoch_is_trained_again_when_the_result_was_not_stored(world: World) -> None:
    code = (
        "import os\nfrom compress import runner\nfrom compress.cli.commands import app\n"
        "save = runner.save_artifact\n"
        "def dying(artifact, folder):\n"
        "    os.kill(os.getpid(), 9) if list(folder.parent.parent.glob('.work/*/training_state.pt')) else None\n"
        "    save(artifact, folder)\n"
        "runner.save_artifact = dying\n"
        f"app(['run', {str(world.write(values(world)))!r}, '--runs-dir', {str(world.runs)!r}])\n"
    )
    with smallrun.start(code=code) as process:
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    progress = smallrun.Notes()
    outcome = world.run(values(world), progress=progress)
    assert statuses(outcome)[2] == "finetune ran"
    assert "Training goes on after epoch 4 of 4." in progress.notes
    assert not [note for note in progress.notes if note.startswith("epoch ")]
    assert not list(world.store.glob(".work/*"))


def test_two_runs_of_other_names_do_not_make_the_same_result_twice(world: World) -> None:
    """The second waits for the stage that the first is at; here the first dies, and the second goes on with it."""
    with hanging(world, 8) as first:
        path = world.write({**values(world), "name": "second"})
        second = smallrun.start("run", str(path), "--runs-dir", str(world.runs))
        with second:
            assert second.stdout is not None
            waits = "[3/5] finetune: another run is making the same result, this one waits for it\n"
            assert waits in iter(second.stdout.readline, "")
            first.kill()
            stdout, stderr = second.communicate()
        assert (second.returncode, stderr) == (0, "")
        assert "Training goes on after epoch 1 of 4." in stdout


def test_a_run_takes_what_another_made_while_it_waited(world: World) -> None:
    from compress.engine.runner import plan
    from compress.storage.lock import hold
    from compress.storage.store import Store

    finetuned = Store(world.store, warn=pytest.fail)
    key = [stage["key"] for stage in smallrun.read_lock(world, "chain")][2]
    entry = finetuned.get(key)
    assert entry is not None
    aside = world.folder / "aside"
    os.rename(entry.folder, aside)
    assert plan(world.load(world.values()), world.runs)[2].status == "run"
    with hold(finetuned.lock_folder(key)):
        path = world.write({**world.values(), "name": "second"})
        second = smallrun.start("run", str(path), "--runs-dir", str(world.runs))
        assert second.stdout is not None
        waits = "[3/5] finetune: another run is making the same result, this one waits for it\n"
        assert waits in iter(second.stdout.readline, "")
        os.rename(aside, entry.folder)
    with second:
        stdout, stderr = second.communicate()
    assert (second.returncode, stderr) == (0, "")
    assert "[3/5] finetune: unchanged\n[4/5] export: unchanged\n" in stdout
