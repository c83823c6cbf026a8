"""Images with class labels: arrays, IDX files, folders, torchvision data sets.

An `ImageSource` has N labelled uint8 images, read by index; all images that one `read` returns have one shape.
Small sets are arrays in memory; folders and large torchvision sets are decoded when they are read.
The modules `annotated.py`, `boxes.py` and `user.py` read targets other than class indices.
"""

import gzip
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from compress.data.sources.image_files import open_picture, to_pixels
from compress.errors import ArtifactError, DataError, translated

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_MOST_DEFLATED = 1_040  # largest expansion factor of gzip

FitImage = Callable[[np.ndarray], np.ndarray]


class ImageSource(Protocol):
    """Source of N labelled images."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names if the source has them, else ()."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices`: uint8 (n, H, W, C), C = 1 or 3; float32 if already prepared."""

    def read_targets(self, indices: np.ndarray) -> Any:
        """Return the targets of the images at `indices`: an array of n entries, or a list."""


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) int64.
        classes: Class names or ().
        fit_image: Geometric preprocessing of one image, or None.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()
    fit_image: FitImage | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read_targets(self, indices: np.ndarray) -> np.ndarray:
        """Return (n,) int64 class indices."""
        labels: np.ndarray = self.labels[indices]
        return labels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices`: uint8 (n, H, W, C)."""
        images: np.ndarray = self.images[indices]
        if self.fit_image is None:
            return images
        return np.stack([self.fit_image(image) for image in images])


@dataclass(frozen=True)
class LazySource:
    """Images decoded when they are read.

    Attributes:
        open_image: Function from an index to a picture.
        labels: (N,) int64.
        classes: Class names or ().
        fit_image: Geometric preprocessing of one image.
        grey: Whether images are read with one channel instead of three.
        is_threadsafe: Whether images may be opened in parallel, on all cores.
    """

    open_image: Callable[[int], Image.Image]
    labels: np.ndarray
    classes: tuple[str, ...]
    fit_image: FitImage
    grey: bool = False
    is_threadsafe: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def read_targets(self, indices: np.ndarray) -> np.ndarray:
        """Return (n,) int64 class indices."""
        labels: np.ndarray = self.labels[indices]
        return labels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices`: uint8 (n, H, W, C).

        Raises:
            DataError: The images do not all have one shape.
        """
        several = readers().map if self.is_threadsafe else map
        images = list(several(self._read_one, indices.tolist()))
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"Images must have one shape after preprocessing, got {sorted(shapes)[:3]}.",
                hint="Set preprocessing.resize and preprocessing.crop.",
            )
        return np.stack(images)

    def _read_one(self, index: int) -> np.ndarray:
        return self.fit_image(to_pixels(self.open_image(index), self.grey, f"image {index}"))


@cache
def readers() -> ThreadPoolExecutor:
    """Return a thread pool that decodes pictures, one thread per core; decoders release the interpreter lock."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")


def read_arrays(
    images_path: Path,
    labels_path: Path | None,
    image_key: str = "x",
    label_key: str = "y",
    fit_image: FitImage | None = None,
) -> ArraySource:
    """Read uint8 (N, H, W, C) or (N, H, W) images and integer labels.

    Args:
        images_path: `.npz` with both arrays, or `.npy` with the images.
        labels_path: `.npy` with the labels; None when they are in the `.npz`.
        image_key: Name of the image array in an `.npz`.
        label_key: Name of the label array in an `.npz`.
        fit_image: Geometric preprocessing, applied when images are read.

    Raises:
        ArtifactError: A file is missing, unreadable or lacks a key.
        DataError: The arrays are not images and labels.
    """
    loaded = load_numpy(images_path)
    classes: tuple[str, ...] = ()
    if isinstance(loaded, dict):
        images = member(loaded, image_key, images_path)
        labels = _load_labels(labels_path) if labels_path else member(loaded, label_key, images_path)
        classes = tuple(str(name) for name in np.ravel(loaded.get("classes", ())))
    elif labels_path is None:
        raise ArtifactError(f"'{images_path}' holds images only; labels must be given in a file of their own.")
    else:
        images, labels = loaded, _load_labels(labels_path)
    return _checked(images, labels, classes, images_path, fit_image)


def read_idx(images_path: Path, labels_path: Path, fit_image: FitImage | None = None) -> ArraySource:
    """Read a pair of IDX files (the MNIST format), plain or gzip.

    Raises:
        ArtifactError: A file is missing or no valid IDX file.
        DataError: The arrays are not images and labels.
    """
    return _checked(_read_idx_array(images_path), _read_idx_array(labels_path), (), images_path, fit_image)


