"""Code that runs in training mode alone is found and named by `load`, and left out of training."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yolo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import ModelError
from compress.model.adapter import wiring_of
from compress.model.artifacts import FactorySpec
from compress.networks.wiring import notes_on, wire

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def spec(*outputs: str) -> FactorySpec:
    return FactorySpec("factory", "test_training_mode.py:build", {}, {}, outputs)


class _Both(nn.Module):
    """A stem with a batch norm, a head and an auxiliary head; `give` decides what comes back."""

    def __init__(self, give: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head, self.aux = nn.Linear(8, 4), nn.Linear(8, 4)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(self, self.stem(x).mean((2, 3)))


def _tuple_in_training(m: Any, y: Tensor) -> Any:
    return (m.aux(y), m.head(y)) if m.training else m.head(y)


def _stored_in_training(m: Any, y: Tensor) -> Any:
    if m.training:
        m.loss = m.aux(y).square().mean()
    return m.head(y)


def _functional_in_training(m: Any, y: Tensor) -> Any:
    if m.training:
        m.loss = F.linear(y, m.aux.weight).square().mean()
    return m.head(y)


def _dict_in_training(m: Any, y: Tensor) -> Any:
    found = {"scores": m.head(y), "boxes": m.aux(y)}
    return found if m.training else (found["scores"].sigmoid(), found)


def _needs_targets(m: Any, y: Tensor) -> Any:
    if m.training:
        raise ValueError("targets should not be none when in training mode")
    return m.head(y)


def _exits(m: Any, y: Tensor) -> Any:
    if m.training:
        raise SystemExit(0)
    return m.head(y)


LEFT_OUT = {
    "an auxiliary head comes first": (
        _tuple_in_training,
        "returns output_0 (N, 4), output_1 (N, 4) in place of logits",
    ),
    "an auxiliary loss is stored": (_stored_in_training, "runs 'aux', which evaluation does not"),
    "by a function of torch": (_functional_in_training, "runs 'aux', which evaluation does not"),
    "other names": (_dict_in_training, "returns scores (N, 4), boxes (N, 4) in place of output_0 (N, 4), output_1.sco"),
    "targets are needed": (_needs_targets, "fails (ValueError: targets should not be none when in training mode"),
    "it ends the process": (_exits, "fails (SystemExit: 0 (test_training_mode.py:"),
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_code_that_runs_in_training_alone_is_named_and_left_out(name: str):
    give, said = LEFT_OUT[name]
    module = _Both(give).eval()
    with torch.no_grad():
        wanted = [one.clone() for one in tree_leaves(module(IMAGES))]
    wired = wire(module, spec(), IMAGES)
    (note,) = notes_on(wired, IMAGES)
    assert said in note
    assert "the network itself and its code for training are left out of training" in note
    got = tree_leaves(wired(IMAGES))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    wired.train()
    assert [wired.training, wired.stem[1].training, wired.stem[3].training] == [False, True, True]
    again = tree_leaves(wired(IMAGES))
    assert [one.shape for one in again] == [one.shape for one in wanted]
    assert not torch.equal(again[0], wanted[0])  # dropout and batch statistics
    assert copy.deepcopy(wired).train().training is False
    assert wired.eval().stem[1].training is False


def test_looking_at_training_mode_leaves_buffers_flags_and_random_numbers_as_they_are():
    module = _Both(_tuple_in_training).eval()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    wire(module, spec(), IMAGES)
    assert torch.equal(torch.rand(1), drawn)
    assert not any(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not hasattr(module, "loss")


class _Inner(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.noise, self.last = part, _Noise(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.last(self.noise(y[1] if isinstance(y, tuple) else y))


class _Noise(nn.Module):
    """A layer of the user's own that rightly does something else in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.9, self.training)


def test_only_the_module_that_makes_the_difference_is_left_out():
    module = wire(_Inner(_Both(_tuple_in_training)).eval(), spec(), IMAGES)
    wiring = wiring_of(module)
    assert wiring is not None
    assert wiring.evaluated == ("part",)
    module.train()
    assert [module.training, module.part.training, module.noise.training] == [True, False, True]
    assert "'part' (_Both)" in wiring.notes[0]


@pytest.mark.parametrize("give", [lambda m, y: m.head(y), lambda m, y: F.dropout(m.head(y), 0.5, m.training)])
def test_a_network_that_trains_alike_is_left_alone(give: Any):
    module = _Both(give).eval()
    assert wire(module, spec(), IMAGES) is module
    assert type(module) is _Both
    assert notes_on(module, IMAGES) == []


def test_other_values_in_training_mode_are_noted():
    module = wire(_Both(lambda m, y: m.head(y) if m.training else m.head(y).softmax(1)).eval(), spec(), IMAGES)
    (note,) = notes_on(module, IMAGES)
    assert note.startswith("Output 'logits' has other values in training mode than in evaluation mode")
    assert module.train().training


def test_outputs_kept_by_name_in_both_modes_are_trained_by():
    def give(m: Any, y: Tensor) -> Any:
        return {"logits": m.head(y), **({"extra": y} if m.training else {})}

    module = wire(_Both(give).eval(), spec("logits"), IMAGES)
    assert module.train().training
    assert module(IMAGES).shape == (2, 4)


def test_an_output_that_goes_missing_is_named_and_no_other_takes_its_place():
    module = wire(_Both(lambda m, y: {"main": m.head(y), "aux": m.aux(y)}).eval(), spec("main"), IMAGES)
    module.give = lambda m, y: {"aux": m.aux(y)}
    with pytest.raises(ModelError, match="must return main in evaluation mode, it returns aux"):
        module(IMAGES)


def test_the_head_of_a_detector_trains_by_what_it_returns_in_evaluation_mode():
    images = torch.randn(2, 3, 32, 32)
    module = wire(yolo.yolo(), spec(), images)
    wiring = wiring_of(module)
    assert wiring is not None
    assert wiring.evaluated == ("head",)
    assert "returns output_0 (N, 19, 8, 8), output_1 (N, 19, 4, 4) in place of output_0 (N, 7, 80)" in wiring.notes[0]
    before = [tuple(one.shape) for one in module(images)]
    assert [tuple(one.shape) for one in module.train()(images)] == before
