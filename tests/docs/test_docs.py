"""The pages of docs/ say what the code does: every method has one, with every setting and its default."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from compress.catalog import CRITERIA, GATED, METHODS, NETWORKS, SOURCES, TASKS
from compress.config.load import parse_pipeline
from compress.config.schema.low_rank import TrpConfig
from compress.config.schema.methods import (
    CsgdConfig,
    GatesMethodConfig,
    GrdaConfig,
    GregConfig,
    GsmConfig,
    IncRegConfig,
    RegrowConfig,
    TppConfig,
)
from compress.config.schema.model import LoadConfig, NetworkSection
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.prune import PruneConfig
from compress.config.schema.task import TaskConfig
from compress.config.schema.verify import GatesConfig, GatesFile, RobustnessConfig, VerifyConfig
from compress.networks.detectors import DETECTORS
from compress.networks.weights import WRAPPERS
from compress.tasks.base import Task

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parents[2] / "docs" / "methods"
SETTINGS = {
    "gsm": GsmConfig,
    "gates": GatesMethodConfig,
    "greg": GregConfig,
    "increg": IncRegConfig,
    "csgd": CsgdConfig,
    "grda": GrdaConfig,
    "regrow": RegrowConfig,
    "tpp": TppConfig,
    "trp": TrpConfig,
}


def test_every_method_has_a_page_and_stands_in_the_index():
    assert set(SETTINGS) == {*METHODS, "trp"}
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SETTINGS:
        assert (FOLDER / f"{name}.md").is_file()
        assert f"[{name}]({name}.md)" in index


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_stands_in_the_index_and_has_a_page_that_names_it_and_its_source(name):
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    page = re.search(rf"\[(?:\w+, )*{name}(?:, \w+)*\]\(([\w-]+\.md)\)", index)
    assert page, f"{name} has no link in docs/methods/README.md"
    text = (FOLDER / page[1]).read_text(encoding="utf-8")
    assert name in text
    for part in ("**When.**", "**Cost.**", "Source"):
        assert part in text, f"{page[1]} has no {part}"


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_page_has_every_setting_with_its_default_and_the_source(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    wanted = {key: field.default for key, field in SETTINGS[name].model_fields.items()}
    assert table.keys() == wanted.keys()
    for key, default in wanted.items():
        by_default = "that of training" if key == "momentum" else "sized for the run"
        assert table[key].strip() == (by_default if default is None else str(default))
    assert re.search(r"Sources?: .*arXiv:\d{4}\.\d{5}", text, re.DOTALL)


def test_settings_of_methods_are_keys_of_the_stage():
    assert {name for name in SETTINGS if name != "trp"} <= set(PruneConfig.model_fields)


def test_the_page_on_verification_names_every_gate_and_loads():
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    gates = GatesConfig.model_json_schema()["properties"]
    for name in ("max_drop", "max_rise", "min", "max"):
        for figure in GATED["classification"][name]:
            assert re.search(rf"^\| [^|]*`{figure}`[^|]*\| [^|]*`{name}`", text, re.MULTILINE), (name, figure)
    of_their_own, in_a_pipeline, shifted = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert GatesFile.model_validate(yaml.safe_load(of_their_own)).gates.max_drop == {"top1": 0.01}
    assert set(RobustnessConfig.model_validate(yaml.safe_load(shifted)["robustness"]).shifted) == {"web", "jpeg75"}
    (stage,) = yaml.safe_load(in_a_pipeline)
    config = VerifyConfig.model_validate(stage)
    assert config.robustness is not None
    assert set(config.gates.model_fields_set) == set(gates) - {"parity"}


def test_the_page_on_tasks_names_every_task_option_figure_and_source():
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name in (*TASKS, *(f"{source}:" for source in set(SOURCES) - {"folder", "idx", "torchvision"})):
        assert name in text, name
    for option in set(TaskConfig.model_fields) - {"name"}:
        assert f"{option}:" in text or f"`{option}`" in text, option
    for task in set(GATED) - {"classification"}:
        for figure in {name for names in GATED[task].values() for name in names}:
            assert f"`{figure}`" in text, figure
    for member in (
        "metric",
        "higher_is_better",
        "is_share",
        "label",
        "resamples",
        "is_spatial",
        "learns_from_original",
    ):
        assert hasattr(Task, member)
        assert f"| `{member}` |" in text, member


def test_yaml_on_the_page_on_tasks_is_valid(tmp_path: Path):
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    data = {"train": {"unlabelled": "a"}, "evaluation": {"unlabelled": "b"}}
    load = {"stage": "load", "model": {"torchvision": "resnet18"}, "weights": "w.pt"}
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "or\n" not in block]
    assert len(blocks) >= 4
    for block in blocks:
        given = yaml.safe_load(block)
        gates = given.pop("gates", {})
        source = {"data": {"train": given.pop("train"), "evaluation": data["evaluation"]}} if "train" in given else {}
        task = {} if not gates else {"task": "segmentation"}
        stages = [load, {"stage": "export"}, {"stage": "verify", "gates": gates}]
        whole = {"name": "page", "data": data, "stages": stages, **task, **source, **given}
        parse_pipeline(yaml.safe_dump(whole), tmp_path / "page.yaml")


def test_the_page_on_quantisation_names_every_setting():
    example, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "quantization.md").read_text("utf-8"), re.DOTALL)
    stage = next(stage for stage in yaml.safe_load(example) if stage["stage"] == "quantize")
    config = QuantizeConfig.model_validate(stage)
    assert config.model_fields_set == set(QuantizeConfig.model_fields)
    defaults = QuantizeConfig(stage="quantize").model_dump()
    assert {name: value for name, value in config.model_dump().items() if name != "exclude"} == {
        name: value for name, value in defaults.items() if name != "exclude"
    }


def test_the_workflow_to_copy_gives_commands_that_there_are():
    from typer.testing import CliRunner

    from compress.cli.commands import app

    path = ROOT / "docs" / "examples" / "github-actions.yml"
    steps = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["compress"]["steps"]
    commands = [step["run"].split() for step in steps if step.get("run", "").startswith("compress ")]
    assert [command[1] for command in commands] == ["validate", "run"]
    for _, name, *arguments in commands:
        said = CliRunner().invoke(app, [name, "--help"], prog_name="compress").stdout
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert option in said


def test_the_workflow_to_copy_takes_no_package_of_that_name_from_an_index():
    job = yaml.safe_load((ROOT / "docs" / "examples" / "github-actions.yml").read_text("utf-8"))["jobs"]["compress"]
    (install,) = [step["run"] for step in job["steps"] if "pip install" in step.get("run", "")]
    assert install == 'pip install "$COMPRESS"'
    assert job["env"]["COMPRESS"].startswith("git+https://")


def test_the_hook_for_pre_commit_validates():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["entry"] == "compress validate"
    for path in (ROOT / "pipelines").glob("*.yaml"):
        assert re.search(hook["files"], path.relative_to(ROOT).as_posix())


def test_the_page_on_bundles_names_every_option_check_and_exit_code(capsys):
    from compress.bundle import check
    from compress.bundle.describe import MIN_AGREEMENT_ROUNDED
    from compress.verification.other_runtimes import ROUNDED_WITHIN

    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        check.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    assert options == set(re.findall(r"--[a-z-]+", rows)) - {"--samples"}
    assert {int(code) for code in re.findall(r"^\| (\d) \|", text, re.MULTILINE)} == {
        check.PASSED,
        check.FAILED,
        check.USAGE,
        check.DAMAGED,
        check.UNAVAILABLE,
    }
    for name in ("integrity", "signature", "provider", "parity", "latency"):
        assert f"| `{name}` |" in text
    assert f"| 1 | {MIN_AGREEMENT_ROUNDED:g}: " in text
    assert f", or {100 * ROUNDED_WITHIN:g} % of a classifier's largest expected output" in text


def test_the_commands_on_bundles_have_the_options_shown():
    from typer.testing import CliRunner

    from compress.cli.commands import app

    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^compress bundle .*?(--[a-z]+)", text, re.MULTILINE)) | {"--allow-failed", "--license"}
    assert "--sign" in shown
    said = CliRunner().invoke(app, ["bundle", "--help"], prog_name="compress").stdout
    assert shown <= set(re.findall(r"--[a-z-]+", said))


def test_the_page_on_onnx_files_names_every_operator_and_its_example_is_valid():
    from compress.config.schema.model import LoadConfig
    from compress.onnx_import.operators.table import OPERATORS
    from compress.onnx_import.parity import HALF_TOLERANCE, TOLERANCE

    text = (ROOT / "docs" / "onnx-input.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.partition("## Operators")[2].partition("`If`")[0])
    assert listed == sorted(OPERATORS)
    examples = [yaml.safe_load(example) for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(examples) == 2
    for example in examples:
        assert LoadConfig.model_validate(example["stages"][0]).weights is None
    assert "may be 1e-5 (5e-3" in text
    assert (TOLERANCE, HALF_TOLERANCE) == (1e-5, 5e-3)


def test_the_page_on_networks_holds_sections_that_load_and_names_what_there_is():
    text = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert LoadConfig.model_validate(yaml.safe_load(example)).stage == "load"
    for name in (*NETWORKS, *NetworkSection.model_fields):
        assert re.search(rf"`?{name}[:`]", text), name
    for name in re.findall(r"`(\w+)` of torchvision take|`((?:ssd|retinanet|fcos)\w+)`", text):
        assert "".join(name) in DETECTORS
    assert all(f"`{name}`" in text for name in (*DETECTORS, *WRAPPERS))


def _constants() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "constants.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w.]+:\w+)` \| ([^|]+) \|", text, re.MULTILINE)


@pytest.mark.parametrize(("place", "said"), _constants())
def test_constants_that_steer_results_are_as_their_page_says(place, said):
    module, _, name = place.partition(":")
    value = getattr(importlib.import_module(module), name)
    numbers = [float(one) for one in said.strip(" ()").split(",")]
    assert (list(value) if isinstance(value, tuple) else [value]) == pytest.approx(
        numbers, abs=5e-4 * max(map(abs, numbers))
    )
