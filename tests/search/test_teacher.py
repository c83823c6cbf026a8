"""The baseline as a teacher is the network before the pipeline's edits; training asks the context for it."""

from dataclasses import replace
from pathlib import Path

import nets
import pytest
import torch
from fixtures import make_context, make_model, make_splits
from torch import nn

from compress.checkpoint.rebuild import write_weights
from compress.config.schema.training import DistillationConfig
from compress.errors import ArtifactError
from compress.search.block_removal import without_blocks
from compress.search.teacher import BaselineTeacher, LoadedTeacher
from compress.search.training import distillation_from


def test_the_baseline_is_built_anew_without_later_edits(tmp_path: Path) -> None:
    model = make_model("residual", tmp_path)
    write_weights(model.module, model.baseline.weights_path)
    teacher = BaselineTeacher(without_blocks(model, ("body.1",)))
    built = teacher.build()
    assert torch.equal(built(nets.images()), model.module(nets.images()))
    assert not built.training
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert teacher.build() is not built


def test_a_loaded_network_teaches_as_it_was_and_stays_as_it_is() -> None:
    module = nets.build("chain").train()
    built = LoadedTeacher(module).build()
    assert not built.training
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), module.parameters(), strict=True))


def test_distillation_takes_the_teacher_of_the_context(tmp_path: Path) -> None:
    ctx, _ = make_context(tmp_path, make_splits(tmp_path, calibration=48, bright=True))
    model, config = make_model("chain", tmp_path), DistillationConfig(weight=0.25, temperature=3.0)
    assert distillation_from(None, model, ctx) is None
    with pytest.raises(ArtifactError, match=r"baseline\.safetensors' does not exist"):
        distillation_from(config, model, ctx)  # without a teacher the baseline's weights are read

    class Own:
        def build(self) -> nn.Module:
            return network

    network = nets.build("chain", 5)
    distillation = distillation_from(config, model, replace(ctx, teacher=Own()))
    assert distillation is not None
    assert (distillation.teacher, distillation.weight, distillation.temperature) == (network, 0.25, 3.0)
