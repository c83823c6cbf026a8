"""Rewinding: weights of a checkpoint cut as the network was, tails of schedules, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import yaml
from fixtures import RecordingProgress
from safetensors.torch import save_file

from compress.checkpoint.rebuild import apply_edits, rewound
from compress.config.load import parse_pipeline
from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig
from compress.config.schema.training import FinetuneConfig, OriginalTrainingConfig
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError, NonFinite, StageError
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.report.records import TrainingRecord
from compress.report.stage_facts import list_rewinding
from compress.search import training
from compress.search.context import StageContext
from compress.search.teacher import BaselineTeacher
from compress.search.training import fit_settings
from compress.stages import finetune
from compress.stages.finetune import FinetuneStage
from compress.training.schedule import schedule
from compress.training.settings import FitSettings, learning_rate

SIGNATURE = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))
EARLY = 7  # seed of the network that the checkpoint holds; every weight and statistic differs from the seed 0


def spec(name: str) -> FactorySpec:
    return FactorySpec("factory", "nets:build", {"name": name})


@pytest.fixture
def early(tmp_path: Path):
    """Write the state of a network early in its training."""

    def write(name: str, file: str = "early.safetensors", **changed: torch.Tensor) -> Path:
        path = tmp_path / file
        state = nets.build(name, seed=EARLY).state_dict() | changed
        save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
        return path

    return write


@pytest.mark.parametrize("file", ["early.safetensors", "early.pt"])
def test_rewound_weights_are_those_of_the_checkpoint_without_what_was_removed(early, file) -> None:
    recipe = Recipe((RemoveBlock("body.1"), RemoveChannels({"body.2.conv1": (0, 5)})))
    module, conversions = rewound(spec("residual"), recipe, SIGNATURE, early("residual", file))
    whole, kept = nets.build("residual", seed=EARLY).state_dict(), [i for i in range(16) if i not in (0, 5)]
    expected = {name: value for name, value in whole.items() if not name.startswith("body.1.")}
    for name in [name for name in expected if name.startswith(("body.2.conv1", "body.2.bn1")) and expected[name].ndim]:
        expected[name] = expected[name][kept]
    expected["body.2.conv2.weight"] = expected["body.2.conv2.weight"][:, kept]
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert conversions == []
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("name", nets.NAMES)
def test_every_tiny_network_computes_what_the_cut_of_the_checkpoint_computes(early, name) -> None:
    group = {"concat": "body.left.0", "linear_head": "features.0.0"}.get(name, "body.0.0")
    removed = (0, 4, 8, 12) if name == "grouped" else (1,)  # one of each of the four groups of a grouped layer
    recipe = Recipe((RemoveChannels({group: removed}),))
    module, _ = rewound(spec(name), recipe, SIGNATURE, early(name))
    cut = apply_edits(nets.build(name, seed=EARLY), recipe, nets.EXAMPLE)
    assert torch.equal(module(nets.images()), cut(nets.images()))


def test_a_checkpoint_of_another_network_is_refused_with_layer_and_shapes(early) -> None:
    path = early("grouped")
    with pytest.raises(ArtifactError, match=r"body\.1\.0\.weight \(16, 4, 3, 3\) instead of \(16, 1, 3, 3\)") as caught:
        rewound(spec("depthwise"), Recipe(), SIGNATURE, path)
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith(f"Checkpoint '{path}' of rewind_to must fit the network exactly")
    assert (
        caught.value.hint == "A checkpoint to rewind to is of the complete network, as load builds it, before any cut."
    )
    with pytest.raises(NonFinite):
        rewound(spec("chain"), Recipe(), SIGNATURE, early("chain", **{"head.bias": torch.full((4,), torch.nan)}))
    with pytest.raises(ArtifactError, match="does not exist"):
        rewound(spec("chain"), Recipe(), SIGNATURE, path.with_name("none.pt"))


def test_factorised_layers_have_no_weights_to_go_back_to(early) -> None:
    recipe = Recipe((Factorize("body.1.0", "nc", (4,)),))
    with pytest.raises(StageError, match=r"low-rank factorisation, the recipe has factorised body\.1\.0"):
        rewound(spec("chain"), recipe, SIGNATURE, early("chain"))


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_tail_is_the_end_of_the_whole_schedule() -> None:
    for name in ("cosine", "one_cycle", "step"):
        whole = [schedule(step, 10, 0.2, name) for step in range(10)]
        for count in (1, 4, 9):
            assert [schedule(step, count, 0.2, name, 1 - count / 10) for step in range(count)] == whole[-count:]


def test_tails_by_hand() -> None:
    cosine = [schedule(step, 2, 0.0, "cosine", 0.5) for step in range(2)]
    assert cosine == pytest.approx([0.5, 0.5 * (1 - 2**-0.5)])  # of four steps the third and the fourth
    stepped = [schedule(step, 5, 0.0, "step", 3 / 8) for step in range(5)]
    assert stepped == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])  # of eight, with milestones at four and six
    rising = [schedule(step, 3, 0.5, "cosine", 0.25) for step in range(3)]
    assert rising == pytest.approx([1, 1, 0.5])  # of four, of which two rise


@pytest.mark.parametrize(
    ("rewinding", "epochs", "peak", "start"),
    [
        ({}, 10, 0.03, 0.0),
        ({"rewind_schedule": "whole"}, 10, 0.1, 0.0),
        ({"rewind_schedule": "tail", "rewind_epoch": 90}, 10, 0.1, 0.9),
        ({"rewind_schedule": "tail", "rewind_epoch": 0}, 10, 0.1, 0.0),
    ],
)
def test_a_rewound_schedule_has_the_peak_of_the_original(rewinding, epochs, peak, start, split) -> None:
    original = OriginalTrainingConfig(learning_rate=0.1, epochs=100)
    config = FinetuneConfig(stage="finetune", epochs=epochs, original=original, schedule="step", **rewinding)
    settings = fit_settings(config, 0, split, torch.nn.BatchNorm2d(3))
    assert settings.learning_rate == pytest.approx(peak)
    assert settings.schedule_start == pytest.approx(start)


def test_the_loop_follows_the_tail() -> None:
    settings = FitSettings(learning_rate=0.2, schedule="step", warmup_ratio=0.0, schedule_start=0.5)
    assert [learning_rate(settings, step, 4) for step in range(4)] == pytest.approx([0.02, 0.02, 0.002, 0.002])


@pytest.fixture
def split():
    return Split(
        "train", ArraySource(np.zeros((100, 1, 1, 3), np.uint8), np.zeros(100)), np.arange(100), Preprocessing()
    )


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path):
    """Fine-tune a chain network from which channels were removed."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=random.integers(0, 256, (96, 16, 16, 3), np.uint8), y=np.arange(96) % 4)
    source = ArraysSource(arrays=str(tmp_path / "images.npz"))
    data = Splits(
        DataConfig(train=source, evaluation=source, calibration=16, validation=16,
                   preprocessing=PreprocessingConfig(mean=(0.5,), std=(0.25,)))
    )  # fmt: skip
    weights = tmp_path / "baseline.safetensors"
    save_file(nets.build("chain").state_dict(), weights)
    recipe = Recipe((RemoveChannels({"body.0.0": (1, 3, 4, 5)}),))
    slim = apply_edits(nets.build("chain"), recipe, nets.EXAMPLE)
    baseline = Baseline(ModelMetrics(10**5, 1, 1, {}, {}), tmp_path / "b.onnx", weights)
    artifact = TorchModel(slim, spec("chain"), recipe, SIGNATURE, None, (), baseline)  # type: ignore[arg-type]

    def call(**config):
        (tmp_path / finetune.STATE_FILE).unlink(missing_ok=True)
        listener = RecordingProgress()
        stage = FinetuneStage(FinetuneConfig(stage="finetune", batch_size=16, **config))
        model, record = stage.run(
            artifact, StageContext(tmp_path, 0, data, listener, teacher=BaselineTeacher(artifact))
        )
        return model, record, listener

    return call


