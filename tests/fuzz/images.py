"""Damaged images through `verify`; a picture that is taken is read as Pillow reads it.

python tests/fuzz/images.py --count 500
"""

import io
import json
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

HERE = Path(__file__).parent
for place in (HERE, HERE.parent, HERE.parents[1]):
    sys.path.insert(0, str(place))

from onnx_files import CLASSES, SIZE, bases  # noqa: E402
from outcomes import Outcome, command, guarded, main  # noqa: E402

Random = np.random.Generator


@cache
def originals() -> dict[str, bytes]:
    """Return small whole pictures by "format mode suffix"."""
    random = np.random.default_rng(3)
    colour = Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    deep = Image.fromarray(random.integers(0, 2**16, (SIZE, SIZE)).astype(np.uint16))
    real = Image.fromarray(random.random((SIZE, SIZE)).astype(np.float32))
    whole = Image.fromarray(random.integers(0, 2**20, (SIZE, SIZE)).astype(np.int32))
    modes = {mode: colour.convert(mode) for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr")}
    modes |= {"I;16": deep, "F": real, "I": whole}
    kinds = {
        "PNG": (".png", ("RGB", "L", "1", "P", "RGBA", "LA", "I;16")),
        "JPEG": (".jpg", ("RGB", "L", "CMYK")),
        "BMP": (".bmp", ("RGB", "L", "P", "1")),
        "TIFF": (".tif", ("RGB", "L", "1", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F", "I")),
        "WEBP": (".webp", ("RGB", "RGBA")),
        "PPM": (".ppm", ("RGB", "L", "1", "I;16")),
    }
    found = {}
    for kind, (suffix, names) in kinds.items():
        for mode in names:
            stream = io.BytesIO()
            modes[mode].save(stream, kind)
            found[f"{kind} {mode} {suffix}"] = stream.getvalue()
    stream = io.BytesIO()
    colour.save(stream, "TIFF", compression="tiff_lzw")
    return found | {"TIFF LZW .tif": stream.getvalue()}


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: int(random.integers(0, len(data)))]


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for place in random.integers(0, len(data), int(random.integers(1, 9))):
        changed[place] ^= 1 << int(random.integers(0, 8))
    return bytes(changed)


def _flip_head(data: bytes, random: Random) -> bytes:
    return _flip(data[:64], random) + data[64:]


def _cut_out(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + data[start + int(random.integers(1, 40)) :]


def _insert(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + random.bytes(int(random.integers(1, 20))) + data[start:]


def _field(data: bytes, random: Random) -> bytes:
    """Write a number that a header may have anywhere in the first bytes, in either order of bytes."""
    number = int((0, 1, 2, 16, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1)[random.integers(0, 8)])
    form = ("<I", ">I", "<H", ">H")[random.integers(0, 4)]
    raw = struct.pack(form, number & (0xFFFFFFFF if form[1] == "I" else 0xFFFF))
    start = int(random.integers(0, min(len(data), 80)))
    return data[:start] + raw + data[start + len(raw) :]


def _png_header(data: bytes, random: Random) -> bytes:
    """Change a PNG's size, depth or kind and give it the right checksum."""
    if not data.startswith(b"\x89PNG"):
        return _field(data, random)
    width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", data[16:29])
    choices = (
        (width * 2, height, depth, kind),
        (width, 2**31 - 1, depth, kind),
        (20_000, 20_000, depth, kind),
        (0, height, depth, kind),
        (width, height, 16, kind),
        (width, height, 1, kind),
        (width, height, depth, 7),
        (width, height, depth, 3),
    )
    header = b"IHDR" + struct.pack(">IIBBBBB", *choices[random.integers(0, len(choices))], *rest)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _other_suffix(data: bytes, random: Random) -> bytes:
    """Leave the picture whole; its name says another format."""
    return data


CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _truncate,
    _flip,
    _flip_head,
    _flip_head,
    _cut_out,
    _insert,
    _field,
    _field,
    _png_header,
    _other_suffix,
)


def damaged(seed: int, case: int) -> tuple[str, str, bytes]:
    """Return what is damaged, the suffix, and the file."""
    random = np.random.default_rng([seed, case, 1])
    names = sorted(originals())
    name = names[int(random.integers(0, len(names)))]
    change = CHANGES[int(random.integers(0, len(CHANGES)))]
    suffix = ".jpg" if change is _other_suffix else name.rpartition(" ")[2]
    return f"{name} {change.__name__.strip('_')}", suffix, change(originals()[name], random)


def run_case(seed: int, case: int, folder: Path) -> list[Outcome]:
    """Return how `verify` on a folder with one damaged picture ends."""
    what, suffix, data = damaged(seed, case)
    place = folder / f"i{case}"
    try:
        plain = Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8))
        for label in range(CLASSES):
            (place / "test" / str(label)).mkdir(parents=True)
            plain.save(place / "test" / str(label) / "a.png")
        (place / "test" / "0" / f"b{suffix}").write_bytes(data)
        (place / "m.onnx").write_bytes(bases()["chain"])
        return [guarded(case, what, lambda: _verify(place, suffix))]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _verify(place: Path, suffix: str) -> tuple[int, str, str]:
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
        "verify", str(place / "m.onnx"), "--data", str(place / "test"), "--json", str(out), "-q", *flags
    )
    return code, output, _wrong(place, suffix, out) if code == 0 else ""


def _wrong(place: Path, suffix: str, verdict: Path) -> str:
    """Return in what a verdict that passed differs from Pillow and ONNX Runtime by themselves."""
    import onnxruntime

    from compress.data.preprocessing import Preprocessing
    from compress.data.sources.classification import read_folder

    pixels = _by_pillow(place / "test" / "0" / f"b{suffix}")
    if pixels is None:
        return "a picture was taken whose values have no known scale"
    taken = read_folder(place / "test", Preprocessing().fit_image, False).read(np.array([1]))[0]
    if taken.shape != pixels.shape or np.abs(taken.astype(int) - pixels.astype(int)).max() > 0:
        return "the pixels are not Pillow's"
    images = np.stack(
        [np.full((SIZE, SIZE, 3), 90, np.uint8), pixels, *[np.full((SIZE, SIZE, 3), 90, np.uint8)] * (CLASSES - 1)]
    )
    labels = np.array([0, 0, *range(1, CLASSES)])
    inputs = ((images.astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(
        onnx.load(place / "m.onnx").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    want = float((session.run(None, {"x": inputs})[0].argmax(1) == labels).mean())
    checks = json.loads(verdict.read_text("utf-8"))["verdict"]["checks"]
    said = next(check["detail"] for check in checks if check["name"] == "evaluation")
    return "" if f"{want:.2%}" in said else f"ONNX Runtime gives {want:.2%}, the verdict says {said}"


def _by_pillow(path: Path) -> np.ndarray | None:
    """Return the pixels of a picture without this program; None where no scale is known for its mode."""
    with warnings.catch_warnings(), Image.open(path) as picture:
        warnings.simplefilter("ignore")
        picture.load()
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
            grey = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
            return np.stack([grey] * 3, -1)
        if picture.mode in ("I", "F", "LAB"):
            return None
        return np.asarray(picture.convert("RGB"))


if __name__ == "__main__":
    sys.exit(main(__file__, run_case, lambda seed, case: damaged(seed, case)[0]))
