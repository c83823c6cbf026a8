"""What torch's exporter loses is found where it begins; open axes are tried on network and file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ExportFailed
from compress.exporting.fidelity import file_error, first_difference
from compress.exporting.open_axes import check_open_axes
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.adapter import adapt
from compress.model.artifacts import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("images", ("batch", 3, 8, 8)),), (TensorSpec("logits", ("batch", 2)),))
OPEN = {2: "height", 3: "width"}


class _Body(nn.Module):
    def __init__(self, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.pool, self.head = pool or nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.conv(x))).mean((2, 3)))


class _Functional(_Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(self.act(self.conv(x)), 2, divisor_override=3).mean((2, 3)))


def _exported(module: nn.Module, path: Path, **options: object) -> Path:
    torch.manual_seed(0)
    export_onnx(module.eval(), SIGNATURE, path, ExportSettings(opset=18, simplify=False, **options))  # type: ignore[arg-type]
    return path


def test_a_file_that_is_right_is_as_near_as_rounding(tmp_path: Path) -> None:
    module, images = _Body(), torch.randn(3, 3, 8, 8)
    assert file_error(_exported(module, tmp_path / "m.onnx"), module, SIGNATURE, images) < 1e-5
    assert "all layers are right" in first_difference(module, SIGNATURE, images[:1], 1e-3, 18)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (_Body(nn.AvgPool2d(3, 2, 1, divisor_override=5)), "the first layer whose values differ is 'pool' (AvgPool2d("),
        (_Functional(), "the difference begins behind 'act' and before layer 'head' (Linear("),
    ],
)
def test_a_lost_divisor_is_found_in_its_layer(tmp_path: Path, module: nn.Module, said: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8)
    assert file_error(_exported(module, tmp_path / "m.onnx"), module, SIGNATURE, images) > 0.01
    assert first_difference(module, SIGNATURE, images[:1], 1e-3, 18).startswith(said)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class _TwoInputs(_Body):
    def forward(self, image: Tensor, more: Tensor) -> Tensor:
        return super().forward(image) + F.avg_pool1d(more, 2, 2)[:, 0, :2]


def test_several_inputs_are_compared_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (SIGNATURE.inputs[0], TensorSpec("more", ("batch", 1, 4)))
    signature, rows = Signature(inputs, SIGNATURE.outputs), torch.randn(2, 3 * 64 + 4)
    module = adapt(_TwoInputs(nn.AvgPool2d(2, divisor_override=3)).eval(), inputs, ())
    export_onnx(module, signature, tmp_path / "m.onnx", ExportSettings(opset=18, simplify=False))
    assert file_error(tmp_path / "m.onnx", module, signature, rows) > 5e-3
    assert "is 'pool' (AvgPool2d(" in first_difference(module, signature, rows[:1], 1e-3, 18)


class _Fixed(_Body):
    """Flattens a feature map of one size."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.flatten = nn.Linear(4 * 64, 2), flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.conv(x)))


@pytest.mark.parametrize(
    ("flatten", "said"),
    [
        (lambda x: x.flatten(1), r"it fails in layer 'head': mat1 and mat2"),
        (lambda x: x.view(x.size(0), -1), r"it fails in layer 'head': mat1 and mat2"),
        (lambda x: x.view(-1, 256), r"its outputs have the shapes \(18, 2\)"),
        (lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1), "the file that torch wrote fails, the network does not"),
    ],
)
def test_open_axes_of_a_fixed_flatten_are_refused(
    tmp_path: Path, flatten: Callable[[Tensor], Tensor], said: str
) -> None:
    module = _Fixed(flatten)
    path = _exported(module, tmp_path / "m.onnx", open_axes=OPEN)
    with pytest.raises(ExportFailed, match=said):
        check_open_axes(path, module, SIGNATURE, OPEN)


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_open_axes_of_a_pooled_network_pass(tmp_path: Path, dynamic_batch: bool) -> None:
    module = _Body()
    path = _exported(module, tmp_path / "m.onnx", open_axes=OPEN, dynamic_batch=dynamic_batch)
    check_open_axes(path, module, SIGNATURE, OPEN)
