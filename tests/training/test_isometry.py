"""Mean singular values of Jacobians, against matrices whose singular values are known."""

from types import SimpleNamespace

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.model.adapter import Wiring
from compress.model.artifacts import TensorSpec
from compress.model.stage_records import Isometry as Measured
from compress.progress import SilentProgress
from compress.report.records import Isometry
from compress.report.stage_facts import list_isometry
from compress.search.isometry_record import conclusion, measure_isometry
from compress.training import isometry
from compress.training.isometry import Effort, affordable, mean_singular_value, projection

EFFORT = Effort(4, 16)


def images(side: int = 2, count: int = 6) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return Split("calibration", ArraySource(pixels, np.zeros(count)), np.arange(count), Preprocessing(mean=(0.5,)))


def linear(values: Tensor, inputs: int = 12) -> nn.Module:
    """A linear network whose Jacobian has these singular values."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(inputs, len(values), generator=generator))[0]
    layer = nn.Linear(inputs, len(values))
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(values) @ right.T)
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_a_linear_network_has_the_singular_values_of_its_matrix(factor: float) -> None:
    found, reason = mean_singular_value(linear(factor * torch.tensor([4.0, 2.0, 0.6])), images(), EFFORT)
    assert (found, reason) == (pytest.approx(factor * 2.2, rel=1e-5), "")


def test_a_network_has_those_of_its_whole_jacobian_at_each_image() -> None:
    module, split = nets.build("chain"), images(16, 4)
    inputs = torch.from_numpy(split.source.read(np.arange(4))).permute(0, 3, 1, 2).float() / 255 - 0.5
    whole = [torch.autograd.functional.jacobian(module, one[None]).reshape(4, -1) for one in inputs]
    expected = torch.stack([torch.linalg.svdvals(one).mean() for one in whole]).mean()
    module.train()
    found, _ = mean_singular_value(module, split, EFFORT)
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert all(part.training for part in module.modules()), "flags are restored"
    assert all(one.requires_grad and one.grad is None for one in module.parameters())


def test_many_outputs_are_projected_on_orthonormal_directions() -> None:
    directions = projection(200, 16)
    assert torch.allclose(directions @ directions.T, torch.eye(16), atol=1e-5)
    assert torch.equal(directions, projection(200, 16)), "the same for every network"
    assert torch.equal(projection(5, 16), torch.eye(5))
    equal = linear(torch.full((48,), 0.7), 48)  # all 48 singular values are 0.7, and so are those of any projection
    found, _ = mean_singular_value(equal, images(4), EFFORT)
    assert found == pytest.approx(0.7, rel=1e-4)
    spread = torch.linspace(0.1, 1.9, 48)
    found, _ = mean_singular_value(linear(spread, 48), images(4), EFFORT)
    assert found == pytest.approx(float(spread.square().mean().sqrt()), rel=0.1)


def test_directions_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isometry, "_MAX_PROJECTION", 1000)
    assert len(projection(300, 16)) == 3
    assert len(projection(5000, 16)) == 1


class _Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).argmax(1, keepdim=True).float()


def test_reasons_are_given_where_nothing_can_be_measured() -> None:
    found, reason = mean_singular_value(_Rounding(), images(), EFFORT)
    assert found is None
    assert reason.startswith("there is no derivative: ")
    huge = linear(torch.tensor([float("inf"), 1.0]))
    assert mean_singular_value(huge, images(), EFFORT)[0] is None
    module = linear(torch.ones(2))
    module.compress_wiring = Wiring((TensorSpec("tokens", ("batch", 3), "int64"),))
    assert mean_singular_value(module, images(), EFFORT) == (
        None, "an input is not of float32: there is no derivative by it"
    )  # fmt: skip


def test_the_effort_follows_from_the_network_and_the_images() -> None:
    assert affordable(41_000_000, images(32)) == Effort(32, 16)
    assert affordable(300_000_000, images(224)) == Effort(4, 16)
    assert affordable(4_100_000_000, images(224)) == Effort(4, 5)
    assert affordable(10**11, images(224)) is None


def _context(progress: SilentProgress) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(calibration=images()), progress=progress)


def test_records_hold_values_or_one_reason() -> None:
    artifact = SimpleNamespace(baseline=SimpleNamespace(metrics=SimpleNamespace(macs=100)))
    networks = {"before": lambda: linear(torch.tensor([1.0, 3.0])), "after": None}
    record = measure_isometry(artifact, networks, _context(SilentProgress()))  # type: ignore[arg-type]
    assert record.to_dict() == {"before": pytest.approx(2, rel=1e-5), "after": None, "images": 6, "directions": 16}
    labels = {"before": "before", "after": "after"}
    assert list(list_isometry(Isometry.model_validate(record.to_dict()), labels)) == [
        ("mean singular value of the Jacobian, before", "2")
    ]
    none = measure_isometry(artifact, {"before": _Rounding}, _context(SilentProgress()))  # type: ignore[arg-type]
    assert set(none.to_dict()) == {"skipped"}
    assert next(list_isometry(Isometry.model_validate(none.to_dict()), labels))[1].startswith(
        "not measured: there is no derivative"
    )
    artifact.baseline.metrics.macs = 10**12
    none = measure_isometry(artifact, networks, _context(SilentProgress()))  # type: ignore[arg-type]
    assert none.skipped is not None
    assert "would take too long" in none.skipped
    assert list(list_isometry(Isometry(), labels)) == []


@pytest.mark.parametrize(
    ("before", "rate", "text", "is_warning"),
    [
        (0.82, 0.02, "Mean Jacobian singular value: 41% of the baseline's. A large peak learning rate helps it recover "
         "(arXiv:2105.05916). The peak is 0.02, 0.2 times that of the original training (0.1).", False),
        (0.82, 0.009, "0.09 times that of the original training (0.1). Raise learning_rate", True),
        (1.0, 0.009, "Mean Jacobian singular value: 50% of the baseline's. The peak is 0.009", False),
        (None, 0.009, "", False),
    ],
)  # fmt: skip
def test_a_low_rate_is_warned_about_where_singular_values_are_low(before, rate, text, is_warning) -> None:
    said, warns = conclusion(
        Measured(values={"baseline": 2.0, "before": before}), rate, 0.1, "of the original training"
    )
    assert text in said
    assert bool(text) == bool(said)
    assert warns is is_warning
    alone = Measured(values={"baseline": None, "before": 1.0})
    assert conclusion(alone, rate, 0.1, "of sgd by default") == ("", False)