def read_folder(root: Path, fit_image: FitImage, grey: bool, order: Sequence[str] | None = None) -> LazySource:
    """Read a folder with one sub-folder of images for each class.

    Args:
        root: The folder.
        fit_image: Geometric preprocessing.
        grey: Whether images are read with one channel.
        order: Folder names in the order of class indices; None sorts them as text, as torchvision does.

    Raises:
        ArtifactError: The folder is missing or holds no images.
        DataError: `order` does not name each folder once.
    """
    if not root.is_dir():
        raise ArtifactError(f"Image folder '{root}' must exist and hold one folder for each class.")
    folders = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = _ordered([entry.name for entry in folders], order, root)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        paths += members
        labels += [label] * len(members)
    if not paths and any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        raise ArtifactError(
            f"Image folder '{root}' must hold images in one folder for each class, its images lie in it without one.",
            hint="Images without labels are {unlabelled: FOLDER}, those with masks {images: FOLDER, masks: FOLDER}.",
        )
    if not paths:
        raise ArtifactError(
            f"Image folder '{root}' must hold images in one folder for each class, found none.",
            hint=f"File names must end in {', '.join(IMAGE_SUFFIXES)}.",
        )
    empty = [name for label, name in enumerate(classes) if label not in set(labels)]
    if empty:
        raise ArtifactError(f"Every class folder in '{root}' must hold an image, none in {', '.join(empty[:6])}.")
    return LazySource(
        lambda index: open_picture(paths[index]), np.asarray(labels, np.int64), classes, fit_image, grey, True
    )


def _ordered(names: Sequence[str], order: Sequence[str] | None, root: Path) -> tuple[str, ...]:
    if order is None:
        return tuple(sorted(names))
    if sorted(order) != sorted(names):
        different = sorted(set(names) ^ set(order)) or sorted({name for name in order if order.count(name) > 1})
        raise DataError(
            f"classes must name each class folder in '{root}' once, in the order of class indices; it has "
            f"{len(names)} folders, classes has {len(order)} names, different in {', '.join(different[:6])}."
        )
    return tuple(order)


def order_warning(classes: Sequence[str]) -> str | None:
    """Return a warning if class names are in text order but contain numbers in another order, else None.

    >>> order_warning(["0", "1", "2"]), order_warning(["cat", "dog"])
    (None, None)
    >>> order_warning(["0", "1", "10", "2"])[:57]
    'Classes are in text order, as torchvision has it: class 2'
    """
    counted = sorted(classes, key=_by_count)
    if list(classes) != sorted(classes) or counted == list(classes):
        return None
    place = next(place for place, (one, other) in enumerate(zip(classes, counted, strict=True)) if one != other)
    return (
        f"Classes are in text order, as torchvision has it: class {place} is '{classes[place]}', by their numbers it "
        f"would be '{counted[place]}'. For a network that was trained in another order, name it beside the folder: "
        f"classes: [{', '.join(counted[:4])}, ...]."
    )