def test_training_starts_from_the_rewound_weights(run, early, monkeypatch) -> None:
    seen = []

    def fit(module, data, settings, *rest):
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return real(module, data, settings, *rest)

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    original = {"learning_rate": 0.1, "epochs": 8}
    tail = {"rewind_schedule": "tail", "rewind_epoch": 6, "original": OriginalTrainingConfig(**original)}
    _, record, told = run(steps=4, weights="rewound", rewind_to=str(early("chain")), warmup_ratio=0.0, **tail)
    cut = apply_edits(
        nets.build("chain", seed=EARLY), Recipe((RemoveChannels({"body.0.0": (1, 3, 4, 5)}),)), nets.EXAMPLE
    )
    assert all(torch.equal(seen[0][name], value) for name, value in cut.state_dict().items())
    assert (record.weights, record.rewind_epoch, record.rewind_schedule) == ("rewound", 6, "tail")
    assert record.peak_learning_rate == 0.1
    last = 0.1 * schedule(15, 16, 0.0)
    assert record.epochs[-1].learning_rate == pytest.approx(last)
    said = "\n".join(told.notes)
    assert "weights rewound to 'early.safetensors', epoch 6: the same channels and blocks are removed" in said
    assert "learning rate rewound to epoch 6 of 8: the last 2 epochs of the cosine schedule, run through in 1" in said
    assert list(list_rewinding(TrainingRecord.model_validate(record.to_dict()))) == [
        ("weights at the start", "rewound to epoch 6"), ("learning-rate schedule", "tail from epoch 6")
    ]  # fmt: skip


