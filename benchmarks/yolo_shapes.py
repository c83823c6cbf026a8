"""Generated pictures with polygons and key points in YOLO's text files, to train segment, pose and classify variants.

    python benchmarks/yolo_shapes.py data/yolo_shapes

    data/yolo_shapes/segment/train/images/0000.png   one to three polygons on a textured ground
    data/yolo_shapes/segment/train/labels/0000.txt   class and the relative corners of a polygon in each line
    data/yolo_shapes/segment/data.yaml               settings of ultralytics
    data/yolo_shapes/pose/...                        arrows with four key points: tip, left, right, tail
    data/yolo_shapes/classify/train/triangle/...     one polygon in each picture

Everything follows from a seed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("triangle", "square", "star")
SPLITS = {"train": (600, 1), "val": (150, 2)}  # pictures, seed
_ARROW = np.asarray([[0, -1], [0.8, 0.5], [0, 0.15], [-0.8, 0.5]])  # tip, right wing, notch, left wing
_POINTS = np.asarray([[0, -1], [-0.8, 0.5], [0.8, 0.5], [0, 0.15]])  # tip, left, right, tail
_WIDEST = 0.6  # turn of an arrow in radians
_FINER = 4  # pictures are drawn larger, then reduced


def corners(kind: str) -> np.ndarray:
    """Return the (P, 2) corners x, y of a shape inside of the unit circle."""
    if kind == "arrow":
        return _ARROW
    count = {"triangle": 3, "square": 4, "star": 10}[kind]
    angles = 2 * np.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2, 0.45, 1.0) if kind == "star" else np.ones(count)
    return radii[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)


def ground(random: np.random.Generator, side: int) -> np.ndarray:
    """Return a (side, side, 3) textured ground as float values from 0 to 255."""
    coarse = random.uniform(60, 200, (5, 5, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float64)
    return smooth + random.normal(0, 8, (side, side, 3))


def picture(
    random: np.random.Generator, side: int, kinds: tuple[str, ...], most: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Draw one picture whose shapes do not overlap.

    Returns:
        (side, side, 3) uint8 pixels, and for each shape its class, its (P, 2) corners and four (4, 2) key points of an
        arrow, in pixels.
    """
    pixels, taken = ground(random, side), np.zeros((0, 3))
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    for _ in range(random.integers(1, most + 1)):
        radius = random.uniform(0.12, 0.25) * side
        x, y = random.uniform(radius, side - radius, 2)
        if (np.hypot(taken[:, 0] - x, taken[:, 1] - y) < taken[:, 2] + radius).any():
            continue
        taken = np.concatenate([taken, [[x, y, radius]]])
        label, widest = int(random.integers(len(kinds))), _WIDEST if kinds == ("arrow",) else np.pi
        angle = random.uniform(-widest, widest)
        turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        outline, points = (radius * (one @ turn) + [x, y] for one in (corners(kinds[label]), _POINTS))
        cover = Image.new("L", (side * _FINER, side * _FINER))
        ImageDraw.Draw(cover).polygon([tuple(corner) for corner in (outline * _FINER).tolist()], fill=255)
        share = np.asarray(cover.resize((side, side), Image.Resampling.BOX), np.float64)[..., None] / 255
        colour = random.uniform(0, 255, 3)
        pixels = share * colour + (1 - share) * pixels
        found.append((label, outline, points))
    return pixels.clip(0, 255).astype(np.uint8), found


def polygon_line(label: int, outline: np.ndarray, side: int) -> str:
    """Return the line of a polygon: class, then relative x and y of every corner."""
    return " ".join([str(label), *(f"{value:.6f}" for value in (outline / side).reshape(-1))])


def pose_line(label: int, outline: np.ndarray, points: np.ndarray, side: int) -> str:
    """Return the line of an object with key points: class, box, then x, y and visibility 2 of every point."""
    low, high = outline.min(0) / side, outline.max(0) / side
    values = [*((low + high) / 2), *(high - low)]
    values += [value for point in points / side for value in (*point, 2.0)]
    return " ".join([str(label), *(f"{value:.6f}" for value in values)])


def write_labelled(folder: Path, kind: str, side: int, share: float = 1.0) -> Path:
    """Write pictures and labels of the variant `segment` or `pose`; return the path of its data.yaml."""
    kinds = SHAPES if kind == "segment" else ("arrow",)
    for name, (count, seed) in SPLITS.items():
        random = np.random.default_rng(seed)
        for part in ("images", "labels"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        for number in range(max(2, round(share * count))):
            pixels, found = picture(random, side, kinds, 3)
            Image.fromarray(pixels).save(folder / name / "images" / f"{number:04}.png")
            lines = [
                polygon_line(label, outline, side) if kind == "segment" else pose_line(label, outline, points, side)
                for label, outline, points in found
            ]
            (folder / name / "labels" / f"{number:04}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = f"path: {folder.absolute()}\ntrain: train/images\nval: val/images\nnames: [{', '.join(kinds)}]\n"
    if kind == "pose":
        text += "kpt_shape: [4, 3]\nflip_idx: [0, 2, 1, 3]\n"
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return folder / "data.yaml"


def write_classes(folder: Path, side: int, share: float = 1.0) -> Path:
    """Write a folder of pictures for each class; return the folder."""
    for name, (count, seed) in SPLITS.items():
        random = np.random.default_rng(seed)
        for kind in SHAPES:
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
            for number in range(max(2, round(share * count / len(SHAPES)))):
                Image.fromarray(picture(random, side, (kind,), 1)[0]).save(folder / name / kind / f"{number:04}.png")
    return folder


def main() -> None:
    """Parse the command line and write all three data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=128, help="height and width of the pictures")
    parser.add_argument("--share", type=float, default=1.0, help="share of the pictures; fewer to try something out")
    arguments = parser.parse_args()
    for kind in ("segment", "pose"):
        write_labelled(arguments.folder / kind, kind, arguments.side, arguments.share)
    write_classes(arguments.folder / "classify", arguments.side, arguments.share)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
