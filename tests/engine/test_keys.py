"""What a stage's result depends on, and what it does not."""

import pytest
import smallrun

from compress.config.load import load_pipeline
from compress.cost import conditions
from compress.engine.keys import build_steps
from compress.errors import ArtifactError

QUICKSTART = smallrun.ROOT / "pipelines" / "quickstart.yaml"


def _fixed(stage: str, *overrides: str) -> dict:
    steps = build_steps(load_pipeline(QUICKSTART, list(overrides), environ={}))
    return next(step.fixed for step in steps if step.entry.name == stage)


def test_how_training_is_done_and_saved_changes_no_result() -> None:
    for setting in ("save_minutes=1", "device=cpu", "compiled=true", "distillation.cached=false"):
        assert _fixed("finetune") == _fixed("finetune", f"stages.finetune.{setting}")
    assert _fixed("finetune") != _fixed("finetune", "stages.finetune.learning_rate=0.123")


def test_a_folder_in_place_of_a_checkpoint_is_called_one(tmp_path) -> None:
    rewound = ("stages.finetune.weights=rewound", f"stages.finetune.rewind_to={tmp_path}")
    with pytest.raises(ArtifactError, match=r"Checkpoint '.*' is a folder, not a file\."):
        _fixed("finetune", *rewound)
    with pytest.raises(ArtifactError, match=r"Checkpoint '.*gone' does not exist\."):
        _fixed("finetune", rewound[0], f"{rewound[1]}/gone")


def test_a_format_chosen_by_latency_depends_on_the_machine_and_the_threads(monkeypatch) -> None:
    def fixed(*overrides: str) -> dict:
        steps = build_steps(load_pipeline(QUICKSTART.with_name("quickstart_int8.yaml"), list(overrides), environ={}))
        return next(step.fixed for step in steps if step.entry.name == "quantize")

    auto, deploy = "stages.quantize.format=auto", "deploy={provider: CPUExecutionProvider, threads: 1}"
    assert "deploy" not in fixed()
    assert fixed(auto) == fixed(auto)
    assert fixed(auto, deploy) != fixed(auto, deploy.replace("threads: 1", "threads: 2"))
    before = fixed(auto)
    monkeypatch.setattr(conditions.os, "sched_getaffinity", lambda _: set(range(99)), raising=False)
    assert fixed(auto) != before


def test_the_number_of_variants_counts_where_nodes_cannot_be_timed() -> None:
    target, runtime = "stages.prune.target={latency: 0.5}", "deploy={runtime: openvino, provider: CPU, variants: %d}"
    assert _fixed("prune", target, runtime % 40) != _fixed("prune", target, runtime % 50)
