"""Images with targets other than class indices: masks, boxes, numbers, or none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import IMAGE_SUFFIXES, FitImage, load_numpy, member, readers
from compress.data.sources.image_files import open_picture, to_pixels
from compress.errors import ArtifactError, DataError

_SOME = 3


@dataclass(frozen=True)
class AnnotatedSource:
    """Source of images with a target for each, read one by one.

    Attributes:
        count: Number of images.
        read_image: Function from an index to the image for a batch: uint8 (H, W, C), or float32 if already prepared.
        read_target: Function from an index to an array or a mapping of arrays; None for images without targets.
        classes: Class names if the source has them, else ().
        is_threadsafe: Whether images may be read in parallel, on all cores.
        known_labels: (N,) class indices if they are known without reading the images, else None.
        size_hint: Hint in the error for images of different sizes.
        inputs: Input name -> its shape in a sample, for samples that are mappings; {} for images.
        shape: Shape of a sample that is one array but no image; None for images and mappings.
    """

    count: int
    read_image: Callable[[int], np.ndarray]
    read_target: Callable[[int], Any] | None = None
    classes: tuple[str, ...] = ()
    is_threadsafe: bool = False
    known_labels: np.ndarray | None = None
    size_hint: str = "Set preprocessing.resize to [height, width] or with a crop, or letterbox where there are boxes."
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def has_targets(self) -> bool:
        """Return whether images have targets."""
        return self.read_target is not None

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices.

        Raises:
            DataError: The targets are no class indices.
        """
        values = self.known_labels
        if values is None:
            values = self.read_targets(np.arange(self.count))
        labels = np.asarray(values)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"Labels must be one whole number for each image, got {labels.dtype} {labels.shape}.",
                hint="`task:` says what else targets can be",
            )
        return labels.astype(np.int64)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices`: (n, H, W, C) uint8, or float32 if already prepared, or (n, K) rows.

        Raises:
            DataError: The images do not all have one shape.
        """
        several = readers().map if self.is_threadsafe else map
        images = list(several(self.read_image, indices.tolist()))
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"Images must have one shape after preprocessing, got {sorted(shapes)[:_SOME]}.",
                hint=self.size_hint,
            )
        return np.stack(images)

    def read_targets(self, indices: np.ndarray) -> Any:
        """Return the targets at `indices`: one array if all have one shape, else a list."""
        if self.read_target is None:
            raise DataError("These images have no targets.")
        several = readers().map if self.is_threadsafe else map
        return stacked(list(several(self.read_target, indices.tolist())))


def stacked(targets: Sequence[Any]) -> Any:
    """Return arrays or numbers of one shape as one int64 or float32 array; other targets as a list.

    >>> stacked([1, 2]), stacked([{"boxes": 1}])
    (array([1, 2]), [{'boxes': 1}])
    """
    if not all(isinstance(one, np.ndarray | np.generic | int | float) for one in targets):
        return list(targets)
    arrays = [np.asarray(one) for one in targets]
    if len({one.shape for one in arrays}) > 1:
        return arrays
    values = np.stack(arrays)
    return values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64)


def read_target_arrays(
    images_path: Path,
    targets_path: Path | None,
    image_key: str,
    target_key: str,
    preprocessing: Preprocessing,
    mask_fill: int | None = None,
) -> AnnotatedSource:
    """Read uint8 (N, H, W, C) or (N, H, W) images and targets of any shape.

    Args:
        images_path: `.npz` with both arrays, or `.npy` with the images.
        targets_path: `.npy` with the targets; None when they are in the `.npz`.
        image_key: Name of the image array in an `.npz`.
        target_key: Name of the target array in an `.npz`.
        preprocessing: Preprocessing, whose geometric half is applied to images and masks.
        mask_fill: Value of masks where images are padded; None for targets other than masks.

    Raises:
        ArtifactError: A file is missing, unreadable or lacks a key.
        DataError: The arrays are not images and targets.
    """
    loaded = load_numpy(images_path)
    if isinstance(loaded, dict):
        images = member(loaded, image_key, images_path)
        targets = member(loaded, target_key, images_path) if targets_path is None else load_numpy(targets_path)
    elif targets_path is None:
        raise ArtifactError(f"'{images_path}' holds images only; labels must be given in a file of their own.")
    else:
        images, targets = loaded, load_numpy(targets_path)
    if isinstance(targets, dict):
        raise ArtifactError(f"Target file '{targets_path}' must be a single .npy array, got an .npz.")
    images = as_images(images, images_path)
    if len(images) != len(targets):
        raise DataError(
            f"'{images_path}' must have one target for each image, got {len(images)} images, {len(targets)} targets."
        )
    read_image = _image_reader(images, preprocessing)
    if mask_fill is None:
        return AnnotatedSource(len(images), read_image, lambda place: targets[place])
    if targets.ndim != 3 or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(f"Masks for '{images_path}' must be integers (N, H, W), got {targets.dtype} {targets.shape}.")
    fill = mask_fill
    return AnnotatedSource(len(images), read_image, lambda place: preprocessing.fit_mask(targets[place], fill))


def read_masks(images: Path, masks: Path, preprocessing: Preprocessing, grey: bool, fill: int) -> AnnotatedSource:
    """Read a folder of pictures and a folder of masks, which are pictures of class indices with the same names.

    Args:
        images: Folder of the pictures.
        masks: Folder of the masks; PNG with one channel or a palette.
        preprocessing: Preprocessing, whose geometric half is applied to pictures and masks.
        grey: Whether pictures are read with one channel.
        fill: Value of masks where pictures are padded.

    Raises:
        ArtifactError: A folder is missing.
        DataError: There are no pictures, or a picture has no mask or a mask of another size.
    """
    pictures = list_pictures(images)
    by_name = {path.stem: path for path in list_pictures(masks)}
    missing = [path.name for path in pictures if path.stem not in by_name]
    if missing:
        raise DataError(
            f"Each picture in '{images}' must have a mask of its name in '{masks}', {len(missing)} have none: "
            f"{', '.join(missing[:_SOME])}."
        )

    def read_mask(place: int) -> np.ndarray:
        path = by_name[pictures[place].stem]
        mask = np.asarray(open_picture(path))
        size = open_picture(pictures[place]).size
        if mask.dtype.kind not in "biu" or mask.shape != (size[1], size[0]):
            raise DataError(
                f"Mask '{path}' must have one channel and the size of its picture ({size[1]} x {size[0]}), got "
                f"{mask.shape} {mask.dtype}."
            )
        return preprocessing.fit_mask(mask.astype(np.int64), fill)

    return AnnotatedSource(
        len(pictures), picture_reader(pictures, preprocessing.fit_image, grey), read_mask, is_threadsafe=True
    )


def read_unlabelled(path: Path, image_key: str, preprocessing: Preprocessing, grey: bool) -> AnnotatedSource:
    """Read images without targets: a folder of pictures with its sub-folders, a .npy, or an .npz.

    Raises:
        ArtifactError: The file or folder is missing or unreadable.
        DataError: The file or folder holds no images.
    """
    if path.is_dir():
        pictures = list_pictures(path, deep=True)
        return AnnotatedSource(
            len(pictures), picture_reader(pictures, preprocessing.fit_image, grey), is_threadsafe=True
        )
    loaded = load_numpy(path)
    images = as_images(member(loaded, image_key, path) if isinstance(loaded, dict) else loaded, path)
    return AnnotatedSource(len(images), _image_reader(images, preprocessing))


def list_pictures(folder: Path, deep: bool = False) -> list[Path]:
    """Return the pictures in a folder, and below it if `deep`, sorted by name.

    Raises:
        ArtifactError: The folder is missing.
        DataError: The folder has no pictures.
    """
    if not folder.is_dir():
        raise ArtifactError(f"Data folder '{folder}' does not exist.")
    found = sorted(path for path in folder.glob("**/*" if deep else "*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"'{folder}' must hold pictures ({', '.join(IMAGE_SUFFIXES)}), it holds none.")
    return found


def picture_reader(pictures: Sequence[Path], fit_image: FitImage, grey: bool) -> Callable[[int], np.ndarray]:
    """Return a function that reads a picture by its index."""

    def read(place: int) -> np.ndarray:
        return fit_image(to_pixels(open_picture(pictures[place]), grey))

    return read


def as_images(images: np.ndarray, path: Path) -> np.ndarray:
    """Return uint8 (N, H, W, C) images.

    Raises:
        DataError: The array holds no images.
    """
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) == 0:
        raise DataError(
            f"Images in '{path}' must be uint8 (N, H, W, C) with 1 or 3 channels, got {images.dtype} {images.shape}."
        )
    return images


def _image_reader(images: np.ndarray, preprocessing: Preprocessing) -> Callable[[int], np.ndarray]:
    return lambda place: preprocessing.fit_image(images[place])
