"""Every pipeline file that comes with the project is valid and can be planned."""

from pathlib import Path

import pytest
import smallrun

from compress.config.load import Pipeline, load_pipeline
from compress.engine.runner import plan

FILES = sorted((smallrun.ROOT / "pipelines").glob("*.yaml"))


def read(path: Path) -> Pipeline:
    return load_pipeline(path, environ={})


def test_all_pipeline_files_are_found() -> None:
    assert [path.stem for path in FILES] == [
        "detection_shapes", "quickstart", "quickstart_grasp", "quickstart_int8", "resnet20_cifar10", "resnet20_grasp",
        "resnet20_latency", "resnet20_low_rank", "resnet20_slim", "resnet56_cifar10", "resnet56_latency",
        "resnet56_narrow", "segmentation_shapes",
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pipeline_file_is_valid_and_named_as_its_run(path: Path) -> None:
    pipeline = read(path)
    assert pipeline.config.name == path.stem
    assert smallrun.call("validate", str(path)).exit_code == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pipeline_file_can_be_planned(path: Path, tmp_path: Path) -> None:
    pipeline = read(path)
    weights = Path(pipeline.resolved["stages"][0]["weights"])
    if weights.name != "none" and not weights.is_file():
        assert not path.stem.startswith("quickstart"), f"{weights} must come with the project"
        pytest.skip(f"its weights {weights.name} do not come with the project")
    planned = plan(pipeline, tmp_path)
    assert [stage.stage for stage in planned] == [stage.stage for stage in pipeline.config.stages]
    assert {stage.status for stage in planned} == {"run"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_network_of_a_pipeline_file_is_there(path: Path) -> None:
    from compress.checkpoint.rebuild import build_module
    from compress.stages.load import factory_spec

    module = build_module(factory_spec(read(path).config.stages[0].model))  # type: ignore[union-attr]
    assert sum(parameter.numel() for parameter in module.parameters()) > 10_000
