"""What a pipeline file says about training is what the loop is told."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig
from compress.config.schema.training import (
    AugmentationConfig,
    DistillationConfig,
    FinetuneConfig,
    OriginalTrainingConfig,
)
from compress.data.batches import Augmentation
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import NonFinite
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, TorchModel
from compress.model.recipe import Recipe
from compress.model.stage_records import EpochRecord, Probe
from compress.progress import SilentProgress
from compress.search import training
from compress.search.context import StageContext
from compress.search.training import fit_settings
from compress.stages import finetune
from compress.stages.finetune import FinetuneStage
from compress.tasks.base import Task
from compress.tasks.classification import Classification
from compress.tasks.imitation import Embedding, Imitation
from compress.tasks.regression import Regression
from compress.tasks.segmentation import Segmentation
from compress.training.settings import FitResult, FitSettings

GIVEN = {
    "steps": 7,
    "batch_size": 3,
    "learning_rate": 0.3,
    "momentum": 0.4,
    "weight_decay": 0.5,
    "warmup_ratio": 0.6,
    "label_smoothing": 0.7,
    "optimizer": "adamw",
    "schedule": "step",
    "gradient_clip": 0.8,
    "accumulation": 2,
    "ema": 0.9,
    "average_ratio": 0.25,
    "precision": "bf16",
    "device": "cpu",
    "compiled": True,
    "sync_batch_norm": True,
    "save_minutes": 1.5,
}


NORMED = nn.BatchNorm2d(3)
HUNDRED = Split(
    "train", ArraySource(np.zeros((100, 1, 1, 3), np.uint8), np.zeros(100)), np.arange(100), Preprocessing(scale=1.0)
)


def test_every_setting_reaches_the_loop() -> None:
    varied = {"crop_padding": 1, "flip": True, "mixup": 0.2, "cutmix": 0.4}
    varied |= {"resized_crop": 0.5, "policy": "rand_augment", "magnitude": 3, "erasing": 0.1}
    config = FinetuneConfig(stage="finetune", augmentation=AugmentationConfig(**varied), **GIVEN)
    apart = {"stage", "epochs", "augmentation", "distillation", "original", "probe", "weights", "norms"}
    rewinding = {"rewind_to", "rewind_schedule", "rewind_epoch"}
    elsewhere = {"own", "kwargs", "trained", "quantization_aware"}
    assert set(FinetuneConfig.model_fields) == {*GIVEN, *apart, *rewinding, *elsewhere}
    settings = asdict(fit_settings(config, 9, HUNDRED, NORMED))
    assert {name: settings[name] for name in GIVEN} == GIVEN
    assert settings["seed"] == 9
    assert settings["augmentation"] == varied
    assert {field.name for field in fields(Augmentation)} == set(AugmentationConfig.model_fields)
    defaults = asdict(FitSettings())
    assert all(settings[name] != defaults[name] for name in GIVEN)


def test_adamw_has_a_rate_of_its_own_by_default() -> None:
    rates = [
        fit_settings(FinetuneConfig(stage="finetune", epochs=1, optimizer=name), 0, HUNDRED, NORMED).learning_rate
        for name in ("sgd", "adamw")
    ]
    assert rates == [0.02, 0.001]


def test_gradients_are_clipped_where_no_norm_tames_them() -> None:
    given, other = (
        FinetuneConfig(stage="finetune", epochs=1),
        FinetuneConfig(stage="finetune", epochs=1, gradient_clip=5),
    )
    clips = [
        fit_settings(config, 0, HUNDRED, module).gradient_clip
        for module in (NORMED, nn.Linear(2, 2))
        for config in (given, other)
    ]
    assert clips == [None, 5, 1, 5]


@pytest.mark.parametrize(
    ("task", "clip"),
    [(Segmentation(), None), (Imitation(Classification()), None), (Regression(), 1), (Task(), 1), (Embedding(), 1)],
    ids=["segmentation", "classes without labels", "numbers", "own", "embedding"],
)
def test_gradients_of_losses_of_no_particular_size_are_clipped(task: Task, clip: float | None) -> None:
    config = FinetuneConfig(stage="finetune", epochs=1)
    assert fit_settings(config, 0, replace(HUNDRED, task=task), NORMED).gradient_clip == clip


def test_defaults_are_the_same_in_both_places() -> None:
    settings = fit_settings(FinetuneConfig(stage="finetune", epochs=1), 0, HUNDRED, NORMED)
    assert settings == FitSettings()
    assert DistillationConfig().features == 0


@pytest.mark.parametrize(
    ("length", "expected"),
    [({"epochs": 30}, 0.1), ({"epochs": 29}, 0.03), ({"steps": 150, "batch_size": 10, "accumulation": 2}, 0.1),
     ({"steps": 149, "batch_size": 10, "accumulation": 2}, 0.03)],
)  # fmt: skip
def test_the_peak_follows_from_the_original_training(length: dict, expected: float) -> None:
    original = OriginalTrainingConfig(learning_rate=0.1, epochs=100)
    config = FinetuneConfig(stage="finetune", original=original, **length)
    assert fit_settings(config, 0, HUNDRED, NORMED).learning_rate == pytest.approx(expected)
    with pytest.raises(ValidationError, match="at most one of learning_rate, original"):
        FinetuneConfig(stage="finetune", epochs=1, learning_rate=0.1, original=original)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ema", 1.0), ("ema", -0.1), ("gradient_clip", 0), ("accumulation", 0), ("optimizer", "adam"), ("schedule", "")],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        FinetuneConfig(stage="finetune", epochs=1, **{name: value})


class _Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    warn = note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the stage keeps its state."""
    return tmp_path


