"""Which networks are in the support matrix, and how is each built?

No torch is imported before a network is built: the process that starts the others stays small, so that what is said of
their memory is their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model.artifacts import FactorySpec

LISTS = Path(__file__).with_name("networks.yaml")
LIBRARY_LISTS = Path(__file__).with_name("library_networks.yaml")
_IMAGE_AXES = 3
SETS = ("torchvision", "timm", "segmentation", "detection", "video", "onnx")


@dataclass(frozen=True)
class Entry:
    """One network of the matrix.

    Attributes:
        set: Of `SETS`, or the name of a library.
        name: Unique in its set.
        family: What it stands for.
        size: Height and width, or the whole shape of one input; None for the network's own.
        path: Of an ONNX file.
        factory: Of a library's network, "pkg.module:callable".
        kwargs: Of the factory.
        outputs: Kept outputs; () for all.
    """

    set: str
    name: str
    family: str
    size: int | tuple[int, ...] | None = None
    path: str | None = None
    factory: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.set}/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `entry_of` reads them."""
        return asdict(self)


def entry_of(values: Mapping[str, Any]) -> Entry:
    """Return the entry that `to_dict` gave."""
    size, outputs = values["size"], tuple(values.get("outputs", ()))
    return Entry(**{**values, "size": tuple(size) if isinstance(size, list) else size, "outputs": outputs})


def listed(name: str, onnx_folder: Path | None = None, size: int | None = None) -> list[Entry]:
    """Return the networks of a set.

    Args:
        name: Of the set.
        onnx_folder: Where the files of the set "onnx" lie, at any depth.
        size: Height and width for all of them in place of what the lists say.
    """
    if name == "onnx":
        files = sorted(onnx_folder.rglob("*.onnx")) if onnx_folder is not None else []
        return [Entry("onnx", file.name, "file", size, str(file)) for file in files]
    values = yaml.safe_load(LISTS.read_text("utf-8"))[name]
    sizes = values.get("sizes", {})
    return [
        entry_of({"set": name, "name": one, "family": family, "size": size or sizes.get(one, values.get("size")),
                  "path": None})
        for family, names in values["networks"].items()
        for one in names
    ]  # fmt: skip


def libraries() -> dict[str, tuple[str, ...]]:
    """Return library -> packages whose versions are stated."""
    return {name: tuple(values["packages"]) for name, values in _library_lists().items()}


def listed_of_library(library: str) -> list[Entry]:
    """Return the networks of a library."""
    entries = []
    for name, (family, shape, factory, *rest) in _library_lists()[library]["networks"].items():
        kwargs, outputs = [*rest, {}, []][0], [*rest[1:], []][0]
        entries.append(Entry(library, name, family, tuple(shape), None, factory, kwargs, tuple(outputs)))
    return entries


def _library_lists() -> dict[str, Any]:
    return dict(yaml.safe_load(LIBRARY_LISTS.read_text("utf-8")))


def left_out(name: str) -> dict[str, list[str]]:
    """Return why -> the networks of a set's library that are in no list."""
    return yaml.safe_load(LISTS.read_text("utf-8"))[name]["left_out"] if name != "onnx" else {}


def build(entry: Entry) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...] | None]:
    """Return a network with random weights, the shape of one input, and the shape it was made for, if that is known.

    Raises:
        CompressError: It cannot be built.
    """
    import torch

    from compress.checkpoint.rebuild import build_module, with_one_array
    from compress.inspection.targets import own_input_shape, spec_of
    from compress.networks.detectors import why_not

    if entry.set == "onnx":
        return _import_file(entry)
    target = f"{'timm' if entry.set == 'timm' else 'torchvision'}:{entry.name}"
    spec = spec_of(target)
    stages = why_not(entry.name) if entry.set == "detection" else None
    module = build_module(spec) if stages is None else _first_stage(entry.name)
    own = own_input_shape(target, module)
    shape = entry.size if isinstance(entry.size, tuple) else own if entry.size is None else (3, entry.size, entry.size)
    if shape is None:
        raise ValueError(f"networks.yaml must give a size for {entry.key}: the network has none of its own.")
    return with_one_array(module, spec, torch.zeros([2, *shape])), shape, own


def build_from_library(entry: Entry) -> tuple[nn.Module, FactorySpec, Tensor]:
    """Return a library's network as `load` leaves it, its specification, and one input.

    Raises:
        CompressError: It cannot be built, or `load` refuses it.
    """
    import torch

    from compress.api.lineage import input_names
    from compress.checkpoint.rebuild import build_module, with_one_array, without_unread
    from compress.data.packing import is_packed, row_width
    from compress.model.artifacts import FactorySpec
    from compress.networks.wiring import signature_of

    assert entry.factory is not None
    assert isinstance(entry.size, tuple)
    spec = FactorySpec("factory", entry.factory, dict(entry.kwargs), {}, entry.outputs)
    module = build_module(spec)
    if len(entry.size) != _IMAGE_AXES:
        (name,) = input_names(module, 1)
        spec = replace(spec, inputs={name: {"shape": list(entry.size)}})
    inputs = spec.input_specs()
    shape = [2, row_width(inputs)] if is_packed(inputs) else [2, *entry.size]
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, _ = without_unread(with_one_array(module, spec, example), example)
    signature_of(plain, spec, example)
    return plain, spec, example[:1]


def _import_file(entry: Entry) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...] | None]:
    """Return the network of an ONNX file; its shapes may be part of the graph, so that it keeps its own."""
    from compress.inspection.targets import open_target

    assert entry.path is not None
    network = open_target(entry.path, None)
    own = tuple(network.example.shape[1:])
    return network.module, own, own


def _first_stage(name: str) -> nn.Module:
    """Return what a detector of two stages does once for each image: features, and the first stage's predictions."""
    import torch
    from torch import nn
    from torchvision import models

    class FirstStage(nn.Module):
        def __init__(self, detector: nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = detector.backbone, detector.rpn.head

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features = self.backbone(images)
            scores, boxes = self.head([features] if isinstance(features, torch.Tensor) else list(features.values()))
            return *scores, *boxes

    return FirstStage(models.get_model(name, weights=None, weights_backbone=None)).eval()
