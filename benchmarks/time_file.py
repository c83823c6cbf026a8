"""Milliseconds of an ONNX file in a process of its own, as `deploy.command` reads them.

    python benchmarks/time_file.py MODEL.onnx [--runtime onnxruntime|openvino] [--threads 1] [--batch 1] [--calls 100]

The process imports nothing of compress: it stands for a device.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 10


def open_onnxruntime(path: Path, threads: int, batch: int) -> tuple[Callable[[], Any], str]:
    """Return one call of the file, and the name and version of the runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {
        one.name: np.full([size if isinstance(size, int) else batch for size in one.shape], 0.5, np.float32)
        for one in session.get_inputs()
    }
    return lambda: session.run(None, inputs), f"onnxruntime {onnxruntime.__version__}"


def open_openvino(path: Path, threads: int, batch: int) -> tuple[Callable[[], Any], str]:
    """Return one call of the file in float32, and the name and version of the runtime."""
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape(
        {one: [size.get_length() if size.is_static else batch for size in one.partial_shape] for one in model.inputs}
    )
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    inputs = [np.full(one.shape, 0.5, np.float32) for one in model.inputs]
    return lambda: request.infer(inputs), f"openvino {openvino.__version__}"


def main() -> None:
    """Time the file and print its milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=100)
    arguments = parser.parse_args()
    opened = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[arguments.runtime]
    call, runtime = opened(arguments.model, arguments.threads, arguments.batch)
    times = []
    for _ in range(arguments.calls + WARMUP):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    digest = hashlib.sha256(arguments.model.read_bytes()).hexdigest()
    print(json.dumps({"milliseconds": times[WARMUP:], "sha256": digest, "runtime": runtime}))


if __name__ == "__main__":
    main()
