"""A device without noise: it prints milliseconds that follow from the shapes of a file's weights, with a staircase.

As a script it needs no package, so that a call takes some hundredths of a second:

    python device.py MODEL.onnx|- [--json] [--log FILE] [--threads N] [--state FILE --drop N]
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4  # outputs that are computed together
CALL_MS, LAYER_MS, MS = 0.005, 0.001, 2e-6


def milliseconds(content: bytes, block: int = BLOCK) -> float:
    """Return the time of a file: weights with the outputs rounded up to blocks, and a part for each layer."""
    shapes = [dims for dims in weights(content) if len(dims) in (2, 4)]
    work = [math.ceil(dims[0] / block) * block * math.prod(dims[1:]) for dims in shapes]
    return CALL_MS + sum(LAYER_MS + MS * (one + 40 * dims[0]) for one, dims in zip(work, shapes, strict=True))


def weights(content: bytes) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the initializers of an ONNX file, read from its protobuf fields."""
    for graph in _fields(content, 7):
        for tensor in _fields(graph, 5):
            yield tuple(_numbers(tensor, 1))


def _fields(content: bytes, wanted: int) -> Iterator[bytes]:
    return (value for number, value in _walk(content) if number == wanted and isinstance(value, bytes))


def _numbers(content: bytes, wanted: int) -> Iterator[int]:
    for number, value in _walk(content):
        if number == wanted and isinstance(value, int):
            yield value
        elif number == wanted and isinstance(value, bytes):  # packed
            place = 0
            while place < len(value):
                one, place = _varint(value, place)
                yield one


def _walk(content: bytes) -> Iterator[tuple[int, "int | bytes"]]:
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        if key & 7 == 0:
            value, place = _varint(content, place)
            yield key >> 3, value
        else:
            length, place = _varint(content, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            yield key >> 3, content[place : place + length]
            place += length


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def _option(name: str) -> "str | None":
    arguments = sys.argv[1:]
    return arguments[arguments.index(name) + 1] if name in arguments else None


def main() -> None:
    content = sys.stdin.buffer.read() if sys.argv[1] == "-" else Path(sys.argv[1]).read_bytes()
    if (state := _option("--state")) is not None:  # a connection that drops once, at call N
        with Path(state).open("a+") as file:
            file.seek(0)
            calls = len(file.readlines())
            file.write(f"{Path(sys.argv[1]).name}\n")
        if calls == int(_option("--drop") or -1):
            sys.exit("ssh: connection closed by remote host")
    took = milliseconds(content) / int(_option("--threads") or 1)
    sys.stdout.write("warming up\n")
    if "--json" in sys.argv:
        digest = hashlib.sha256(content).hexdigest()
        sys.stdout.write(json.dumps({"milliseconds": [took] * 3, "sha256": digest, "runtime": "simulated 1.0"}) + "\n")
    else:
        sys.stdout.write(f"{took} {took} {took}\n")


if __name__ == "__main__":
    main()
