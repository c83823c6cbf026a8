"""Whatever operators follow each other, the imported network computes what ONNX Runtime does with the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto
from onnx_graphs import make, node, write

from compress.onnx_file.structure import write_structure
from compress.onnx_import.importer import build_imported, import_onnx
from compress.onnx_import.parity import relative_error

Constants = dict[str, np.ndarray]
Step = Callable[[str, str, int, Constants], tuple[list[NodeProto], int]]


def _weight(constants: Constants, name: str, *shape: int) -> str:
    random = np.random.default_rng(len(constants))
    constants[name] = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)
    return name


def _convolution(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    kernel = _weight(constants, f"{target}.weight", 8, width, 3, 3)
    return [node("Conv", [source, kernel], [target], pads=[1, 1, 1, 1])], 8


def _depthwise(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    kernel, bias = _weight(constants, f"{target}.weight", width, 1, 3, 3), _weight(constants, f"{target}.bias", width)
    return [node("Conv", [source, kernel, bias], [target], group=width, auto_pad="SAME_UPPER")], width


def _batch_norm(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    names = [_weight(constants, f"{target}.{part}", width) for part in ("weight", "bias", "mean")]
    constants[f"{target}.var"] = np.linspace(0.5, 1.5, width).astype(np.float32)
    return [node("BatchNormalization", [source, *names, f"{target}.var"], [target])], width


def _activation(operator: str) -> Step:
    def step(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
        return [node(operator, [source], [target])], width

    return step


def _residual(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    kernel, inner = _weight(constants, f"{target}.weight", width, width, 1, 1), f"{target}_inner"
    return [node("Conv", [source, kernel], [inner]), node("Add", [source, inner], [target])], width


def _concatenation(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    kernel, inner = _weight(constants, f"{target}.weight", 4, width, 1, 1), f"{target}_inner"
    return [node("Conv", [source, kernel], [inner]), node("Concat", [inner, source], [target], axis=1)], width + 4


def _squeeze_excite(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    kernel = _weight(constants, f"{target}.weight", width, width, 1, 1)
    names = [f"{target}_{part}" for part in "abc"]
    return [
        node("GlobalAveragePool", [source], [names[0]]),
        node("Conv", [names[0], kernel], [names[1]]),
        node("Sigmoid", [names[1]], [names[2]]),
        node("Mul", [source, names[2]], [target]),
    ], width


def _shuffle(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    constants[f"{target}_split"] = np.array([0, 2, width // 2, 6, 6], np.int64)
    constants[f"{target}_join"] = np.array([0, -1, 6, 6], np.int64)
    names = [f"{target}_{part}" for part in "ab"]
    return [
        node("Reshape", [source, f"{target}_split"], [names[0]]),
        node("Transpose", [names[0]], [names[1]], perm=[0, 2, 1, 3, 4]),
        node("Reshape", [names[1], f"{target}_join"], [target]),
    ], width


def _pooled(source: str, target: str, width: int, constants: Constants) -> tuple[list[NodeProto], int]:
    return [node("AveragePool", [source], [target], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], width


STEPS: tuple[Step, ...] = (
    _convolution,
    _depthwise,
    _batch_norm,
    _activation("Relu"),
    _activation("HardSwish"),
    _activation("Tanh"),
    _residual,
    _concatenation,
    _squeeze_excite,
    _shuffle,
    _pooled,
)


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=7), batch=st.sampled_from(["N", 1]))
def test_chain_is_imported_and_rebuilt_without_its_file(tmp_path_factory, steps: list[Step], batch: int | str) -> None:
    folder: Path = tmp_path_factory.mktemp("chain")
    nodes, constants, width, source = [], {}, 4, "x"
    for index, step in enumerate(steps):
        target = "y" if index == len(steps) - 1 else f"v{index}"
        more, width = step(source, target, width, constants)
        nodes, source = [*nodes, *more], target
    path = write(folder / "chain.onnx", make(nodes, constants, inputs={"x": (batch, 4, 6, 6)}))
    module = import_onnx(path)
    image = np.random.default_rng(9).standard_normal((1, 4, 6, 6)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": image})
    with torch.no_grad():
        assert relative_error(module(torch.from_numpy(image)).numpy(), wanted) < 1e-5
        write_structure(path, folder / "structure.onnx")
        rebuilt = build_imported(folder / "structure.onnx")
        rebuilt.load_state_dict(module.state_dict())
        images = torch.randn(3, 4, 6, 6)
        assert torch.equal(rebuilt(images), module(images))
