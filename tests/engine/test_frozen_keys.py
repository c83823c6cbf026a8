"""Resolved form and cache keys of the pipeline files of this repository, compared with the digests of an earlier code.

A changed digest means that stored results of users are computed again. Where that is intended, because a setting was
added, delete the line from `frozen_keys.json` and run `python tests/engine/test_frozen_keys.py`, which adds what is
missing. Versions of stages and libraries are not part of these digests, nor are the bytes of data files.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from compress.config.load import load_pipeline
from compress.cost.conditions import TableConditions
from compress.engine import keys
from compress.engine.keys import build_steps
from compress.storage.digest import digest_value, without_added

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipelines", "tests/config/good")
EXPECTED = Path(__file__).with_name("frozen_keys.json")
ONNX = """
name: onnx
data: {train: {arrays: train.npz}, evaluation: {unlabelled: photos}, validation: {yolo: boxes, images: photos}}
task: {name: embedding}
stages:
  - {stage: load, model: {onnx: net.onnx}}
  - {stage: export}
  - {stage: verify, gates: {max: {distance: 3}}, robustness: {shifted: {web: {folder: web}}}}
"""


@dataclass(frozen=True)
class Case:
    """A pipeline file with options of the command line and variables of the environment."""

    name: str
    file: str
    overrides: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()


FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.yaml"))]
QUICKSTART, LATENCY = "pipelines/quickstart.yaml", "pipelines/resnet20_latency.yaml"
CASES = [
    *(Case(file, file) for file in FILES),
    Case("deploy in verify", QUICKSTART, ("deploy={threads: 4, batch_size: 8, repeats: 7}", "stages.verify.threads=2")),
    Case("foreign table", LATENCY, ("deploy.table=tables/pi.json", "deploy.accept_foreign_table=true")),
    Case("millisecond budget", QUICKSTART, ("deploy={}", "stages.prune.target={latency_ms: 3}")),
    Case("paths of the command line", QUICKSTART, ("stages.load.weights=w.pt", "stages.load.model.factory=f.py:f")),
    Case("array folder of the command line", "pipelines/resnet20_cifar10.yaml", ("data.array_folder=arrays",)),
    Case("array folder of the environment", "pipelines/resnet20_cifar10.yaml", (), (("CIFAR10_ARRAYS", "arrays"),)),
    Case("untrained slim", "pipelines/quickstart_grasp.yaml", ("stages.1={stage: slim, target: {macs: 0.5}}",)),
    Case("untrained with repair", "pipelines/quickstart_grasp.yaml", ("stages.prune.repair=[scaling]",)),
    Case("own importance", QUICKSTART, ("stages.prune.criterion={torch_pruning: 'mine.py:Mine'}",)),
    Case("alds", "pipelines/resnet20_low_rank.yaml", ("stages.low_rank={stage: low_rank, allocation: alds, "
                                                     "target: {params: 0.5}}",)),
    Case("onnx file", "onnx.yaml"),
    Case("onnx file with preprocessing", "onnx.yaml", ("data.preprocessing={mean: [0.5]}",)),
]  # fmt: skip


class World:
    """A copy of the pipeline files whose data, weights and code are empty files.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in FOLDERS:
            shutil.copytree(
                ROOT / folder, root / folder, ignore=lambda _, names: [n for n in names if n[-5:] != ".yaml"]
            )
        (root / "onnx.yaml").write_text(ONNX, encoding="utf-8")
        onnx.save(_network(), str(root / "net.onnx"))
        for name in ("cwd/arrays/train.npz", "cwd/arrays/test.npz"):
            self.touch(str(root / name))

    def touch(self, text: str) -> None:
        """Make an empty file where a resolved path or reference leads to a file of this world."""
        place, _, _ = text.rpartition(":") if ".py:" in text else (text, "", "")
        path = Path(place)
        if path.is_relative_to(self.root) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def plain(self, value: Any) -> Any:
        """Return a plain value with a fixed name in place of the folder of this world."""
        return json.loads(json.dumps(value).replace(str(self.root), "ROOT"))

    def digests(self, case: Case) -> dict[str, Any]:
        """Return the digest of the resolved pipeline, and that of the key of each stage."""
        pipeline = load_pipeline(self.root / case.file, case.overrides, environ=dict(case.environ))
        for text in _texts(pipeline.resolved):
            self.touch(text)
        components = [step.components("input") for step in build_steps(pipeline)]
        for one in components:
            del one["version"]
            one["plugins"] = sorted(one["plugins"])
        return {
            "resolved": digest_value(json.dumps(self.plain(pipeline.resolved))),  # in the order of its keys
            "keys": [f"{one['stage']} {digest_value(self.plain(one))}" for one in components],
        }


def _network() -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="test")
    written = {"mean": [0.25], "std": [0.5], "resize": 9, "crop": [8, 8]}
    helper.set_model_props(model, {"compress.preprocessing": json.dumps(written)})
    return model


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def make_world(root: Path, patch: pytest.MonkeyPatch) -> World:
    """Make a world in which versions, this machine and the contents of files do not matter."""
    world = World(root)
    patch.chdir(root / "cwd")
    patch.setenv("HOME", str(root / "home"))
    patch.setattr(keys, "version", lambda name: "1")
    patch.setattr(keys, "digest_data", lambda source: digest_value(world.plain(without_added(source))))
    patch.setattr(keys, "digest_file", lambda path: path.relative_to(root).as_posix() if root in path.parents else "")
    patch.setattr(
        keys,
        "deploy_conditions",
        lambda one, int8=None: TableConditions(
            "cpu", 1, "", one.runtime, one.provider, one.threads, one.batch_size, one.precision
        ),
    )
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield make_world(tmp_path_factory.mktemp("frozen").resolve(), patch)


def test_every_file_is_frozen() -> None:
    assert len(FILES) >= 24
    assert [case.name for case in CASES] == list(json.loads(EXPECTED.read_text(encoding="utf-8")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resolved_form_and_keys_are_those_of_the_earlier_code(case: Case, world: World) -> None:
    assert world.digests(case) == json.loads(EXPECTED.read_text(encoding="utf-8"))[case.name]


if __name__ == "__main__":
    import tempfile

    known = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patching:
        here = make_world(Path(folder).resolve(), patching)
        frozen = {case.name: known.get(case.name) or here.digests(case) for case in CASES}
    EXPECTED.write_text(json.dumps(frozen, indent=1) + "\n", encoding="utf-8")
