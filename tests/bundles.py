"""A bundle of a network with one layer, made by hand: for tests that change something in it, no run needed."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from compress.bundle import check
from compress.bundle.samples import pack_arrays

Content = dict[str, bytes]
CPU = "CPUExecutionProvider"


def linear_model(seed: int = 0, batch: int | str = "batch", name: str = "images", location: str = "") -> bytes:
    """Return an ONNX model, (batch, 1, 2, 2) -> (batch, 3); with a location its weights are said to lie there."""
    weights = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    tensor = onnx.numpy_helper.from_array(weights, "weights")
    if location:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    nodes = [
        onnx.helper.make_node("Flatten", [name], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "linear",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, 1, 2, 2])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, 3])],
        [tensor],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def linear_weights(seed: int = 0) -> bytes:
    """Return the weights of that model, as they lie in a file of their own."""
    return np.random.default_rng(seed).normal(size=(4, 3)).astype("<f4").tobytes()


def make_content(batch: int | str = "batch", **changes: Any) -> Content:
    """Return the content of a whole bundle, less its manifest; `changes` go into `promises` of model.json."""
    model = linear_model(batch=batch)
    inputs = np.random.default_rng(1).normal(size=(6, 1, 2, 2)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=[CPU])
    step = batch if isinstance(batch, int) else len(inputs)
    outputs = [session.run(None, {"images": inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
    described = {
        "schema": 1,
        "signature": {
            "inputs": [{"name": "images", "shape": [batch, 1, 2, 2], "dtype": "float32"}],
            "outputs": [{"name": "logits", "shape": [batch, 3], "dtype": "float32"}],
        },
        "promises": {"tolerance": 1e-4, "max_latency_ms": None} | changes,
        "measured": {"latency_ms": 0.5, "provider": CPU, "machine": "Imaginary 9000", "threads": 1, "batch_size": 1},
        "verdict": {"passed": True, "checks": [{"name": "parity", "status": "pass"}]},
    }
    return {
        "model.onnx": model,
        "model.json": json.dumps(described).encode(),
        "samples.npz": pack_arrays({"inputs": inputs, "expected": np.concatenate(outputs)}),
        "README.md": b"# A bundle\n",
    }


def described(content: Content, **changes: Any) -> Content:
    """Return a bundle's content with other values at the top of its model.json."""
    return content | {"model.json": json.dumps(json.loads(content["model.json"]) | changes).encode()}


def sealed(content: Mapping[str, bytes]) -> Content:
    """Return content with the manifest that fits it."""
    files = {name: data for name, data in content.items() if name not in (check.MANIFEST, check.SIGNATURE)}
    return {**content, check.MANIFEST: check.build_manifest(files)}


def write_zip(content: Mapping[str, bytes], path: Path) -> Path:
    """Write content as an archive in the form of a bundle."""
    path.write_bytes(check.build_archive(content))
    return path


def write_folder(content: Mapping[str, bytes], folder: Path) -> Path:
    """Write content as an extracted bundle."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """Return data with one bit changed."""
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def raw_zip(
    *entries: tuple[str, bytes],
    flags: int = 0,
    method: int = 0,
    size: int | None = None,
    kind: int = 0o100644 << 16,
    count: int | None = None,
    overlapping: bool = False,
) -> bytes:
    """Return an archive with whatever is wanted in its headers; `size` is what they state for the content."""
    body, directory = b"", b""
    for name, content in entries:
        text, stated = name.encode("utf-8"), len(content) if size is None else size
        header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, flags, method, 0, 33, 0, stated, stated, len(text), 0)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 788, 20, flags, method, 0, 33, 0, stated, stated, len(text), 0, 0, 0, 0, kind,
            0 if overlapping else len(body),
        ) + text  # fmt: skip
        body += header + text + content
    number = len(entries) if count is None else count
    return body + directory + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, number, number, len(directory), len(body), 0
    )  # fmt: skip
