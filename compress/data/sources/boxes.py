"""Images with boxes: COCO's JSON, or one .txt file for each image as in YOLO.

A target is {"boxes": (M, 4) float32 [x0, y0, x1, y1] in pixels of the prepared image, "labels": (M,) int64}.
If asked for, it also has "polygons", for each object a list of (P, 2) float32 corners x, y, or "keypoints" (M, K, 3)
float32 x, y and visibility.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.preprocessing import Preprocessing, fit_letterbox, place_letterbox
from compress.data.sources.annotated import AnnotatedSource, list_pictures
from compress.data.sources.image_files import open_picture, to_pixels
from compress.errors import ArtifactError, DataError

MOST_CATEGORY = 65_535
_BOX_VALUES, _LEAST_CORNERS = 5, 3
Boxes = dict[str, Any]


def read_coco(
    annotations: Path,
    images: Path,
    preprocessing: Preprocessing,
    grey: bool,
    letterbox: tuple[int, int] | None,
    polygons: bool = False,
    keypoints: int = 0,
) -> AnnotatedSource:
    """Read pictures and their boxes from a JSON file in COCO format; labels are its category ids.

    Args:
        annotations: The JSON file, with `images`, `annotations` and `categories`.
        images: Folder of the pictures.
        preprocessing: Preprocessing, whose geometric half is applied to pictures and boxes; not with a letterbox.
        grey: Whether pictures are read with one channel.
        letterbox: (height, width) that pictures are scaled and padded to; None to use `preprocessing` instead.
        polygons: Whether the polygons of `segmentation` are read.
        keypoints: Number of `keypoints` of each object, x, y, visibility; 0 for none.

    Raises:
        ArtifactError: A file is missing, or the JSON is not in COCO format.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {_category(one["id"]): str(one["name"]) for one in content.get("categories", [])}
        files = [(int(one["id"]), images / one["file_name"]) for one in content["images"]]
        of_image: dict[int, list[tuple[list[float], int, Any]]] = defaultdict(list)
        for one in content["annotations"]:
            if not one.get("iscrowd"):
                x, y, width, height = (float(value) for value in one["bbox"])
                if not all(map(math.isfinite, (x, y, width, height))):
                    raise ValueError(f"a box must be finite numbers, got {one['bbox']}")
                label = _category(one["category_id"])
                further = _coco_polygons(one) if polygons else _coco_points(one, keypoints) if keypoints else None
                of_image[int(one["image_id"])].append(([x, y, x + width, y + height], label, further))
    except OSError as error:
        raise ArtifactError(f"'{annotations}' must be a readable file: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"'{annotations}' must be JSON of the COCO form, got {said}") from error
    if not files:
        raise DataError(f"'{annotations}' must name at least one picture, it names none.")
    missing = [path.name for _, path in files if not path.is_file()]
    if missing:
        raise ArtifactError(f"'{images}' must hold the pictures of '{annotations}', it lacks {', '.join(missing[:3])}.")

    def target(place: int, size: tuple[int, int]) -> Boxes:
        found = of_image[files[place][0]]
        boxes = as_boxes([box for box, _, _ in found], [label for _, label, _ in found])
        if polygons:
            return boxes | {"polygons": [further for *_, further in found]}
        points = (
            np.asarray([further for *_, further in found], np.float32).reshape(-1, keypoints, 3) if keypoints else None
        )
        return boxes if points is None else boxes | {"keypoints": points}

    # a name for each id up to the largest, so that a label is an index
    classes = tuple(names.get(index, str(index)) for index in range(max(names, default=-1) + 1))
    return _source([path for _, path in files], target, classes, preprocessing, grey, letterbox)


def _coco_polygons(annotation: dict[str, Any]) -> list[np.ndarray]:
    """Return the (P, 2) polygons of an object."""
    parts = annotation["segmentation"]
    if not isinstance(parts, list):
        raise ValueError("the segmentation of an object that is no crowd must be polygons, got run lengths")
    corners = [np.asarray(part, np.float32).reshape(-1, 2) for part in parts]
    if not all(np.isfinite(one).all() for one in corners):
        raise ValueError("corners of polygons must be finite numbers")
    return corners


def _coco_points(annotation: dict[str, Any], count: int) -> np.ndarray:
    """Return the (K, 3) key points of an object; an object without them has none that is visible."""
    points = np.asarray(annotation.get("keypoints") or np.zeros(3 * count), np.float32)
    if points.size != 3 * count or not np.isfinite(points).all():
        raise ValueError(f"keypoints must be {3 * count} finite numbers, got {points.size}")
    return points.reshape(count, 3)


def read_yolo(
    labels: Path,
    images: Path,
    preprocessing: Preprocessing,
    grey: bool,
    letterbox: tuple[int, int] | None,
    polygons: bool = False,
    keypoints: int = 0,
) -> AnnotatedSource:
    """Read pictures and .txt files of the same names, one relative "class x y width height" per line.

    Args:
        labels: Folder of the .txt files; a picture without one has no box.
        images: Folder of the pictures.
        preprocessing: As in `read_coco`.
        grey: Whether pictures are read with one channel.
        letterbox: As in `read_coco`.
        polygons: Whether a line is a class and the corners of a polygon, whose bounding box is the box.
        keypoints: Number of key points behind the box in each line, x, y or x, y, visibility; 0 for none.

    Raises:
        ArtifactError: A folder is missing, or no picture has a .txt file.
    """
    pictures = list_pictures(images)
    files = [labels / f"{path.stem}.txt" for path in pictures]
    if not any(path.is_file() for path in files):
        raise ArtifactError(f"'{labels}' must hold a .txt file for pictures in '{images}', it holds none.")

    def target(place: int, size: tuple[int, int]) -> Boxes:
        path, (height, width) = files[place], size
        lines = list(_yolo_lines(path, polygons, keypoints)) if path.is_file() else []
        found = [label for label, _ in lines]
        scale = np.asarray([width, height])
        if polygons:
            corners = [np.reshape(values, (-1, 2)) * scale for _, values in lines]
            boxes = [[*one.min(0).tolist(), *one.max(0).tolist()] for one in corners]
            return as_boxes(boxes, found) | {"polygons": [[one.astype(np.float32)] for one in corners]}
        boxes = [
            [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            for _, (x, y, w, h, *_) in lines
        ]
        if not keypoints:
            return as_boxes(boxes, found)
        points = np.zeros((len(lines), keypoints, 3), np.float32)
        for row, (_, values) in zip(points, lines, strict=True):
            given = np.reshape(values[4:], (keypoints, -1))
            row[:, :2] = given[:, :2] * scale
            row[:, 2] = given[:, 2] if given.shape[1] > 2 else (given > 0).any(1)
        return as_boxes(boxes, found) | {"keypoints": points}

    return _source(pictures, target, (), preprocessing, grey, letterbox)


def _yolo_lines(path: Path, polygons: bool, keypoints: int) -> Iterator[tuple[int, list[float]]]:
    """Yield the class and the relative values of each line.

    Raises:
        DataError: A line has other content, or the file is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' must be a readable text of boxes, got {type(error).__name__}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *values = (float(value) for value in line.split()[: None if polygons or keypoints else _BOX_VALUES])
            if not label.is_integer() or not 0 <= label <= MOST_CATEGORY or not all(map(math.isfinite, values)):
                raise ValueError(line)
            if not _is_complete(len(values), polygons, keypoints):
                raise ValueError(line)
        except ValueError as error:
            wanted = _describe_line(polygons, keypoints)
            raise DataError(
                f"'{path}' line {number} must be a class (0 to {MOST_CATEGORY}) and {wanted}, got '{line[:80]}'."
            ) from error
        yield int(label), values


def _is_complete(count: int, polygons: bool, keypoints: int) -> bool:
    """Return whether a line has the right number of values behind its class."""
    if polygons:
        return count % 2 == 0 and count >= _LEAST_CORNERS * 2
    return count in ({4 + 2 * keypoints, 4 + 3 * keypoints} if keypoints else {4})


def _describe_line(polygons: bool, keypoints: int) -> str:
    if polygons:
        return "x and y shares of at least three corners"
    return f"four shares, then {keypoints} key points of 2 or 3 values" if keypoints else "four shares"


def _category(value: Any) -> int:
    """Return a checked category id: an index into a list of names whose length follows from the largest id."""
    number = int(value)
    if not 0 <= number <= MOST_CATEGORY:
        raise ValueError(f"category ids must be from 0 to {MOST_CATEGORY}, got {str(value)[:40]}")
    return number


def as_boxes(boxes: list[list[float]], labels: list[int]) -> Boxes:
    """Return boxes and their labels as arrays, which are empty without boxes."""
    return {"boxes": np.asarray(boxes, np.float32).reshape(-1, 4), "labels": np.asarray(labels, np.int64)}


def moved(target: Boxes, scale: tuple[float, float], shift: tuple[float, float], size: tuple[int, int]) -> Boxes:
    """Return boxes scaled, shifted and clipped to the borders of an image; boxes outside are dropped.

    Args:
        target: Boxes and labels, and any polygons or key points.
        scale: Scale factors of rows and columns.
        shift: Shift of rows and columns in pixels, after scaling.
        size: (height, width) of the result.
    """
    factors, shifts, ends = (np.asarray([x, y, x, y], np.float32) for y, x in (scale, shift, size))
    boxes = (target["boxes"] * factors + shifts).clip(0, ends)
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    result = {**target, "boxes": boxes[seen], "labels": target["labels"][seen]}
    if "polygons" in target:
        kept = (parts for parts, is_seen in zip(target["polygons"], seen, strict=True) if is_seen)
        result["polygons"] = [[corners * factors[:2] + shifts[:2] for corners in parts] for parts in kept]
    if "keypoints" in target:
        result["keypoints"] = _moved_points(target["keypoints"][seen], factors[:2], shifts[:2], ends[:2])
    return result


def _moved_points(points: np.ndarray, factors: np.ndarray, shifts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return (M, K, 3) key points scaled and shifted; those outside of the image become invisible."""
    places = points[..., :2] * factors + shifts
    is_inside = ((places >= 0) & (places <= ends)).all(-1, keepdims=True)
    moved: np.ndarray = np.concatenate([places, points[..., 2:] * is_inside], -1)
    return moved


def _source(
    pictures: list[Path],
    target: Callable[[int, tuple[int, int]], Boxes],
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    grey: bool,
    letterbox: tuple[int, int] | None,
) -> AnnotatedSource:
    if letterbox is not None and (preprocessing.resize is not None or preprocessing.crop is not None):
        raise DataError("letterbox must be given without preprocessing.resize and preprocessing.crop.")

    def read_image(place: int) -> np.ndarray:
        picture = to_pixels(open_picture(pictures[place]), grey)
        return preprocessing.fit_image(picture) if letterbox is None else fit_letterbox(picture, letterbox)

    def read_target(place: int) -> Any:
        width, height = open_picture(pictures[place]).size
        boxes = target(place, (height, width))
        if letterbox is not None:
            scale, top, left = place_letterbox((height, width), letterbox)
            return moved(boxes, (scale, scale), (top, left), letterbox)
        scales, shift, size = preprocessing.geometry(height, width)
        return moved(boxes, scales, shift, size)

    return AnnotatedSource(len(pictures), read_image, read_target, classes, is_threadsafe=True)
