"""Check of open axes: the network and its exported file must take images of other sizes."""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from compress.errors import ExportFailed, first_line, translated
from compress.model.artifacts import Signature
from compress.model.modes import eval_mode, hooked

_MORE_PIXELS = 64  # a multiple of the total stride of usual networks
_IMAGES, _SILENT = 2, 4
_HINT = (
    "Set dynamic: [], or let the network pool its feature maps to one size (nn.AdaptiveAvgPool2d(1)) before flattening "
    "them."
)


def check_open_axes(path: Path, module: nn.Module, signature: Signature, open_axes: Mapping[int, str]) -> None:
    """Try a network and its file on larger images, one open axis at a time.

    Args:
        path: The .onnx file.
        module: The network, on the CPU.
        signature: Signature of the network, with its own image size.
        open_axes: Axis -> name of each open axis of the image.

    Raises:
        ExportFailed: Network or file does not take a larger image, or their output shapes differ; the message names
            the layer that fails.
    """
    for axis, name in open_axes.items():
        sizes = [_IMAGES, *(int(size) for size in signature.inputs[0].shape[1:])]
        sizes[axis] += _MORE_PIXELS
        images = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        what = f"an image of {name} {sizes[axis]} (it was made for {sizes[axis] - _MORE_PIXELS})"
        wanted = _run_network(module, images, what)
        got = _run_file(path, images, what)
        if got != wanted:
            raise ExportFailed(
                f"dynamic: [{name}] needs a file that takes images of other sizes; for {what} it returns {got}, the "
                f"network {wanted}.",
                hint=_HINT,
            )


def _run_network(module: nn.Module, images: Tensor, what: str) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs; raise ExportFailed where the network does not take the images."""
    within = [""]  # paths from the network down to the layer that is running
    named = list(module.named_modules())
    before = [(part, lambda *_, name=name: within.append(name)) for name, part in named]
    after = [(part, lambda *_: (within.pop(), None)[1]) for _, part in named]
    try:
        with hooked(before=before, after=after), torch.no_grad(), eval_mode(module):
            found = module(images)
    except Exception as error:  # the network's code
        place = f" in layer '{within[-1]}'" if within[-1] else ""
        raise ExportFailed(
            f"dynamic needs a network that takes images of other sizes; with {what} it fails{place}: "
            f"{first_line(error)}",
            hint=_HINT,
        ) from error
    shapes = [tuple(one.shape) for one in (found if isinstance(found, tuple) else (found,))]
    if any(shape[0] != len(images) for shape in shapes):
        raise ExportFailed(
            f"dynamic needs a network that takes images of other sizes; for {len(images)} times {what} its outputs "
            f"have the shapes {', '.join(map(str, shapes))}.",
            hint=_HINT,
        )
    return shapes


def _run_file(path: Path, images: Tensor, what: str) -> list[tuple[int, ...]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    alone = isinstance(first.shape[0], int)  # a fixed batch is one image
    parts = [images[place : place + 1] for place in range(len(images))] if alone else [images]
    with translated(
        lambda error: ExportFailed(
            f"dynamic needs a file that takes images of other sizes; with {what} the file that torch wrote fails, the "
            f"network does not: {first_line(error)}",
            hint=_HINT,
        )
    ):
        found = [session.run(None, {first.name: part.numpy()}) for part in parts]
    return [(sum(one[place].shape[0] for one in found), *found[0][place].shape[1:]) for place in range(len(found[0]))]
