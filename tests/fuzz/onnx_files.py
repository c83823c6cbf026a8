"""Damaged ONNX files through `verify`, `inspect` and the import; a file that is taken computes what ONNX Runtime does.

python tests/fuzz/onnx_files.py --count 500
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
for place in (HERE, HERE.parent, HERE.parents[1]):
    sys.path.insert(0, str(place))

from outcomes import Outcome, command, guarded, main  # noqa: E402

SIZE, CLASSES = 12, 4
Random = np.random.Generator


@cache
def bases() -> dict[str, bytes]:
    """Return small whole files of several kinds."""
    random = np.random.default_rng(0)
    arrays = {
        "k1": random.normal(0, 0.3, (8, 3, 3, 3)),
        "b1": random.normal(0, 0.1, 8),
        "k2": random.normal(0, 0.3, (8, 8, 3, 3)),
        "k3": random.normal(0, 0.3, (8, 1, 3, 3)),
        "s": random.uniform(0.5, 1.5, 8),
        "o": random.normal(0, 0.1, 8),
        "m": random.normal(0, 0.1, 8),
        "v": random.uniform(0.5, 1.5, 8),
        "w": random.normal(0, 1, (CLASSES, 8)),
        "c": random.normal(0, 0.1, CLASSES),
        "low": np.float32(0),
        "high": np.float32(6),
        "half": np.float32(0.5),
    }
    arrays = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    arrays |= {
        "flat": np.array([0, -1], np.int64),
        "axes": np.array([2, 3], np.int64),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "from": np.array([0], np.int64),
        "to": np.array([8], np.int64),
        "one": np.array([1], np.int64),
    }
    node = helper.make_node
    stem = [
        node("Conv", ["x", "k1", "b1"], ["a"], "stem", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["a"], ["r"]),
    ]
    head = [
        node("GlobalAveragePool", ["z"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w", "c"], ["y"], "head", transB=1),
    ]
    graphs = {
        "chain": [
            *stem,
            node("Conv", ["r", "k2"], ["d"], "second", pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["d", "s", "o", "m", "v"], ["n"]),
            node("Clip", ["n", "low", "high"], ["z"]),
            *head,
        ],
        "residual": [
            *stem,
            node("Conv", ["r", "k3"], ["d"], "depthwise", group=8, pads=[1, 1, 1, 1]),
            node("Add", ["d", "r"], ["e"]),
            node("MaxPool", ["e"], ["z"], kernel_shape=[2, 2], strides=[2, 2]),
            *head,
        ],
        "shaped": [
            *stem,
            node("Pad", ["r", "pads"], ["e"]),
            node("Mul", ["e", "half"], ["g"]),
            node("Slice", ["g", "from", "to", "one"], ["z"]),
            node("ReduceMean", ["z"], ["p"], axes=[2, 3], keepdims=0),
            node("Reshape", ["p", "flat"], ["f"]),
            node("Gemm", ["f", "w", "c"], ["y"], "head", transB=1),
        ],
    }
    return {name: _model(nodes, arrays).SerializeToString() for name, nodes in graphs.items()}


def _model(nodes: list[Any], arrays: dict[str, np.ndarray]) -> ModelProto:
    read = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "whole",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# -- damage ------------------------------------------------------------------------------------------------------------


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: int(random.integers(0, len(data)))]


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for place in random.integers(0, len(data), int(random.integers(1, 9))):
        changed[place] ^= 1 << int(random.integers(0, 8))
    return bytes(changed)


def _flip_head(data: bytes, random: Random) -> bytes:
    """Damage the beginning, where the structure is and not the weights."""
    return _flip(data[:400], random) + data[400:]


def _cut_out(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + data[start + int(random.integers(1, 200)) :]


def _insert(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + random.bytes(int(random.integers(1, 40))) + data[start:]


NUMBERS = (0, 1, 2, 3, 5, 7, -1, -5, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))


def _number(random: Random) -> int:
    return int(NUMBERS[random.integers(0, len(NUMBERS))])


def _pick(values: Any, random: Random) -> Any:
    return values[int(random.integers(0, len(values)))]


def _dims(model: ModelProto, random: Random) -> None:
    tensor = _pick(model.graph.initializer, random)
    if tensor.dims and random.random() < 0.7:
        tensor.dims[int(random.integers(0, len(tensor.dims)))] = _number(random)
    elif random.random() < 0.5:
        tensor.dims.append(_number(random))
    else:
        tensor.ClearField("dims")


def _swap_dims(model: ModelProto, random: Random) -> None:
    tensor = _pick(model.graph.initializer, random)
    tensor.dims[:] = list(tensor.dims)[::-1]


def _type(model: ModelProto, random: Random) -> None:
    _pick(model.graph.initializer, random).data_type = int(random.integers(0, 25))


def _raw(model: ModelProto, random: Random) -> None:
    tensor = _pick(model.graph.initializer, random)
    tensor.raw_data = _pick(
        (b"", tensor.raw_data[:-1], tensor.raw_data[: len(tensor.raw_data) // 2], tensor.raw_data * 2), random
    )


def _special(model: ModelProto, random: Random) -> None:
    tensor = _pick([one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT], random)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[int(random.integers(0, values.size))] = _pick((np.nan, np.inf, 3e38, 1e-42), random)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _both_data(model: ModelProto, random: Random) -> None:
    _pick(model.graph.initializer, random).float_data.extend([1.0, 2.0])


def _initializer_name(model: ModelProto, random: Random) -> None:
    tensor = _pick(model.graph.initializer, random)
    tensor.name = _pick(("", "x", "y", "w", "k1", "nowhere", "\udcff".encode("utf-8", "replace").decode()), random)


def _external(model: ModelProto, random: Random) -> None:
    tensor = _pick(model.graph.initializer, random)
    tensor.data_location = TensorProto.EXTERNAL
    places = ("w.bin", "nowhere.bin", "../w.bin", "/etc/passwd", "", ".", "w.bin\0", "a" * 5000)
    entries = {"location": _pick(places, random), "offset": str(_number(random)), "length": str(_number(random))}
    for key, value in entries.items():
        if random.random() < 0.8:
            tensor.external_data.add(
                key=key, value=_pick((value, value, "", "x", "1.5"), random) if key != "location" else value
            )
    if random.random() < 0.5:
        tensor.ClearField("raw_data")


def _node_input(model: ModelProto, random: Random) -> None:
    node = _pick(model.graph.node, random)
    if not node.input:
        return
    place, what = int(random.integers(0, len(node.input))), int(random.integers(0, 5))
    if what == 0:
        node.input[place] = _pick(("", "nowhere", "y", "x", "w", "flat"), random)
    elif what == 1:
        del node.input[place]
    elif what == 2:
        node.input.append(_pick(("", "x", "nowhere", "w"), random))
    elif what == 3:
        node.input[place] = node.output[0]
    else:
        node.input[:] = list(node.input)[::-1]


def _node_output(model: ModelProto, random: Random) -> None:
    node = _pick(model.graph.node, random)
    what = int(random.integers(0, 3))
    if what == 0:
        node.output[0] = _pick(("", "x", "nowhere", "w"), random)
    elif what == 1:
        node.output.append("more")
    else:
        del node.output[:]


def _operator(model: ModelProto, random: Random) -> None:
    node = _pick(model.graph.node, random)
    if random.random() < 0.8:
        names = (
            "",
            "Relu",
            "Conv",
            "Gemm",
            "Loop",
            "If",
            "Scan",
            "Nonsense",
            "Identity",
            "Softmax",
            "Concat",
            "Split",
            "Transpose",
            "Resize",
            "LSTM",
            "Constant",
            "TopK",
            "Gather",
            "Unsqueeze",
            "Cast",
            "Einsum",
            "NonZero",
            "Dropout",
            "OneHot",
        )
        node.op_type = _pick(names, random)
    else:
        node.domain = _pick(("ai.onnx", "com.microsoft", "nowhere", "ai.onnx.ml"), random)


def _attribute(model: ModelProto, random: Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    attribute = _pick(_pick(nodes, random).attribute, random)
    what = int(random.integers(0, 6))
    if what == 0 and attribute.ints:
        attribute.ints[int(random.integers(0, len(attribute.ints)))] = _number(random)
    elif what == 1:
        attribute.i = _number(random)
    elif what == 2:
        attribute.type = int(random.integers(0, 15))
    elif what == 3:
        attribute.name = _pick(("", "pads", "group", "strides", "nonsense", "auto_pad", "axis"), random)
    elif what == 4:
        attribute.ints.append(_number(random))
    else:
        attribute.ClearField("ints")


def _add_attribute(model: ModelProto, random: Random) -> None:
    names = (
        "auto_pad",
        "dilations",
        "group",
        "axis",
        "alpha",
        "epsilon",
        "ceil_mode",
        "count_include_pad",
        "to",
        "mode",
        "value",
        "training_mode",
        "then_branch",
        "equation",
        "storage_order",
    )
    values = (
        _number(random),
        0.5,
        float("nan"),
        "SAME_UPPER",
        "nonsense",
        [_number(random)] * int(random.integers(1, 4)),
        np.float32(3).item(),
    )
    _pick(model.graph.node, random).attribute.append(helper.make_attribute(_pick(names, random), _pick(values, random)))


def _nodes(model: ModelProto, random: Random) -> None:
    place, what = int(random.integers(0, len(model.graph.node))), int(random.integers(0, 4))
    if what == 0:
        del model.graph.node[place]
    elif what == 1:
        model.graph.node.append(model.graph.node[place])
    elif what == 2:
        kept = [model.graph.node[i] for i in random.permutation(len(model.graph.node))]
        copies = [onnx.NodeProto.FromString(one.SerializeToString()) for one in kept]
        del model.graph.node[:]
        model.graph.node.extend(copies)
    else:
        del model.graph.node[:]


def _opset(model: ModelProto, random: Random) -> None:
    what = int(random.integers(0, 4))
    if what == 0:
        del model.opset_import[:]
    elif what == 1:
        model.opset_import.append(helper.make_opsetid("", 9))
    else:
        model.opset_import[0].version = _pick(
            (0, -1, 1, 5, 7, 9, 10, 11, 12, 13, 18, 19, 20, 21, 23, 999, 2**40), random
        )


def _ir_version(model: ModelProto, random: Random) -> None:
    model.ir_version = _pick((0, 1, 2, 3, 4, 9, 10, 11, 12, 99, 2**40, -1), random)


def _value_info(model: ModelProto, random: Random) -> None:
    value = _pick([*model.graph.input, *model.graph.output], random)
    tensor, what = value.type.tensor_type, int(random.integers(0, 9))
    if what == 0:
        _pick(tensor.shape.dim, random).dim_value = _number(random)
    elif what == 1:
        tensor.elem_type = int(random.integers(0, 25))
    elif what == 2:
        value.ClearField("type")
    elif what == 3:
        tensor.ClearField("shape")
    elif what == 4:
        tensor.shape.dim.add().dim_value = _number(random)
    elif what == 5:
        del tensor.shape.dim[int(random.integers(0, len(tensor.shape.dim)))]
    elif what == 6:
        value.name = _pick(("", "nowhere", "w", "y", "x", "a"), random)
    elif what == 7:
        _pick(tensor.shape.dim, random).dim_param = _pick(("", "batch", "height", "batch*2", "\0"), random)
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


def _values(model: ModelProto, random: Random) -> None:
    what = int(random.integers(0, 5))
    if what == 0:
        del model.graph.input[:]
    elif what == 1:
        del model.graph.output[:]
    elif what == 2:
        model.graph.input.append(model.graph.input[0])
    elif what == 3:
        model.graph.output.append(
            _pick([*model.graph.output, onnx.ValueInfoProto(name="nowhere"), onnx.ValueInfoProto(name="p")], random)
        )
    else:
        model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _function(model: ModelProto, random: Random) -> None:
    inner = "F" if random.random() < 0.5 else "Relu"
    body = [helper.make_node(inner, ["i"], ["o"], domain="f" if inner == "F" else "")]
    model.functions.append(
        helper.make_function("f", "F", ["i"], ["o"], body, [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)])
    )
    if random.random() < 0.8:
        model.opset_import.append(helper.make_opsetid("f", 1))
    node = next(one for one in model.graph.node if one.op_type == "Relu")
    node.op_type, node.domain = "F", "f"


def _metadata(model: ModelProto, random: Random) -> None:
    keys = ("compress.preprocessing", "compress.classes", "compress.sizes")
    values = (
        "",
        "{",
        "[1, 2]",
        '{"mean": 5}',
        '{"mean": [0.5], "std": [0.0]}',
        '{"resize": -1}',
        '{"x": 1}',
        "[" * 5000,
        "1e999",
        '{"height": 10}',
    )
    model.metadata_props.add(key=_pick(keys, random), value=_pick(values, random))


def _subgraph(model: ModelProto, random: Random) -> None:
    graph = onnx.GraphProto.FromString(model.graph.SerializeToString())
    node = _pick(model.graph.node, random)
    node.attribute.append(
        AttributeProto(name=_pick(("body", "then_branch", "else_branch"), random), type=AttributeProto.GRAPH, g=graph)
    )


def _sparse(model: ModelProto, random: Random) -> None:
    tensor = model.graph.initializer[0]
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor)
    sparse.dims.extend([_number(random)])
    if random.random() < 0.5:
        del model.graph.initializer[0]


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (_truncate, _flip, _flip_head, _flip_head, _cut_out, _insert)
FIELDS: tuple[Callable[[ModelProto, Random], None], ...] = (
    _dims,
    _swap_dims,
    _type,
    _raw,
    _special,
    _both_data,
    _initializer_name,
    _external,
    _node_input,
    _node_input,
    _node_output,
    _operator,
    _attribute,
    _attribute,
    _add_attribute,
    _nodes,
    _opset,
    _ir_version,
    _value_info,
    _value_info,
    _values,
    _function,
    _metadata,
    _subgraph,
    _sparse,
)


def damaged(seed: int, case: int) -> tuple[str, bytes]:
    """Return what is damaged, and the file."""
    random = np.random.default_rng([seed, case])
    name = _pick(sorted(bases()), random)
    data = bases()[name]
    if random.random() < 0.3:
        change = _pick(BYTES, random)
        return f"{name} {change.__name__.strip('_')}", change(data, random)
    model, changes = (
        onnx.load_from_string(data),
        [_pick(FIELDS, random) for _ in range(1 if random.random() < 0.8 else 2)],
    )
    for edit in changes:
        try:
            edit(model, random)
        except (IndexError, ValueError, StopIteration):  # nothing left to damage behind the first change
            continue
    return f"{name} {' '.join(edit.__name__.strip('_') for edit in changes)}", model.SerializeToString()


# -- what the commands make of it --------------------------------------------------------------------------------------


def pictures(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (N, H, W, C) images and labels."""
    random = np.random.default_rng(5)
    return random.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8), np.arange(count) % CLASSES