def test_the_record_has_the_singular_values_and_a_low_rate_is_warned_about(run, monkeypatch) -> None:
    _, record, told = run(steps=2, learning_rate=0.02)
    isometry = record.isometry
    assert set(isometry.to_dict()) == {"baseline", "before", "after", "images", "directions"}
    assert isometry.values["baseline"] > isometry.values["before"] > 0
    assert any(note.startswith("Mean Jacobian singular value: ") for note in told.notes)
    assert list(list_rewinding(TrainingRecord.model_validate(record.to_dict()))) == []
    monkeypatch.setattr("compress.search.isometry_record.LOW_RATIO", 10.0)
    _, record, told = run(steps=3, learning_rate=0.001)
    (warning,) = [text for text in told.warnings if "Jacobian" in text]
    assert "The peak is 0.001, 0.05 times that of sgd by default (0.02)." in warning
    assert warning in record.warnings
    assert record.peak_learning_rate == 0.001, "the rate itself stays"


def test_the_same_rewinding_of_whole_epochs_says_no_other_pace() -> None:
    original = OriginalTrainingConfig(learning_rate=0.1, epochs=8)
    config = FinetuneConfig(stage="finetune", epochs=2, rewind_schedule="tail", rewind_epoch=6, original=original)
    assert finetune._tail(config, 100).endswith("the last 2 epochs of the cosine schedule")
    assert replace(FitSettings(), schedule_start=config.schedule_start).schedule_start == 0.75


# -- pages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["rewinding", "pruning-at-initialisation"])
def test_examples_of_the_pages_are_pipelines(page, tmp_path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    stages = yaml.safe_load(example)
    if page == "rewinding":
        load = {"stage": "load", "model": {"torchvision": "resnet18"}, "weights": "w.pt"}
        stages = [load, *stages, {"stage": "export"}, {"stage": "verify"}]
        for name in re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)[:4]:
            default = FinetuneConfig.model_fields[name[0]].default
            assert name[1] == ("none" if default is None else default)
    data = {"train": {"arrays": "a.npz"}, "evaluation": {"arrays": "b.npz"}}
    parse_pipeline(yaml.safe_dump({"name": "page", "data": data, "stages": stages}), tmp_path / "page.yaml")
