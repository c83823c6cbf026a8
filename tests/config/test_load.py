"""What `load_pipeline` does besides checking: overrides, paths, array folders, plug-ins, files that cannot be read."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.catalog import CRITERIA
from compress.config.document import dump_document, parse_value
from compress.config.load import load_pipeline, parse_pipeline
from compress.errors import ConfigError, ConfigSyntaxError, ConfigValueError


def message(path: Path, *overrides: str, seed: int | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigValueError, match=r"\S") as caught:
        load_pipeline(path, overrides, seed, environ or {})
    return str(caught.value)


# -- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "stage", "read", "expected"),
    [
        ("stages.prune.target.macs=0.4", 1, lambda s: s.target.macs, 0.4),
        ("stages.1.target.macs=4e-1", 1, lambda s: s.target.macs, 0.4),
        ("stages[1].target={params: 0.3}", 1, lambda s: s.target.params, 0.3),
        ("stages.4.epochs=3", 4, lambda s: s.epochs, 3),
        ("stages.2.distillation.weight=0.5", 2, lambda s: s.distillation.weight, 0.5),
        ("stages.verify.gates.max_drop.top1=0.02", 6, lambda s: s.gates.max_drop, {"top1": 0.02}),
        ("stages.prune.exclude=[a, b]", 1, lambda s: s.exclude, ("a", "b")),
        ("stages.load.model.kwargs.depth=20", 0, lambda s: s.model.kwargs, {"depth": 20}),
    ],
)
def test_override_sets_the_value(tiny: Path, override: str, stage: int, read, expected) -> None:
    config = load_pipeline(tiny, [override], environ={}).config
    assert read(config.stages[stage]) == expected


def test_later_overrides_win_and_the_seed_option_wins_over_all(tiny: Path) -> None:
    config = load_pipeline(tiny, ["name=a", "name=b", "seed=4"], seed=9, environ={}).config
    assert (config.name, config.seed) == ("b", 9)


def test_override_adds_a_second_target(tiny: Path) -> None:
    target = load_pipeline(tiny, ["stages.prune.target.params=0.4"], environ={}).config.stages[1].target
    assert target.given() == {"macs": 0.5, "params": 0.4}


def test_latency_target_needs_deploy_also_when_it_is_an_override(tiny: Path) -> None:
    text = message(tiny, "stages.prune.target.latency=0.5")
    assert text.startswith("--set stages.prune.target.latency: stages[1].target.latency needs a deploy section")
    pipeline = load_pipeline(tiny, ["stages.prune.target.latency=0.5", "deploy={threads: 2}"], environ={})
    assert pipeline.config.stages[-1].threads == 2, "verify measures where the model will run"
    assert load_pipeline(tiny, ["deploy={repeats: 7}"], environ={}).config.stages[-1].repeats == 7
    told = load_pipeline(tiny, ["deploy={threads: 2}", "stages.verify.threads=1"], environ={})
    assert told.config.stages[-1].threads == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.prune.target.macs=2", "--set stages.prune.target.macs: stages[1].target.macs must be at most 1, "
         "got 2.\nHint: 0.5 keeps half of the baseline's MACs."),
        ("stages.prune.targt.macs=0.4", "--set stages.prune.targt.macs: stages[1].targt is not a known key.\n"
         "Hint: did you mean 'target'?"),
        ("stages.prun.x=1", "--set stages.prun.x=1: no stage is called 'prun', the file has load, prune, finetune, "
         "low_rank, finetune, export, verify.\nHint: did you mean 'prune'?"),
        ("stages.finetune.epochs=3", "--set stages.finetune.epochs=3: 2 stages are called 'finetune'.\n"
         "Hint: say which one by its place: stages.2 or stages.4."),
        ("stages.9.epochs=3", "--set stages.9.epochs=3: stages has 7 entries, counted from 0."),
        ("name.first=x", "--set name.first=x: name holds 'tiny', which has no key 'first'."),
        ("seed", "--set seed: must have the form key=value.\nHint: such as --set stages.prune.target.macs=0.4"),
        ("=3", "--set =3: must have the form key=value.\nHint: such as --set stages.prune.target.macs=0.4"),
        ("data..train=3", "--set data..train=3: the key must be names joined by single dots."),
        ("seed=[1", "--set seed=[1: the value must be YAML: the YAML cannot be read: expected ',' or ']', but got "
         "'<stream end>' (while parsing a flow sequence)."),
        ("seed=!x 1", "--set seed=!x 1: the value must be YAML: the file must be a plain value, got the tag !x.\n"
         "Hint: remove the tag."),
        ("seed=", "--set seed: seed must be a whole number, got null."),
    ],
)  # fmt: skip
def test_bad_override_is_named(tiny: Path, override: str, expected: str) -> None:
    assert message(tiny, override) == expected


def test_stage_that_the_file_lacks_is_named_without_a_guess(tmp_path: Path, tiny: Path) -> None:
    text = tiny.read_text(encoding="utf-8").replace("  - stage: low_rank\n    relative_error: 0.1\n", "")
    other = tmp_path / "other.yaml"
    other.write_text(text, encoding="utf-8")
    assert message(other, "stages.low_rank.multiple_of=4") == (
        "--set stages.low_rank.multiple_of=4: the file has no stage 'low_rank', "
        "it has load, prune, finetune, finetune, export, verify."
    )


def test_override_does_not_hide_a_fault_of_the_file(tiny: Path) -> None:
    tiny.write_text(tiny.read_text(encoding="utf-8").replace("macs: 0.5", "macs: .nan"), encoding="utf-8")
    with pytest.raises(ConfigSyntaxError, match=r"macs must be finite, got \.nan"):
        load_pipeline(tiny, ["stages.prune.target.macs=0.5"], environ={})


def test_faults_of_file_overrides_and_seed_are_reported_together_in_this_order(tiny: Path) -> None:
    tiny.write_text(tiny.read_text(encoding="utf-8").replace("epochs: 2", "epochs: -2"), encoding="utf-8")
    lines = message(tiny, "stages.prune.blocks=-1", seed=-3).splitlines()
    assert lines == [
        f"{tiny}:17:13: stages[4].epochs must be above 0, got -2.",
        "--set stages.prune.blocks: stages[1].blocks must be a whole number of at least 0, auto or joint, got -1.",
        "--seed: seed must be at least 0, got -3.",
    ]


def test_endless_lists_of_faults_are_cut(tiny: Path) -> None:
    keys = "".join(f"key_{number:03}: 1\n" for number in range(80))
    tiny.write_text(tiny.read_text(encoding="utf-8") + keys, encoding="utf-8")
    text = message(tiny)
    assert text.endswith("... and 30 more problems.")
    assert text.count("is not a known key.") == 50


# -- paths -----------------------------------------------------------------------------------------------------------


def test_paths_in_the_file_are_relative_to_the_file(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_pipeline(tiny, environ={}).config
    load = config.stages[0]
    assert config.data.train.arrays == str(tiny.parent / "train.npz")
    assert config.data.evaluation.arrays == str(tiny.parent / "test.npz")
    assert load.weights == str(tiny.parent / "tiny.safetensors")
    assert load.model.factory == f"{tiny.parent / 'nets.py'}:build"


def test_paths_on_the_command_line_are_relative_to_the_current_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_pipeline(tiny, ["stages.load.weights=w.pt", "data.train={folder: images}"], environ={}).config
    assert config.stages[0].weights == str(here / "w.pt")
    assert config.data.train.folder == str(here / "images")
    assert config.data.evaluation.arrays == str(tiny.parent / "test.npz")


def test_home_is_expanded_and_module_factories_stay(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    config = load_pipeline(tiny, ["stages.load.weights=~/w.pt", "stages.load.model.factory=my.nets:build"]).config
    assert config.stages[0].weights == os.path.abspath("/home/someone/w.pt")
    assert config.stages[0].model.factory == "my.nets:build"


# -- array folder ----------------------------------------------------------------------------------------------------


def make_array_folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_environment_variable_takes_the_place_of_the_data(tiny: Path, tmp_path: Path) -> None:
    folder = make_array_folder(tmp_path / "cifar", "train.npz", "test.npz")
    pipeline = load_pipeline(tiny, environ={"TINY_DATA": str(folder)})
    assert pipeline.config.data.train.arrays == str(folder / "train.npz")
    assert pipeline.config.data.evaluation.arrays == str(folder / "test.npz")
    assert pipeline.resolved["data"]["array_folder_env"] is None
    again = parse_pipeline(pipeline.to_yaml(), tmp_path / "elsewhere.yaml")
    assert again.config == pipeline.config


def test_array_folder_goes_before_the_variable(tiny: Path, tmp_path: Path) -> None:
    folder = make_array_folder(tmp_path / "cifar", "train.npz", "test.npz")
    pipeline = load_pipeline(tiny, [f"data.array_folder={folder}"], environ={"TINY_DATA": "/nowhere"})
    assert pipeline.config.data.train.arrays == str(folder / "train.npz")


def test_empty_or_absent_variable_changes_nothing(tiny: Path) -> None:
    for environ in ({}, {"TINY_DATA": ""}):
        assert load_pipeline(tiny, environ=environ).config.data.train.arrays == str(tiny.parent / "train.npz")


def test_folder_of_the_variable_must_hold_both_files(tiny: Path, tmp_path: Path) -> None:
    folder = make_array_folder(tmp_path / "half", "train.npz")
    assert message(tiny, environ={"TINY_DATA": str(folder)}) == (
        "environment variable TINY_DATA: it must be a folder with train.npz and test.npz, "
        f"got '{folder}', which has no test.npz."
    )


def test_array_folder_of_an_override_is_named(tiny: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert message(tiny, f"data.array_folder={missing}") == (
        "--set data.array_folder: data.array_folder must be a folder with train.npz and test.npz, "
        f"got '{missing}', which is no folder."
    )


# -- plug-ins --------------------------------------------------------------------------------------------------------


def test_plugin_beside_the_file_registers_a_criterion(tiny: Path) -> None:
    (tiny.parent / "tiny_plugin.py").write_text(
        "from compress.catalog import CRITERIA\nCRITERIA.register('tiny_criterion', object())\n", encoding="utf-8"
    )
    before = list(sys.path)
    try:
        overrides = ["plugins=[tiny_plugin]", "stages.prune.criterion=tiny_criterion"]
        config = load_pipeline(tiny, overrides, environ={}).config
        assert config.stages[1].criterion == "tiny_criterion"
        assert sys.path == before
    finally:
        CRITERIA._entries.pop("tiny_criterion", None)
        sys.modules.pop("tiny_plugin", None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero (bad_plugin.py:1)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (bad_plugin.py:1)"),
        ("def\n", "SyntaxError: invalid syntax (bad_plugin.py, line 1)"),
        (
            "from compress.catalog import CRITERIA\nCRITERIA.register('l1', 1)\n",
            "criterion 'l1' is registered twice",
        ),
    ],
)
def test_plugin_that_cannot_be_imported_is_a_sentence(tiny: Path, code: str, reason: str) -> None:
    (tiny.parent / "bad_plugin.py").write_text(code, encoding="utf-8")
    assert message(tiny, "plugins=[bad_plugin]") == (
        f"--set plugins: plugins[0] must be a module that can be imported, got 'bad_plugin': {reason}."
    )


# -- files that cannot be read ---------------------------------------------------------------------------------------


def test_missing_file_names_the_closest_neighbour(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"tinny\.yaml: the pipeline file does not exist") as caught:
        load_pipeline(tiny.with_name("tinny.yaml"))
    assert caught.value.hint == "did you mean 'tiny.yaml'?"
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_pipeline(Path("/no/such/folder/a.yaml"))
    assert caught.value.hint is None


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the pipeline must be a file, got a folder"):
        load_pipeline(tmp_path)


def test_large_file_is_refused(tiny: Path) -> None:
    tiny.write_bytes(b"# " + b"x" * 1_000_000)
    with pytest.raises(ConfigSyntaxError, match="must be at most 1000000 bytes, it is larger"):
        load_pipeline(tiny)


def test_byte_order_mark_is_no_fault(tiny: Path) -> None:
    tiny.write_bytes(b"\xef\xbb\xbf" + tiny.read_bytes())
    assert load_pipeline(tiny, environ={}).config.name == "tiny"


def test_long_numbers_are_a_sentence(tiny: Path) -> None:
    with pytest.raises(ConfigSyntaxError, match=r"seed must have at most 4096 digits, got '9{40}' \.\.\.") as caught:
        parse_pipeline(tiny.read_text(encoding="utf-8") + "seed: " + "9" * 5000, tiny)
    assert len(str(caught.value)) < 300


# -- properties ------------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
finite = st.floats(-3.4e38, 3.4e38)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | words,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words.filter(lambda key: key != "<<"), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_dumped_values_are_read_back_equal(value: object) -> None:
    read = parse_value(dump_document(value))
    assert read == value
    assert repr(read) == repr(value)  # 1 == 1.0 == True, their types differ


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kwargs=st.dictionaries(words.filter(lambda key: key != "<<"), plain, max_size=3), seed=st.integers(0, 2**40))
def test_resolved_pipeline_loads_to_an_equal_one(tiny: Path, kwargs: dict[str, object], seed: int) -> None:
    override = "stages.load.model.kwargs=" + dump_document(kwargs)
    first = load_pipeline(tiny, [override], seed, environ={})
    assert first.config.stages[0].model.kwargs == kwargs
    second = parse_pipeline(first.to_yaml(), Path("/elsewhere/b.yaml"))
    assert second.config == first.config
    assert second.resolved == first.resolved


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"#%@`\n \tab0.", max_size=40))
def test_any_text_is_refused_with_a_config_error_that_says_where(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^any\.yaml"):  # no such text is a whole pipeline
        parse_pipeline(text, Path("any.yaml"))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("resnet18", "torchvision", "resnet18"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
        ("timm:convnext_tiny", "timm", "convnext_tiny"),
        ("pkg.nets:build", "factory", "pkg.nets:build"),
        ("net.py:build", "factory", "{folder}/net.py:build"),
        ("net.onnx", "onnx", "{folder}/net.onnx"),
    ],
)
def test_a_network_may_be_spelled_as_one_text(tiny: Path, text: str, kind: str, value: str) -> None:
    weights = "null" if kind == "onnx" else "w.pt"
    overrides = [f"stages.load.model={text}", f"stages.load.weights={weights}"]
    model = load_pipeline(tiny, overrides, environ={}).resolved["stages"][0]["model"]
    assert model[kind] == value.format(folder=Path.cwd())
