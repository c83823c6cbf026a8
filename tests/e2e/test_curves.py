"""Training curves reach the event files that TensorBoard draws."""

import sys

import pytest
from smallrun import Notes, World
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compress.engine.curves import require_tensorboard, written_curves
from compress.engine.runner import run_with_others
from compress.errors import PackageMissing


def _read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_told_is_written_and_the_rest_passed_on(tmp_path):
    notes = Notes()
    with written_curves(notes, tmp_path) as listener:
        listener.note("one")
        listener.warn("two")
        with listener.task("three", 2) as task:
            task.advance(1)
        listener.curve("training", 1, {"loss": 0.5, "learning_rate": 0.25})
        listener.curve("training", 2, {"loss": 0.125})
    assert (notes.notes, notes.warnings) == (["one"], ["two"])
    assert _read(tmp_path) == {"training/loss": [(1, 0.5), (2, 0.125)], "training/learning_rate": [(1, 0.25)]}


def test_a_run_writes_the_curves_of_each_stage(world: World):
    pipeline = world.load(world.values(), "stages.finetune.steps=10")
    outcome = run_with_others(pipeline, world.runs, writes_curves=True)
    assert outcome is not None
    curves = _read(outcome.folder / "tensorboard" / "3-finetune")
    assert {tag.rpartition("/")[2] for tag in curves} == {
        "loss", "learning_rate", "validation_top1", "images_per_second",
    }  # fmt: skip
    losses = curves["training_state/loss"]
    assert [step for step, _ in losses] == list(range(1, 11))
    record = next(stage for stage in outcome.report["stages"] if stage["stage"] == "finetune")["record"]
    wanted = [epoch["validation_top1"] for epoch in record["epochs"]]
    assert [value for _, value in curves["training_state/validation_top1"]] == pytest.approx(wanted)
    run_with_others(world.load(world.values(), "stages.finetune.steps=7"), world.runs, writes_curves=True)
    again = _read(outcome.folder / "tensorboard" / "3-finetune")["training_state/loss"]
    assert [step for step, _ in again] == list(range(1, 8))  # nothing is left of the curve before


def test_a_missing_package_is_named_before_anything_runs(monkeypatch, world: World):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PackageMissing, match="--tensorboard needs the package tensorboard") as caught:
        require_tensorboard()
    assert caught.value.hint == "pip install 'tensorboard>=2.18'"
    with pytest.raises(PackageMissing, match="--tensorboard needs"):
        run_with_others(world.load(world.values(), "name=other"), world.runs, writes_curves=True)
    assert not (world.runs / "other").exists()
