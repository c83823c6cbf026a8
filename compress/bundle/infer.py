"""Predictions for image files with a deployment bundle; needs numpy, Pillow and onnxruntime.

    python infer.py IMAGE...                       predictions, a line for each image or object
    python infer.py IMAGE... --json                the same as JSON, one object a line
    python infer.py IMAGE... --raw outputs.npz     also writes the network's outputs
    python infer.py IMAGE... --inputs inputs.npy   only writes the network's inputs, for another runtime

Images are decoded, resized and normalised as when the network was verified: `pixels.py` and `preprocessing.py` beside
this file are the code that did it. `python check.py` says whether the files of the bundle are those that were written.

    exit code   0 done       2 the command line is wrong     4 an image or the bundle cannot be read
                5 onnxruntime or another package is missing
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
DONE, USAGE, UNREADABLE, UNAVAILABLE = 0, 2, 4, 5
SCORE = 0.25  # smallest score of an object that is printed


class Stop(Exception):
    """No prediction can be made.

    Args:
        message: Reason in a sentence.
        exit_code: Exit code of the program.
    """

    def __init__(self, message: str, exit_code: int = UNREADABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def beside(name: str) -> ModuleType:
    """Return the module in a file of the bundle, whatever else has its name.

    Raises:
        Stop: The file is missing, or a package that it needs.
    """
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None or not (HERE / f"{name}.py").is_file():
        raise Stop(f"'{HERE}' must hold {name}.py: infer.py works in an unpacked bundle.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(str(error.name).partition(".")[0], error.name)
        raise Stop(f"{package} is not installed: pip install {package}", UNAVAILABLE) from error
    return module


class Model:
    """The network of a bundle.

    Args:
        threads: Threads inside one operator.
        provider: Execution provider; None for that in `model.json`.
        opens: False reads the description only.

    Attributes:
        values: Content of `model.json`.
    """

    def __init__(self, threads: int = 1, provider: str | None = None, opens: bool = True) -> None:
        try:
            self.values: dict[str, Any] = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
            (self.source,) = self.values["signature"]["inputs"]
            self.outputs = [one["name"] for one in self.values["signature"]["outputs"]]
            self.task = self.values.get("task", "classification")
            self.classes = list(self.values["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Stop(f"'{HERE / 'model.json'}' must be that of a bundle: {error!r}") from error
        code = beside("preprocessing")
        self._place_letterbox, self._fit_letterbox = code.place_letterbox, code.fit_letterbox
        self.preprocessing = code.Preprocessing.from_dict(self.values["preprocessing"])
        self._pixels = beside("pixels")
        self._session = self._open(threads, provider) if opens else None

    def _open(self, threads: int, provider: str | None) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise Stop("onnxruntime is not installed: pip install onnxruntime", UNAVAILABLE) from error
        wanted = provider or self.values["promises"].get("provider", "CPUExecutionProvider")
        if wanted not in onnxruntime.get_available_providers():
            present = ", ".join(onnxruntime.get_available_providers())
            raise Stop(f"Execution provider {wanted} is not available, ONNX Runtime has {present}.", UNAVAILABLE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            return onnxruntime.InferenceSession(str(HERE / "model.onnx"), options, providers=[wanted])
        except Exception as error:  # ONNX Runtime raises types of its own
            raise Stop(f"'{HERE / 'model.onnx'}' cannot be opened: {(str(error).splitlines() or [''])[0]}") from error

    def read(self, path: Path) -> tuple[Any, Any]:
        """Return an image file as (1, ...) float32 input, and its (height, width).

        Raises:
            Stop: The file is no picture that can be read.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as picture:
                picture.load()
                image = self._pixels.convert_picture(picture, self.preprocessing.channels == "L")
        except self._pixels.UnknownLevels as error:
            raise Stop(f"'{path}' must have 8 bits a channel or 16-bit grey, its mode is {error}.") from error
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise Stop(f"'{path}' must be a readable image: {error}") from error
        box = self.values.get("letterbox")
        fitted = self._fit_letterbox(image, tuple(box)) if box else self.preprocessing.fit_image(image)
        return self.preprocessing.normalize(fitted[None]), image.shape[:2]

    def compute(self, images: Any) -> dict[str, Any]:
        """Return name -> output for a (1, ...) input; a fixed batch is filled with the same image."""
        import numpy as np

        batch = self.source["shape"][0]
        filled = np.repeat(images, batch, 0) if isinstance(batch, int) else images
        assert self._session is not None
        found = self._session.run(self.outputs, {self.source["name"]: filled})
        return {name: array[:1] for name, array in zip(self.outputs, found, strict=True)}

    def predictions(self, outputs: Mapping[str, Any], size: tuple[int, int], top: int) -> list[dict[str, Any]]:
        """Return what the outputs of an image mean, as plain values.

        Args:
            outputs: Name -> (1, ...) output.
            size: (height, width) of the image file.
            top: Largest number of classes.
        """
        first = next(iter(outputs.values()))[0]
        if self.task == "classification":
            return self._classes_of(first, top)
        if self.task == "segmentation":
            return self._areas_of(first)
        if self.task == "regression":
            return [{"values": [float(value) for value in first.reshape(-1)]}]
        return self._objects_of(outputs, size)

    def _name(self, index: int) -> str:
        return str(self.classes[index]) if index < len(self.classes) else f"class {index}"

    def _classes_of(self, logits: Any, top: int) -> list[dict[str, Any]]:
        import numpy as np

        shifted = np.exp(logits.astype(np.float64) - logits.max())
        shares = shifted / shifted.sum()
        order = np.argsort(-shares, kind="stable")[:top]
        return [{"class": self._name(int(one)), "index": int(one), "score": float(shares[one])} for one in order]

    def _areas_of(self, logits: Any) -> list[dict[str, Any]]:
        import numpy as np

        counts = np.bincount(logits.argmax(0).reshape(-1), minlength=len(logits))
        shares = counts / counts.sum()
        order = [int(one) for one in np.argsort(-shares, kind="stable") if shares[one]]
        return [{"class": self._name(one), "index": one, "share": float(shares[one])} for one in order]

    def _objects_of(self, outputs: Mapping[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
        decoder = self.values.get("decoder")
        if decoder is None:
            raise Stop(
                "The outputs are decoded by a function that this bundle does not contain; --raw FILE.npz writes them.",
                USAGE,
            )
        shape = self.source["shape"]
        inner = tuple(shape[2:4] if self.preprocessing.layout == "NCHW" else shape[1:3])
        (found,) = getattr(beside("decode"), decoder["name"])(outputs, inner, **decoder["kwargs"])
        objects = []
        for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
            if score >= SCORE:
                named = {"class": self._name(int(label)), "index": int(label), "score": float(score)}
                objects.append({**named, "box": self._in_file(box, size)})
        return objects

    def _in_file(self, box: Any, size: tuple[int, int]) -> list[float]:
        """Return a box [x0, y0, x1, y1] of the network's input in pixels of the image file."""
        if self.values.get("letterbox"):
            scale, top, left = self._place_letterbox(size, tuple(self.values["letterbox"]))
            scales, shifts = (scale, scale), (top, left)
        else:
            scales, shifts, _ = self.preprocessing.geometry(*size)
        height, width = size
        ends = (width, height, width, height)
        places = (1, 0, 1, 0)
        moved = ((float(box[k]) - shifts[places[k]]) / scales[places[k]] for k in range(4))
        return [min(max(value, 0.0), float(end)) for value, end in zip(moved, ends, strict=True)]


def lines_of(path: Path, found: Sequence[Mapping[str, Any]], task: str) -> Iterator[str]:
    """Yield the lines of an image's predictions."""
    if task == "regression":
        yield f"{path}: {', '.join(f'{value:.6g}' for value in found[0]['values'])}"
    elif task == "detection":
        for one in found:
            yield f"{path}: {one['class']} {one['score']:.3f} [{', '.join(f'{value:.1f}' for value in one['box'])}]"
        if not found:
            yield f"{path}: nothing with a score of at least {SCORE}"
    else:
        key = "score" if task == "classification" else "share"
        named = (f"{one['class']} {one[key]:.3f}" for one in found)
        yield f"{path}: {', '.join(named)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions for image files, and return the exit code."""
    parser = argparse.ArgumentParser(description="Predictions for image files.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes of a classifier (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--inputs", type=Path, metavar="FILE.npy", help="only write the inputs of the network")
    parser.add_argument("--raw", type=Path, metavar="FILE.npz", help="also write the outputs of the network")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads inside one operator")
    parser.add_argument("--provider", metavar="NAME", help="execution provider; by default that of the verification")
    options = parser.parse_args(arguments)
    if options.top < 1 or options.threads < 1:
        parser.error("--top and --threads must be at least 1")
    try:
        _predict(options)
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    return DONE


def _predict(options: argparse.Namespace) -> None:
    model = Model(options.threads, options.provider, opens=options.inputs is None)
    import numpy as np

    inputs, raw = [], []
    for path in options.images:
        array, size = model.read(path)
        if options.inputs is not None:
            inputs.append(array)
            continue
        outputs = model.compute(array)
        raw.append(outputs)
        is_raw_only = options.raw is not None and _lacks_decoder(model)
        found = [] if is_raw_only else model.predictions(outputs, size, options.top)
        if options.json:
            print(json.dumps({"image": str(path), "predictions": found}, allow_nan=False), flush=True)
        else:
            for line in lines_of(path, found, model.task):
                print(line, flush=True)
    try:
        if options.inputs is not None:
            np.save(options.inputs, np.concatenate(inputs))
        if options.raw is not None and raw:
            arrays: dict[str, Any] = {name: np.concatenate([one[name] for one in raw]) for name in model.outputs}
            np.savez(options.raw, **arrays)
    except OSError as error:
        raise Stop(f"'{error.filename}' cannot be written: {error.strerror}.") from error


def _lacks_decoder(model: Model) -> bool:
    return model.task == "detection" and model.values.get("decoder") is None


if __name__ == "__main__":
    sys.exit(main())
