"""Networks that were exported come back with the same outputs, the same MACs and the same layers."""

import os
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from exported import exported
from torch import nn

from compress.cost.macs import COUNTED, count_macs
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_import.importer import import_onnx
from compress.pruning.trial import find_cuttable

SHARED = Path(os.environ.get("COMPRESS_SHARED") or Path(__file__).parents[3] / "shared") / "data"
FILES = {
    "networks/version-RFB-320.onnx": ((3, 240, 320), [(4420, 2), (4420, 4)]),
    "detection/FastestDet.onnx": ((3, 352, 352), [(85, 22, 22)]),
}
SIZE = 64


def assert_same(module: nn.Module, imported: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        wanted, found = module(images), imported(images)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert count_macs(imported, images[:1]) == count_macs(module, images[:1])


@pytest.mark.parametrize("name", nets.NAMES)
def test_tiny_network_comes_back_with_its_layers(name):
    module, imported = nets.build(name), import_onnx(exported(name))
    assert_same(module, imported, nets.images(3))
    layers = [key for key, part in module.named_modules() if isinstance(part, COUNTED)]
    assert [key for key, part in imported.named_modules() if isinstance(part, COUNTED)] == layers


@pytest.mark.parametrize("name", nets.NAMES)
def test_the_same_channels_can_be_cut_as_before(name):
    before, _ = find_cuttable(nets.build(name), nets.EXAMPLE)
    after, _ = find_cuttable(import_onnx(exported(name)), nets.EXAMPLE)
    assert {key: group.width for key, group in after.items()} == {key: group.width for key, group in before.items()}


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_torchvision_network_comes_back(name, tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    module = models.get_model(name, weights=None).eval()
    signature = Signature((TensorSpec("images", ("batch", 3, SIZE, SIZE)),), (TensorSpec("logits", ("batch", 1000)),))
    export_onnx(module, signature, tmp_path / "net.onnx", ExportSettings(opset=18))
    imported = import_onnx(tmp_path / "net.onnx")
    assert_same(module, imported, torch.randn(2, 3, SIZE, SIZE))


def test_exported_import_is_the_same_again(tmp_path):
    imported = import_onnx(exported("concat"))
    signature = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))
    export_onnx(imported, signature, tmp_path / "again.onnx", ExportSettings(opset=18))
    assert_same(imported, import_onnx(tmp_path / "again.onnx"), nets.images(2))


@pytest.mark.shared
@pytest.mark.parametrize("file", FILES)
def test_published_file_is_imported_and_takes_several_images(file):
    if not (SHARED / file).is_file():
        pytest.skip(f"{file} is not there: name its folder in COMPRESS_SHARED")
    size, shapes = FILES[file]
    random = np.random.default_rng(1)
    module = import_onnx(SHARED / file, images=[random.uniform(0, 1, (2, *size)).astype(np.float32)])
    with torch.no_grad():
        found = module(torch.zeros(3, *size))
    assert [tuple(one.shape) for one in (found if isinstance(found, tuple) else (found,))] == [(3, *s) for s in shapes]
    assert not any(name.startswith("onnx::") for name, _ in module.named_modules())
