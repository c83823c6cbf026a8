"""Rules between sections: each finds a problem in some bad file, none in a good one, and none that a refusal causes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.config.document import read_document
from compress.config.json_schema import json_schema
from compress.config.problems import Problem
from compress.config.rules import RULES
from compress.config.schema.pipeline import STAGE_SECTIONS, PipelineConfig
from compress.config.sections import Sections, read_valid, sections_of, validate
from compress.errors import ConfigError

HERE = Path(__file__).parent
VERIFY = "  - {stage: export}\n  - {stage: verify, gates: {min: {top1: 0.5}}}\n"
HEAD = """\
name: tiny
data: {train: {arrays: a.npz}, evaluation: {arrays: b.npz}, calibration: 8}
stages:
  - {stage: load, model: {factory: "nets.py:build"}, weights: none}
"""


def sections(path: Path) -> Sections:
    document = read_document(path)
    return sections_of(document, validate(document, PipelineConfig))


def readable(folder: str) -> Iterator[Sections]:
    for path in sorted((HERE / folder).glob("*.yaml")):
        try:
            document = read_document(path)
        except ConfigError:
            continue
        if isinstance(document.value, dict):
            yield sections(path)


def found(path: Path, text: str) -> list[str]:
    path.write_text(HEAD + text, encoding="utf-8")
    these = sections(path)
    return [f"{problem.text}" for rule in RULES for problem in rule(these)]


def test_each_rule_finds_a_problem_in_a_bad_file_and_none_in_a_good_one() -> None:
    bad, good = list(readable("bad")), list(readable("good"))
    assert len(bad) > 150
    assert len(good) > 8
    without = [rule.__name__ for rule in RULES if not any(list(rule(one)) for one in bad)]
    assert without == []
    problems: list[Problem] = [problem for rule in RULES for one in good for problem in rule(one)]
    assert problems == []


def test_each_stage_has_a_section() -> None:
    assert len(STAGE_SECTIONS) == 8
    for name, section in STAGE_SECTIONS.items():
        assert section.model_fields["stage"].annotation.__args__ == (name,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  - {stage: prune, target: {latency: 2}}\n" + VERIFY, 0),
        ("  - {stage: export}\n  - {stage: quantize, images: x}\n  - {stage: verify, gates: {min: {top1: 0.5}}}", 0),
        ("  - {stage: export}\n  - {stage: quantize, images: 9}\n  - {stage: verify, gates: {min: {top1: 0.5}}}", 1),
        ("  - {stage: export}\n  - {stage: verify, gates: {mim: {top1: 0.5}}}", 1),
        ("  - {stage: export}\n  - {stage: verify, gates: 0.5}", 0),
        (VERIFY + "deploy: {precision: fp16, provider: 3}", 0),
        (VERIFY + "deploy: {precision: fp16, threads: x}", 1),
        ("  - {stage: export}\n  - {stage: verify, gates: {min: {top1: 5}}}\ntask: {name: segmentation, loss: x}", 1),
    ],
)  # fmt: skip
def test_a_refused_setting_is_no_reason_for_further_problems(tmp_path: Path, text: str, expected: int) -> None:
    assert len(found(tmp_path / "a.yaml", text)) == expected, found(tmp_path / "a.yaml", text)


def test_a_section_is_read_without_its_refused_settings_and_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        HEAD + "  - {stage: finetune, epochs: 1, steps: 2, momentum: x, distillation: {features: 1}}\n"
        "  - {stage: low_rank}\n  - {stage: prune, target: {}, criterio: l1}\n  - {stage: prune}\n",
        encoding="utf-8",
    )
    document = read_document(path)
    assert validate(document, PipelineConfig) is None
    finetune = read_valid(document, ("stages", 1), STAGE_SECTIONS["finetune"])
    assert (finetune.epochs, finetune.steps, finetune.momentum) == (1, 2, 0.9)  # type: ignore[union-attr]
    these = sections_of(document, None)
    assert these.names == ("load", "finetune", "low_rank", "prune", "prune")
    assert [stage is None for stage in these.stages] == [False, False, False, False, True]


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    lacking = [
        f"{name}.{key}"
        for name, section in {"pipeline": schema, **schema["$defs"]}.items()
        for key, value in section.get("properties", {}).items()
        if key != "stage" and not _is_described(value)
    ]
    assert lacking == []


def _is_described(value: dict[str, object]) -> bool:
    return "description" in value or any("$ref" in one for one in [value, *value.get("anyOf", [])])
