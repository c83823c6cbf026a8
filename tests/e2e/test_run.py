"""A whole pipeline: what it leaves behind, what a second run does, and what a change runs again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import smallrun
import torch
from smallrun import MIDDLE, Finished, World, statuses

import compress
from compress.cost.conditions import has_vnni
from compress.data.batches import evaluation_batches
from compress.data.from_config import Splits
from compress.engine.runner import PlannedStage, plan
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.onnx_file.io import is_quantized, load_onnx
from compress.storage.digest import add_digest
from compress.training.teacher_outputs import TeacherOutputs

STAGES = ["load", "prune", "finetune", "export", "verify"]
FIGURES = {"macs", "params", "size_bytes", "quality", "latency_ms"}


def evaluation_images(world: World) -> torch.Tensor:
    splits = Splits(world.load(world.values()).config.data)
    return next(evaluation_batches(splits.evaluation, 64))[0]


def recipe_of(world: World, name: str) -> Recipe:
    return Recipe.from_json((world.runs / name / "slim" / "recipe.json").read_text(encoding="utf-8"))


def check_slim_equals_file(world: World, name: str) -> None:
    """Check that the ONNX file and the reloaded torch checkpoint of a run are one network."""
    images = evaluation_images(world)
    session = onnxruntime.InferenceSession(world.runs / name / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = compress.load(world.runs / name)(images).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected) > 1


# -- one run ---------------------------------------------------------------------------------------------------------


def test_a_first_run_does_every_stage_and_passes(finished: Finished) -> None:
    assert finished.outcome.verdict.passed
    assert statuses(finished.outcome) == [f"{stage} ran" for stage in STAGES]
    assert finished.progress.warnings == []
    assert "[1/5] load: runs for the first time" in finished.progress.notes


def test_the_run_folder_holds_what_it_should(finished: Finished) -> None:
    folder = finished.outcome.folder
    assert folder == finished.world.runs / "chain"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        ".holder", ".lock", "lock", "model.onnx", "pipeline.yaml", "report.html", "report.json",
        "slim/digests.json", "slim/factory.py", "slim/meta.json", "slim/recipe.json", "slim/weights.safetensors",
    }  # fmt: skip
    assert not list((finished.world.store / ".partial").iterdir())
    assert not list((finished.world.store / ".work").iterdir())
    entries = [path for path in finished.world.store.iterdir() if not path.name.startswith(".")]
    assert len(entries) == len(STAGES)


def test_the_report_has_its_public_keys(finished: Finished) -> None:
    report = json.loads((finished.outcome.folder / "report.json").read_text(encoding="utf-8"))
    assert report == add_digest(finished.outcome.report)
    assert {"schema", "name", "verdict", "baseline", "slim", "stages", "environment"} <= set(report)
    assert (report["schema"], report["name"], report["verdict"]["passed"]) == (1, "chain", True)
    assert report["verdict"]["checks"]
    for check in report["verdict"]["checks"]:
        assert set(check) == {"name", "status", "value", "limit", "unit", "detail", "remedy"}
        assert check["status"] == "pass"
    for side in ("baseline", "slim"):
        assert set(report[side]) == FIGURES
        assert set(report[side]["quality"]) == {"top1", "worst_class", "calibration_error"}
        assert set(report[side]["latency_ms"]) == {"p50", "p90", "p95", "p99"}
    for stage in report["stages"]:
        assert {"stage", "status", "seconds"} <= set(stage)
    assert report["non_finite"] == []
    assert "versions" in report["environment"]


def test_the_figures_are_those_of_the_files(finished: Finished) -> None:
    report, folder = finished.outcome.report, finished.outcome.folder
    assert report["slim"]["size_bytes"] == (folder / "model.onnx").stat().st_size
    assert report["slim"]["macs"] <= 0.6 * report["baseline"]["macs"]
    assert report["slim"]["params"] == sum(p.numel() for p in compress.load(folder).parameters())
    assert report["baseline"]["quality"]["top1"] > 0.9


def test_the_file_and_the_reloaded_checkpoint_are_one_network(finished: Finished) -> None:
    check_slim_equals_file(finished.world, "chain")
    (edit,) = recipe_of(finished.world, "chain").edits
    assert isinstance(edit, RemoveChannels)
    model = onnx.load(finished.outcome.folder / "model.onnx")
    assert onnx.helper.get_node_attr_value(model.graph.node[0], "kernel_shape") == [3, 3]


def test_a_checkpoint_loads_to_the_same_bits_every_time(finished: Finished, tmp_path: Path) -> None:
    images = evaluation_images(finished.world)
    folder = finished.outcome.folder
    shutil.copytree(folder / "slim", tmp_path / "elsewhere")  # it reads alone
    with torch.no_grad():
        outputs = [
            compress.load(place, factory)(images)
            for place, factory in (
                (folder, None),
                (str(folder / "slim"), None),
                (tmp_path / "elsewhere", None),
                (folder, f"{smallrun.NETS}:build"),
            )
        ]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_resolved_pipeline_reads_alone_and_changes_nothing(finished: Finished) -> None:
    from compress.config.load import load_pipeline

    again = load_pipeline(finished.outcome.folder / "pipeline.yaml", environ={})
    assert {stage.status for stage in plan(again, finished.world.runs)} == {"unchanged"}


# -- the second run --------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_says_so(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world.runs / "chain" / "model.onnx",)}
    assert [stage.status for stage in plan(world.load(world.values()), world.runs)] == ["unchanged"] * 5
    progress = smallrun.Notes()
    outcome = world.run(world.values(), progress=progress)
    assert outcome.verdict.passed
    assert statuses(outcome) == [f"{stage} unchanged" for stage in STAGES]
    assert progress.notes == [
        *(f"[{index}/5] {stage}: unchanged" for index, stage in enumerate(STAGES, 1)),
        "Nothing to do: every stage is unchanged.",
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_second_run_and_a_plan_import_no_torch(world: World) -> None:
    path = world.write(world.values())
    code = (
        "import sys\nfrom compress.cli.commands import app\n"
        f"for command in ('run', 'plan'):\n    try: app([command, {str(path)!r}, '--runs-dir', {str(world.runs)!r}])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'torch_pruning', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = smallrun.start(code=code)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert sum(line.endswith("unchanged") for line in stdout.splitlines()) == 10


def test_what_lies_in_the_run_folder_is_made_again_from_the_store(world: World) -> None:
    folder = world.runs / "chain"
    wanted = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(b"changed by hand")
    shutil.rmtree(folder / "slim")
    outcome = world.run(world.values())
    assert statuses(outcome) == [f"{stage} unchanged" for stage in STAGES]
    assert (folder / "model.onnx").read_bytes() == wanted
    check_slim_equals_file(world, "chain")


def test_a_run_goes_on_after_its_folder_was_moved(world: World, tmp_path: Path) -> None:
    values = world.values(middle=MIDDLE[1:])
    text = smallrun.NETS.read_text(encoding="utf-8")
    (world.folder / "nets.py").write_text(f"{text}# another file\n", encoding="utf-8")
    values["stages"][0]["model"]["factory"] = "nets.py:build"
    world.run(values)
    shutil.move(world.folder, tmp_path / "moved")
    moved = World(tmp_path / "moved")
    stages = ["load", "finetune", "export", "verify"]
    assert statuses(moved.run(values)) == [f"{stage} unchanged" for stage in stages]
    again = moved.run(values, "stages.finetune.learning_rate=0.01")
    assert statuses(again)[:2] == ["load unchanged", "finetune ran"]


# -- a change --------------------------------------------------------------------------------------------------------


def test_a_changed_finetune_value_runs_exactly_what_depends_on_it(world: World) -> None:
    values = world.values()
    values["stages"][2]["learning_rate"] = 0.01
    planned = plan(world.load(values), world.runs)
    assert planned == [
        PlannedStage("load", "unchanged", ()),
        PlannedStage("prune", "unchanged", ()),
        PlannedStage("finetune", "run", ("learning_rate changed",)),
        PlannedStage("export", "run", ("its input changes: 'finetune' runs",)),
        PlannedStage("verify", "run", ("its input changes: 'export' runs",)),
    ]
    progress = smallrun.Notes()
    outcome = world.run(values, progress=progress)
    assert statuses(outcome) == ["load unchanged", "prune unchanged", "finetune ran", "export ran", "verify ran"]
    assert "[3/5] finetune: learning_rate changed" in progress.notes
    assert "[4/5] export: its input changed" in progress.notes
    check_slim_equals_file(world, "chain")
    back = world.run(world.values())
    assert statuses(back) == [f"{stage} unchanged" for stage in STAGES]


def changed_gate(values: dict[str, Any]) -> None:
    values["stages"][4]["gates"]["max_size_mb"] = 1.0


def changed_seed(values: dict[str, Any]) -> None:
    values["seed"] = 1


def changed_opset(values: dict[str, Any]) -> None:
    values["stages"][3]["opset"] = 19


def changed_nested(values: dict[str, Any]) -> None:
    values["stages"][2]["augmentation"] = {"flip": True}


def changed_mean(values: dict[str, Any]) -> None:
    values["data"]["preprocessing"]["mean"] = [0.4]


def left_out(values: dict[str, Any]) -> None:
    del values["stages"][2]


@pytest.mark.parametrize(
    ("change", "unchanged", "reasons"),
    [
        (changed_gate, 4, ("gates.max_size_mb changed",)),
        (changed_opset, 3, ("opset changed",)),
        (changed_nested, 2, ("augmentation.flip changed",)),
        (left_out, 2, ("runs for the first time",)),
        (changed_seed, 0, ("seed changed",)),
        (changed_mean, 0, ("data.preprocessing.mean changed",)),
    ],
)
def test_a_plan_names_what_changed(finished: Finished, change: Any, unchanged: int, reasons: tuple[str, ...]) -> None:
    values = finished.world.values()
    change(values)
    planned = plan(finished.world.load(values), finished.world.runs)
    assert [stage.status for stage in planned] == ["unchanged"] * unchanged + ["run"] * (len(planned) - unchanged)
    assert planned[unchanged].reasons == reasons


@pytest.mark.parametrize(
    ("file", "reason"),
    [("chain.safetensors", "files.weights"), ("train.npz", "data.train"), ("test.npz", "data.evaluation")],
)
def test_changed_files_count_by_content_and_not_by_date(world: World, file: str, reason: str) -> None:
    path = world.folder / file
    os.utime(path, (1, 1))
    assert plan(world.load(world.values()), world.runs)[0].status == "unchanged"
    path.write_bytes(path.read_bytes() + b"\0")
    assert plan(world.load(world.values()), world.runs)[0].reasons == (f"{reason} changed",)


def test_the_reason_is_still_known_after_a_run_that_failed(world: World) -> None:
    values = world.values()
    values["stages"][1]["target"] = {"macs": 0.0001}
    assert world.call("run", values).exit_code == 3
    values = world.values()
    values["stages"][2]["learning_rate"] = 0.01
    planned = plan(world.load(values), world.runs)
    assert planned[2].reasons == ("learning_rate changed",)
    assert not (world.runs / "chain" / "report.json").exists(), "the verdict of other settings stands beside these"


def test_a_changed_neighbour_of_the_factory_is_noticed(world: World) -> None:
    nets = world.folder / "code" / "nets.py"
    nets.parent.mkdir()
    nets.write_text(f"{smallrun.NETS.read_text()}\nimport parts\n")
    (nets.parent / "parts.py").write_text("WIDTH = 8")
    values = world.values()
    values["stages"][0]["model"]["factory"] = f"{nets}:build"
    world.run(values)
    assert plan(world.load(values), world.runs)[0].status == "unchanged"
    (nets.parent / "not_imported.py").write_text("")
    (nets.parent / ".#nets.py").symlink_to("somebody@somewhere.1234")  # an editor's lock
    assert plan(world.load(values), world.runs)[0].status == "unchanged"
    (nets.parent / "parts.py").write_text("WIDTH = 9")
    assert plan(world.load(values), world.runs)[0].reasons == ("files.factory changed",)


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_a_failed_gate_ends_with_exit_1_and_everything_is_written(world: World) -> None:
    values = world.values()
    values["stages"][4]["gates"]["max_size_mb"] = 0.0001
    for status in ("ran", "unchanged"):
        done = world.call("run", values, "--quiet")
        assert done.exit_code == 1
        assert done.stderr == ""
        report = json.loads((world.runs / "chain" / "report.json").read_text(encoding="utf-8"))
        assert report["verdict"]["passed"] is False
        assert {c["name"] for c in report["verdict"]["checks"] if c["status"] == "fail"} == {"max_size_mb"}
        assert [stage["status"] for stage in report["stages"]] == ["unchanged"] * 4 + [status]
    assert (world.runs / "chain" / "report.html").stat().st_size > 1000
    check_slim_equals_file(world, "chain")


def test_the_command_line_runs_a_pipeline_in_a_process_of_its_own(world: World) -> None:
    path = world.write({**world.values(), "name": "other"})
    process = smallrun.start("run", str(path), "--runs-dir", str(world.runs), "--set", "stages.finetune.steps=6")
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert "[1/5] load: unchanged\n" in stdout  # the store is shared by all runs
    assert "[3/5] finetune: runs for the first time\n" in stdout
    assert f"ONNX file: {world.runs / 'other' / 'model.onnx'}\n" in stdout
    report = json.loads((world.runs / "other" / "report.json").read_text(encoding="utf-8"))
    made = [check for check in report["verdict"]["checks"] if check["status"] != "skipped"]
    assert len(made) >= 12
    assert f"PASSED: {len(made)} checks made, none failed.\n" in stdout
    check_slim_equals_file(world, "other")


# -- other pipelines -------------------------------------------------------------------------------------------------


def test_a_pipeline_without_middle_stages_gives_the_network_itself(world: World) -> None:
    outcome = world.run({**world.values(middle=()), "name": "as-it-is"})
    assert outcome.verdict.passed
    assert statuses(outcome) == ["load unchanged", "export ran", "verify ran"]
    assert outcome.report["slim"]["macs"] == outcome.report["baseline"]["macs"]
    assert outcome.report["slim"]["quality"] == outcome.report["baseline"]["quality"]
    assert recipe_of(world, "as-it-is") == Recipe()
    check_slim_equals_file(world, "as-it-is")


def test_low_rank_pipeline(world: World) -> None:
    middle = ({"stage": "low_rank", "target": {"macs": 0.7}, "multiple_of": 1}, MIDDLE[1])
    outcome = world.run({**world.values(middle=middle), "name": "low-rank"})
    assert outcome.verdict.passed
    assert 0.4 * outcome.report["baseline"]["macs"] < outcome.report["slim"]["macs"]
    assert outcome.report["slim"]["macs"] <= 0.7 * outcome.report["baseline"]["macs"]
    assert {type(edit) for edit in recipe_of(world, "low-rank").edits} == {Factorize}
    check_slim_equals_file(world, "low-rank")


def test_repeated_stages_go_on_from_each_other(world: World) -> None:
    deeper = ({**MIDDLE[0], "target": {"macs": 0.35}}, {**MIDDLE[1], "steps": 8})
    rank = {"stage": "low_rank", "relative_error": 0.5, "multiple_of": 1}
    distilled = {**MIDDLE[1], "steps": 8, "distillation": {"weight": 0.5}}
    outcome = world.run({**world.values(middle=(*MIDDLE, *deeper, rank, distilled)), "name": "twice"})
    assert statuses(outcome)[:4] == ["load unchanged", "prune unchanged", "finetune unchanged", "prune ran"]
    assert outcome.verdict.passed
    assert outcome.report["slim"]["macs"] <= 0.35 * outcome.report["baseline"]["macs"]
    edits = [type(edit) for edit in recipe_of(world, "twice").edits]
    assert edits[:2] == [RemoveChannels, RemoveChannels]
    assert set(edits[2:]) == {Factorize}
    check_slim_equals_file(world, "twice")


def test_a_second_training_reads_what_the_teacher_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def close_epoch(outputs: TeacherOutputs) -> None:
        read.append((outputs.read, outputs.computed))
        original(outputs)

    original = TeacherOutputs.close_epoch
    monkeypatch.setattr(TeacherOutputs, "close_epoch", close_epoch)
    for rate in (0.02, 0.01):
        distilled = {**MIDDLE[1], "steps": 2, "learning_rate": rate, "distillation": {"weight": 0.5}}
        world.run({**world.values(middle=(MIDDLE[0], distilled)), "name": "taught"})
    assert read == [(0, 2), (1, 1)]
    off = {**distilled, "learning_rate": 0.03, "distillation": {"weight": 0.5, "cached": False}}
    world.run({**world.values(middle=(MIDDLE[0], off)), "name": "taught"})
    assert len(read) == 2


def test_removed_blocks_are_replayed(world: World) -> None:
    smallrun.add_weights(world, "residual")
    prune = {**MIDDLE[0], "blocks": 1, "target": {"macs": 0.4}}
    outcome = world.run(world.values("residual", middle=(prune, MIDDLE[1])))
    assert outcome.verdict.passed
    edits = recipe_of(world, "residual").edits
    assert [type(edit) for edit in edits] == [RemoveBlock, RemoveChannels]
    check_slim_equals_file(world, "residual")


def test_evaluating_on_the_training_images_is_warned_of(world: World) -> None:
    values = world.values()
    values["data"]["evaluation"] = dict(values["data"]["train"])
    values["stages"][1]["target"] = {"macs": 0.0001}  # ends the run early; the warning comes before any stage
    result = world.call("run", values)
    assert "Training and evaluation are the same images" in result.stderr
    assert "Training and evaluation are the same images" not in world.call("run", world.values()).stderr


def test_a_quantised_run_ends_in_the_int8_file_and_is_done_the_second_time(world: smallrun.World) -> None:
    values = {**world.values(), "name": "int8"}
    values["stages"].insert(-1, {"stage": "quantize", "images": 32, "reduce_range": has_vnni() is False})
    outcome = world.run(values)
    assert outcome.verdict.passed
    assert is_quantized(load_onnx(outcome.folder / "model.onnx"))
    assert not (outcome.folder / "float.onnx").exists()
    assert [share["stage"] for share in outcome.report["details"]["shares"]] == ["slimming", "quantize"]
    assert "Quantisation to INT8" in (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert {status.rpartition(" ")[2] for status in smallrun.statuses(world.run(values))} == {"unchanged"}
    again = world.run(values, "stages.quantize.per_channel=false")
    assert smallrun.statuses(again)[-2:] == ["quantize ran", "verify ran"]
    assert smallrun.statuses(again)[-3] == "export unchanged"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_place_that_is_not_there_ends_a_run_before_its_stages_only_where_it_is_required(
    world: smallrun.World,
) -> None:
    values = {**world.values(), "name": "places"}
    place = {"provider": "CUDAExecutionProvider"}
    for is_required in (False, True):
        values["stages"][-1]["also"] = [
            {**place, "required": is_required},
            {"runtime": "onnx_reference", "provider": "CPU"},
        ]
        result = world.call("run", values)
        if is_required:
            assert result.exit_code == 5, result.output
            assert (
                "Section 'verify.also[0]': Runtime 'onnxruntime': CUDAExecutionProvider was asked for" in result.output
            )
        else:
            assert result.exit_code == 0, result.output
            assert "also.onnx_reference" in result.output
            page = (world.runs / "places" / "report.html").read_text(encoding="utf-8")
            assert "CUDAExecutionProvider was asked for" in page
