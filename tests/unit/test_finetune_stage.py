"""What a pipeline file says about training is what the loop is told."""

from dataclasses import asdict, fields

import pytest
from pydantic import ValidationError

from compress.config.schema import AugmentationConfig, DistillationConfig, FinetuneConfig
from compress.data.batches import Augmentation
from compress.stages.finetune import _settings
from compress.training.fit import FitSettings

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
    "save_minutes": 1.5,
}


def test_every_setting_reaches_the_loop() -> None:
    varied = {"crop_padding": 1, "flip": True, "mixup": 0.2, "cutmix": 0.4}
    config = FinetuneConfig(stage="finetune", augmentation=AugmentationConfig(**varied), **GIVEN)
    assert set(FinetuneConfig.model_fields) == {*GIVEN, "stage", "epochs", "augmentation", "distillation"}
    settings = asdict(_settings(config, 9))
    assert {name: settings[name] for name in GIVEN} == GIVEN
    assert settings["seed"] == 9
    assert settings["augmentation"] == varied
    assert {field.name for field in fields(Augmentation)} == set(AugmentationConfig.model_fields)
    defaults = asdict(FitSettings())
    assert all(settings[name] != defaults[name] for name in GIVEN)


def test_defaults_are_the_same_in_both_places() -> None:
    settings = _settings(FinetuneConfig(stage="finetune", epochs=1), 0)
    assert settings == FitSettings()
    assert DistillationConfig().features == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("ema", 1.0), ("ema", -0.1), ("gradient_clip", 0), ("accumulation", 0), ("optimizer", "adam"), ("schedule", "")],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        FinetuneConfig(stage="finetune", epochs=1, **{name: value})