def _by_count(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders names by the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def read_torchvision(
    name: str, root: Path, train: bool, download: bool, fit_image: FitImage, grey: bool
) -> ArraySource | LazySource:
    """Read any torchvision classification data set by its class name.

    Args:
        name: Class name, such as "CIFAR10", "FashionMNIST", "Flowers102".
        root: Folder that torchvision reads from and downloads to.
        train: Whether the training half is read, else the test half.
        download: Whether torchvision may fetch missing files.
        fit_image: Geometric preprocessing.
        grey: Whether images are read with one channel.

    Raises:
        DataError: The data set does not exist, or has no labels.
        ArtifactError: The files are missing.
    """
    from torchvision import datasets  # heavy, and only needed by those who name a torchvision set

    if not isinstance(getattr(datasets, name, None), type):
        raise DataError(f"torchvision has no data set named '{name}'.", hint=f"It has {', '.join(datasets.__all__)}.")
    dataset = _open_torchvision(getattr(datasets, name), root, train, download)
    labels = _torchvision_labels(dataset, name)
    classes = tuple(str(label) for label in getattr(dataset, "classes", ()))
    images = getattr(dataset, "data", None)
    if images is not None:
        array = images if isinstance(images, np.ndarray) else np.asarray(images)
        coloured = array.ndim == 4 and array.shape[-1] == 3
        if array.dtype == np.uint8 and (array.ndim == 3 or coloured) and not (grey and coloured):
            return _checked(array, labels, classes, root, fit_image)
    is_folder = isinstance(dataset, datasets.DatasetFolder)  # others may share a file between images
    return LazySource(lambda index: dataset[index][0], labels, classes, fit_image, grey, is_folder)


def _open_torchvision(factory: Callable[..., object], root: Path, train: bool, download: bool) -> Any:
    """Open one half of a data set; torchvision names the halves in several ways, and not every set can download."""
    halves: list[dict[str, object]] = [{"train": train}]
    halves += [{"split": names[0] if train else names[1]} for names in (("train", "test"), ("trainval", "val"))]
    failures: list[str] = []
    for half, extra in product(halves, ({"download": download}, {})):
        try:
            with translated(
                lambda error: ArtifactError(
                    f"torchvision could not open the data set in '{root}': {str(error) or type(error).__name__}",
                    hint="Set download: true on a machine with network access, or give the path to files you have.",
                ),
                TypeError,
                ValueError,
            ):
                return factory(str(root), **half, **extra)
        except (TypeError, ValueError) as error:
            failures.append(str(error))
    raise DataError(f"torchvision could not open the data set in '{root}': {failures[0]}")


def _torchvision_labels(dataset: object, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels", "_samples"):
        values = getattr(dataset, attribute, None)
        if values is None:
            continue
        try:
            labels = np.asarray([sample[1] for sample in values] if attribute == "_samples" else values, np.int64)
        except (TypeError, ValueError, IndexError):
            break
        if labels.ndim == 1:
            return labels
    raise DataError(f"torchvision data set '{name}' must have one class label for each image, it has none.")


def load_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Return the array of a .npy file, or the arrays of an .npz by name.

    Raises:
        ArtifactError: The file is missing, damaged, or holds pickled objects.
    """
    _require_file(path)
    with (
        translated(
            lambda error: ArtifactError(
                f"'{path}' must be a readable .npz or .npy file without pickled objects: {error}"
            )
        ),
        path.open("rb") as stream,
    ):  # numpy does not close a damaged file that it opened itself
        require_room(path, _claimed_bytes(path))
        loaded = np.load(stream, allow_pickle=False)
        return {key: loaded[key] for key in loaded.files} if hasattr(loaded, "files") else loaded


def _load_labels(path: Path) -> np.ndarray:
    labels = load_numpy(path)
    if isinstance(labels, dict):
        raise ArtifactError(f"Label file '{path}' must be a single .npy array, got an .npz with {sorted(labels)}.")
    return labels


def member(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    """Return one array of an .npz; raise ArtifactError if it is missing."""
    if key not in arrays:
        raise ArtifactError(
            f"'{path}' must hold an array named '{key}', it holds {', '.join(sorted(arrays)) or 'none'}.",
            hint="image_key and label_key, beside the path of the file, name the arrays to read.",
        )
    return arrays[key]


def _claimed_bytes(path: Path) -> int:
    """Return the unpacked size in bytes of the arrays in a .npy or .npz file, according to the file."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def require_room(path: Path, claimed: int) -> None:
    """Refuse a file whose content, once unpacked, does not fit into this machine's memory.

    Raises:
        ArtifactError: The content does not fit.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 2**40
    if claimed > memory:
        raise ArtifactError(
            f"'{path}' must fit into memory ({memory:,} bytes) when it is unpacked, it says that it has {claimed:,}."
        )


def _read_idx_array(path: Path) -> np.ndarray:
    _require_file(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            zero, code, ndim = struct.unpack(">HBB", stream.read(4))
            shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
            dtype = np.dtype(_IDX_DTYPES[code])
            claimed = math.prod(shape) * dtype.itemsize
            if claimed > path.stat().st_size * (_MOST_DEFLATED if path.suffix == ".gz" else 1):
                raise ValueError(f"header says {shape}, the file is too small for that")
            require_room(path, claimed)
            raw = stream.read(claimed + 1)  # never more than the header states
        if zero != 0 or len(raw) != claimed:
            raise ValueError(f"header says {shape}, the file holds {'more' if len(raw) > claimed else 'less'}")
        return np.frombuffer(raw, dtype).reshape(shape)
    except (KeyError, ValueError, OSError, EOFError, struct.error, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise ArtifactError(f"'{path}' must be an IDX file, plain or .gz: {error}") from error


def _checked(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: Path, fit_image: FitImage | None
) -> ArraySource:
    """Check shapes and types and bring them to (N, H, W, C) uint8 and (N,) int64."""
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"Images in '{path}' must be uint8 (N, H, W, C) with 1 or 3 channels, got {images.dtype} {images.shape}."
        )
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"Labels for '{path}' must be integers (N,), got {labels.dtype} {labels.shape}.")
    if len(labels) != len(images):
        raise DataError(f"'{path}' must have one label for each image, got {len(images)} images, {len(labels)} labels.")
    if len(labels) == 0:
        raise DataError(f"'{path}' must hold at least one image, it holds none.")
    return ArraySource(images, labels.astype(np.int64), tuple(classes), fit_image)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"Data file '{path}' does not exist.")
