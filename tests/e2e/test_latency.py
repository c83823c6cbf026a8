"""A budget in milliseconds from the command line: profile, run, the same widths from a saved table, and refusals."""

import json
import shutil

import onnx
from smallrun import MIDDLE, World, statuses
from steady import profile_by_macs, time_by_macs

from compress.cost.conditions import has_vnni
from compress.engine.keys import build_steps
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import is_quantized, load_onnx
from compress.storage.digest import add_digest

PRUNE = {"stage": "prune", "target": {"latency": 0.8}, "multiple_of": 2, "score_images": 32}


def _values(world: World, **deploy: object):
    values = world.values(middle=(PRUNE, MIDDLE[1]))
    # one call of a network this small is mostly overhead, which no cut changes; 64 batch size are not
    return values | {"deploy": {"threads": 1, "batch_size": 64, **deploy}}


def _widths(report: dict) -> dict[str, int]:
    record = next(stage["record"] for stage in report["stages"] if stage["stage"] == "prune")
    return {group["name"]: group["width_after"] for group in record["groups"]}


def _run(world: World, values, *arguments: str):
    done = world.call("run", values, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads((world.runs / values["name"] / "report.json").read_text(encoding="utf-8"))


def test_profile_writes_a_table_that_a_run_takes_over(world: World, monkeypatch) -> None:
    time_by_macs(monkeypatch)  # whether a real machine meets the target is its own affair
    table = world.folder / "device.json"
    done = world.call("profile", _values(world), "--out", str(table))
    assert done.exit_code == 0, done.output
    samples = json.loads(table.read_text(encoding="utf-8"))["samples"]
    assert f"{table}: {len(samples)} variants, " in done.stdout
    assert len(samples) >= 10

    values = _values(world, table="device.json")
    first = _run(world, values)
    record = next(stage["record"] for stage in first["stages"] if stage["stage"] == "prune")
    assert record["latency"]["measured_ratio"] <= 0.8 * 1.03
    assert count_onnx(world.runs / "chain" / "model.onnx").macs == record["macs_after"]
    onnx.checker.check_model(world.runs / "chain" / "model.onnx")
    again = world.run(values)
    assert statuses(again) == [f"{stage} unchanged" for stage in ("load", "prune", "finetune", "export", "verify")]


def test_a_table_of_another_machine_needs_consent_and_gives_the_same_widths_everywhere(world: World) -> None:
    table = world.folder / "device.json"
    assert world.call("profile", _values(world), "--out", str(table)).exit_code == 0
    content = json.loads(table.read_text(encoding="utf-8"))
    content["conditions"]["machine"] = "a telephone"
    table.write_text(json.dumps(add_digest(content)), encoding="utf-8")
    values = _values(world, table="device.json")
    refused = world.call("run", values, "--quiet")
    assert refused.exit_code == 4
    assert "a telephone in the table" in refused.stderr
    assert "Hint: With --accept-foreign-table" in refused.stderr

    first = _run(world, values, "--accept-foreign-table")
    record = next(stage["record"] for stage in first["stages"] if stage["stage"] == "prune")
    assert record["latency"]["rounds"] == [], "what another machine needs is not measured on this one"
    other = World(world.folder / "elsewhere")
    other.folder.mkdir()
    for file in ("train.npz", "test.npz", "chain.safetensors", "device.json"):
        (other.folder / file).write_bytes((world.folder / file).read_bytes())
    second = _run(other, values, "--accept-foreign-table")
    assert _widths(second) == _widths(first)


def test_profile_without_a_latency_target_is_refused(world: World) -> None:
    done = world.call("profile", world.values(), "--out", str(world.folder / "device.json"))
    assert done.exit_code == 2
    reason = "must have a prune or slim stage with a target of latency or latency_ms to be profiled, it has none."
    assert reason in done.stderr
    done = world.call("profile", _values(world), "--out", str(world.folder))
    assert done.exit_code == 2
    assert "--out must be a file to write" in done.stderr


def test_a_latency_that_no_width_reaches_is_refused(world: World) -> None:
    values = _values(world)
    values["stages"][1]["target"] = {"latency": 0.001}
    done = world.call("run", values, "--quiet")
    assert done.exit_code == 3
    assert "Stage 'prune' (2 of 5): Target 0.001 of the baseline's latency cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_a_table_that_is_missing_or_broken_is_refused(world: World) -> None:
    done = world.call("run", _values(world, table="none.json"), "--quiet")
    assert (done.exit_code, "none.json' does not exist." in done.stderr) == (4, True)
    (world.folder / "broken.json").write_text("{", encoding="utf-8")
    done = world.call("run", _values(world, table="broken.json"), "--quiet")
    assert (done.exit_code, "must be a latency table of schema 2" in done.stderr) == (4, True)


def test_a_provider_that_is_not_there_is_refused_before_anything_is_cut(world: World) -> None:
    shutil.rmtree(world.runs)
    done = world.call("run", _values(world, provider="NoSuchExecutionProvider"), "--quiet")
    assert done.exit_code == 5
    assert not any(path.is_dir() and not path.name.startswith(".") for path in world.store.glob("*"))
    assert "Section 'verify': Runtime 'onnxruntime': provider must be one of" in done.stderr


def test_rewrites_are_measured_again_for_more_repeats(world: World) -> None:
    def key(rewrites: str, repeats: int):
        values = _values(world, repeats=repeats)
        values["stages"][0]["rewrites"] = rewrites
        return build_steps(world.load(values))[0].fixed

    assert key("measured", 100) == key("measured", 100)
    assert key("measured", 100) != key("measured", 200)
    assert key("never", 100) == key("never", 200)


def test_a_budget_for_the_int8_file_is_met_by_it(world: World, monkeypatch) -> None:
    profile_by_macs(monkeypatch)
    values = _values(world, precision="int8")
    values["data"]["calibration"] = 64
    values["stages"][0]["rewrites"] = "never"  # they would be measured in the precision of the deployment
    values["stages"].insert(-1, {"stage": "quantize", "images": 32, "reduce_range": has_vnni() is False})
    report = _run(world, values)
    record = next(stage["record"] for stage in report["stages"] if stage["stage"] == "prune")
    assert record["latency"]["measured_ratio"] <= 0.8 * 1.03
    checks = {check["name"]: check for check in report["verdict"]["checks"]}
    assert "of its latency" in checks["int8_alone"]["detail"]
    assert report["details"]["latency"]["baseline_file"] == "int8"
    assert is_quantized(load_onnx(world.runs / "chain" / "model.onnx"))
    (table,) = (world.runs / ".store" / ".latency").glob("*.json")
    assert json.loads(table.read_text(encoding="utf-8"))["conditions"]["precision"].startswith("int8, ")

    del values["deploy"]["precision"]
    plan = world.call("plan", values)
    rows = [line.split()[:2] for line in plan.stdout.splitlines() if line.split()[0] in ("load", "prune", "quantize")]
    assert rows == [["load", "unchanged"], ["prune", "run"], ["quantize", "run"]], "the float baseline is the same"