@pytest.fixture
def run(tmp_path: Path):
    """Run the stage on a tiny network."""
    random = np.random.default_rng(0)
    labels = np.arange(96) % 4
    images = random.integers(0, 100, (96, 16, 16, 3), np.uint8)
    images[np.arange(96), :, :, labels % 3] += (100 + 50 * (labels // 3))[:, None, None].astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=labels)
    source = ArraysSource(arrays=str(tmp_path / "images.npz"))
    preprocessing = PreprocessingConfig(mean=(0.5,), std=(0.25,))
    data = Splits(
        DataConfig(train=source, evaluation=source, calibration=16, validation=16, preprocessing=preprocessing)
    )
    baseline = Baseline(ModelMetrics(1, 1, 1, {}, {}), tmp_path / "b.onnx", tmp_path / "b.safetensors")
    spec = FactorySpec("factory", "nets:build", {"name": "chain"})

    def call(module=None, **config):
        artifact = TorchModel(module or nets.build("chain"), spec, Recipe(), None, None, (), baseline)
        stage = FinetuneStage(FinetuneConfig(stage="finetune", batch_size=16, **config))
        notes = _Notes()
        model, record = stage.run(artifact, StageContext(tmp_path, 0, data, notes))
        return model, record, notes.notes

    return call


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("norms", [True, False])
def test_norms_are_there_while_training_alone(run, norms) -> None:
    module = without_norms()
    trained, record, notes = run(module, epochs=2, learning_rate=0.02, norms=norms)
    assert record.is_unfolded is norms
    assert any("has no norms" in note for note in notes) is norms
    assert record.gradient_clip == (None if norms else 1.0)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in trained.module.state_dict().items()} == shapes
    assert not torch.equal(trained.module[0].weight, module[0].weight)


def test_training_that_makes_a_network_worse_is_not_kept(run, folder, monkeypatch) -> None:
    good, first, _ = run(epochs=6, learning_rate=0.1)
    assert first.chosen_epoch > 0
    reached = first.validation_after
    assert reached > first.validation_before
    warned: list[str] = []
    monkeypatch.setattr(_Notes, "warn", lambda _, text: warned.append(text))
    (folder / finetune.STATE_FILE).unlink()
    kept, record, _ = run(good.module, epochs=1, learning_rate=50.0, momentum=0.0)
    assert record.chosen_epoch == 0
    assert record.validation_after == record.validation_before == reached
    assert any("Training made the network worse" in text for text in warned)
    for name, value in good.module.state_dict().items():
        assert torch.equal(kept.module.state_dict()[name], value)


def test_the_rate_that_is_best_on_validation_is_taken(run, monkeypatch) -> None:
    rates: list[tuple[float, int]] = []

    def fit(module, data, settings, *rest):
        rates.append((settings.learning_rate, settings.steps))
        done = real(module, data, settings, *rest)
        told = {0.02: 0.5, 0.06: 0.9}.get(round(settings.learning_rate, 3), 0.7)
        return replace(done, epochs=(*done.epochs[:-1], replace(done.epochs[-1], validation=told)))

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    _, record, notes = run(epochs=2, learning_rate=0.2, probe=True)
    assert [(pytest.approx(rate), steps) for rate, steps in rates] == [(0.02, 4), (0.06, 4), (0.2, 4), (0.06, None)]
    assert record.peak_learning_rate == pytest.approx(0.06)
    assert [one.validation for one in record.probed_learning_rates] == [0.5, 0.9, 0.7]
    assert "probe of learning rate 0.06: validation top-1 90.00%" in notes
    assert [note for note in notes if note.startswith("epoch")][-1].startswith("epoch 2 of 2")
    assert "peak learning rate 0.06" in notes
    rates.clear()
    run(epochs=2, learning_rate=0.2, probe=True)
    assert [steps for _, steps in rates] == [None], "what was probed is not probed again"


def test_a_rate_that_diverges_is_not_taken_and_all_of_them_are_an_error(run, folder, monkeypatch) -> None:
    def fit(module, data, settings, *rest):
        if settings.learning_rate > limit:
            raise NonFinite("The training loss must be finite, got nan.")
        return real(module, data, settings, *rest)

    real, limit = training.fit, 0.1
    monkeypatch.setattr(training, "fit", fit)
    _, record, notes = run(steps=3, learning_rate=0.2, probe=True)
    assert record.probed_learning_rates[-1] == Probe(learning_rate=0.2, validation=None)
    assert record.peak_learning_rate < 0.1
    assert "probe of learning rate 0.2: validation top-1 the loss became NaN or infinite" in notes
    limit = 0.0
    with pytest.raises(NonFinite):
        run(steps=3, learning_rate=0.3, probe=True)
    probed = json.loads(next(folder.glob("*probed.json")).read_text(encoding="utf-8"))["probed"]
    assert [one["learning_rate"] for one in probed] == [pytest.approx(0.03), pytest.approx(0.09)], "not those of before"


def test_without_a_probe_nothing_is_tried(run) -> None:
    model, record, notes = run(epochs=1)
    assert record.probed_learning_rates == ()
    assert "peak learning rate 0.02" in notes
    assert not any(part.training for part in model.module.modules())


def test_training_may_start_from_random_weights(run, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        training,
        "fit",
        lambda module, *_, **__: seen.append(module) or FitResult((EpochRecord(1, 1.0, 0.5, 0.1, 1.0),), 1, 1),
    )
    run(epochs=1)
    for _ in range(2):
        run(epochs=1, weights="random")
    inherited, first, second = (module.state_dict() for module in seen)
    assert all(torch.equal(inherited[name], value) for name, value in nets.build("chain").state_dict().items())
    assert {name: value.shape for name, value in first.items()} == {n: v.shape for n, v in inherited.items()}
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if name.endswith("weight") and value.ndim > 1:
            assert not torch.allclose(value, inherited[name], atol=0.01)


def test_training_that_does_no_more_harm_than_noise_is_kept(run, monkeypatch) -> None:
    """Of all images right before, four wrong after training: p = 0.125."""
    warned: list[str] = []
    monkeypatch.setattr(_Notes, "warn", lambda _, text: warned.append(text))
    every = iter((0, 4))

    def facts(module, split, **_):
        return {"right": np.arange(len(split)) >= next(every)}

    def fit(module, data, *rest):
        done = real(module, data, *rest)
        epochs = tuple(replace(epoch, validation=1 - 4 / len(data.validation)) for epoch in done.epochs)
        return replace(done, epochs=epochs)

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training, "quality_facts", facts)
    network = nets.build("chain")
    kept, record, _ = run(network, epochs=1, learning_rate=0.02)
    assert record.chosen_epoch == 1
    assert not torch.equal(next(kept.module.parameters()), next(network.parameters()))
    assert record.validation_after < record.validation_before == 1.0
    assert any("Training did no more harm than noise: validation top-1 100.00% -> " in text for text in warned)
    assert record.warnings == tuple(warned)


@pytest.mark.parametrize(("given", "is_told"), [({"epochs": 1}, True), ({"steps": 4}, False), ({"epochs": 5}, False)])
def test_a_handful_of_steps_is_warned_about_where_nobody_asked_for_so_few(run, monkeypatch, given, is_told) -> None:
    warned: list[str] = []
    monkeypatch.setattr(_Notes, "warn", lambda _, text: warned.append(text))
    run(learning_rate=0.02, **given)
    told = [text for text in warned if "optimiser steps" in text]
    assert bool(told) is is_told
    if told:
        assert "Training comes to 4 optimiser steps (4 an epoch of 64 images)" in told[0]