def run_case(seed: int, case: int, folder: Path) -> list[Outcome]:
    """Return how `verify`, `inspect` and the import of one damaged file end."""
    what, data = damaged(seed, case)
    place = folder / str(case)
    place.mkdir(parents=True)
    try:
        (place / "m.onnx").write_bytes(data)
        (place / "w.bin").write_bytes(b"\0" * 1000)
        images, labels = pictures()
        np.savez(place / "test.npz", x=images, y=labels)
        acts = {"verify": _verify, "inspect": _inspect, "import": _import}
        return [guarded(case, f"{what}: {name}", lambda act=act: act(place)) for name, act in acts.items()]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _verify(place: Path) -> tuple[int, str, str]:
    settings = (
        "preprocessing.mean=[0.5]",
        "preprocessing.std=[0.25]",
        "resources=null",
        "repeats=2",
        "warmup=1",
        "threads=1",
    )
    flags = [flag for setting in settings for flag in ("--set", setting)]
    out = place / "verdict.json"
    code, output = command(
        "verify", str(place / "m.onnx"), "--data", str(place / "test.npz"), "--json", str(out), "-q", *flags
    )
    return code, output, _wrong_quality(place, out) if code == 0 else ""


def _wrong_quality(place: Path, verdict: Path) -> str:
    """Return in what a verdict that passed differs from ONNX Runtime's own predictions."""
    images, labels = pictures()
    logits = _runtime(place / "m.onnx", (images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.25)
    want = float((logits.argmax(1) == labels).mean())
    checks = json.loads(verdict.read_text("utf-8"))["verdict"]["checks"]
    said = next(check["detail"] for check in checks if check["name"] == "evaluation")
    return "" if f"{want:.2%}" in said else f"ONNX Runtime gives {want:.2%}, the verdict says {said}"


def _inspect(place: Path) -> tuple[int, str, str]:
    code, output = command("inspect", str(place / "m.onnx"), "-q", "--json", str(place / "i.json"))
    return code, output, ""


def _import(place: Path) -> tuple[int, str, str]:
    """Import as `load` does; the network must compute on new images what ONNX Runtime does."""
    import torch

    from compress.errors import CompressError, is_out_of_memory
    from compress.onnx_import.importer import import_onnx

    try:
        network = import_onnx(place / "m.onnx")
    except CompressError as error:
        return error.exit_code, str(error), ""
    except Exception as error:  # what the command line calls a bug
        return (3 if is_out_of_memory(error) else 70), f"{type(error).__name__}: {error}", ""
    feed = _random_inputs(place / "m.onnx")
    with torch.no_grad():
        have = _or_failure(lambda: network(*(torch.from_numpy(values) for values in feed.values())))
    want = _or_failure(lambda: _outputs(place / "m.onnx", feed))
    if isinstance(have, str) or isinstance(want, str):
        both = isinstance(have, str) and isinstance(want, str)
        return 0, "", "" if both else f"the import gives {have!s:.200}, ONNX Runtime {want!s:.200}"
    for first, second in zip(have if isinstance(have, tuple) else (have,), want, strict=True):
        if first.shape != second.shape or _error(first.numpy(), second) > 1e-3:
            return 0, "", f"off by {_error(first.numpy(), second):.2g}, of shape {tuple(first.shape)}"
    return 0, "", ""


def _or_failure(act: Callable[[], Any]) -> Any:
    """Return what an act returns, or the words of what it raises: an index out of range fails in both."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _error(have: np.ndarray, want: np.ndarray) -> float:
    """Return the largest difference as a share of the largest value; NaN and infinity must stand at the same places."""
    if have.shape != want.shape:
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(have[~finite], want[~finite], equal_nan=True) or not np.isfinite(have[finite]).all():
        return float("inf")
    return float(np.abs(have[finite] - want[finite]).max(initial=0) / max(np.abs(want[finite]).max(initial=0), 1e-30))


def _random_inputs(path: Path) -> dict[str, np.ndarray]:
    """Return one image, and values for whatever else a file takes."""
    model, random = onnx.load(path, load_external_data=False), np.random.default_rng(9)
    weights = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name not in weights:
            sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            feed[value.name] = random.standard_normal(sizes).astype(kind)
    return feed


def _outputs(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feed)
    return found


def _runtime(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the first output for some images; a file for one image gets one after the other."""
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    first = next(value for value in model.graph.input if value.name not in weights)
    single = first.type.tensor_type.shape.dim[0].dim_value == 1
    parts = [images[place : place + 1] for place in range(len(images))] if single else [images]
    return np.concatenate([_outputs(path, {first.name: part})[0] for part in parts])


if __name__ == "__main__":
    sys.exit(main(__file__, run_case, lambda seed, case: damaged(seed, case)[0]))
