"""Settings of an export, and the resulting inputs and outputs of the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compress.model.artifacts import Signature, TensorSpec


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Settings of an export.

    Attributes:
        opset: Version of the default operator set that the file must have.
        dynamic_batch: True keeps the batch axis open (named "batch"); otherwise it is 1.
        simplify: True lets onnxslim rewrite the graph; the result is kept only when its outputs are the same.
        external_data: True writes weights into a second file; weights above 1.8 GB always get one.
        rewrites: Names in `REWRITES` to be applied wherever they fit.
        precision: "fp32", or "fp16" for weights and activations in half precision between float32 inputs and outputs.
        open_axes: Axis -> name ("height") of further axes of the first input that stay open.
    """

    opset: int
    dynamic_batch: bool = True
    simplify: bool = True
    external_data: bool = False
    rewrites: tuple[str, ...] = ()
    precision: str = "fp32"
    open_axes: Mapping[int, str] = field(default_factory=dict)

    def sizes(self, signature: Signature) -> dict[str, int]:
        """Return name -> size of each open axis in the network's signature, such as {"height": 224}."""
        return {name: int(signature.inputs[0].shape[axis]) for axis, name in self.open_axes.items()}


def exported_signature(
    signature: Signature, dynamic_batch: bool, open_axes: Mapping[int, str] | None = None
) -> Signature:
    """Return the signature of the file: the first axis of every tensor is "batch", or 1 when it is fixed.

    Args:
        signature: Signature of the network.
        dynamic_batch: True keeps the batch axis open.
        open_axes: Axis -> name of further open axes of the first input. Outputs keep the sizes that they have for the
            network's own input sizes.
    """
    batch: int | str = "batch" if dynamic_batch else 1

    def specs(entries: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(entry, shape=(batch, *entry.shape[1:])) for entry in entries)

    first, *others = specs(signature.inputs)
    named = open_axes or {}
    opened = replace(first, shape=tuple(named.get(axis, size) for axis, size in enumerate(first.shape)))
    return Signature((opened, *others), specs(signature.outputs))
