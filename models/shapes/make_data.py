"""Make pictures of coloured shapes with known masks, to be segmented, and known boxes, to be detected.

    python models/shapes/make_data.py data/shapes

    data/shapes/train/images/0000.png   128 x 128, one to four shapes on a textured ground
    data/shapes/train/masks/0000.png    a class index for each pixel; 0 is the ground
    data/shapes/train/boxes.json        COCO's form; category ids are those class indices
    data/shapes/test/...                the same, other pictures

A shape's colour tells most of its class, its outline the rest: hues of classes overlap. All follows from a seed.
"""

import argparse
import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
CLASSES = ("disc", "square", "triangle", "ring")
HUES = (0.0, 0.25, 0.5, 0.75)
HUE_SPREAD = 0.06
SPLITS = {"train": (640, 1), "test": (200, 2)}  # pictures, seed


def ground(random: np.random.Generator) -> np.ndarray:
    """Return (SIDE, SIDE, 3) float values, 0 to 255: a dull colour, waves across it, blotches and noise."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    colour = random.uniform(70, 180) + random.uniform(-25, 25, 3)
    angle, waves = random.uniform(0, np.pi), random.uniform(2, 12)
    stripes = np.sin(2 * np.pi * waves * (rows * np.sin(angle) + columns * np.cos(angle)) + random.uniform(0, 6))
    coarse = Image.fromarray(random.normal(0, 1, (8, 8)).astype(np.float32))
    blotches = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    grey = random.uniform(5, 35) * stripes + random.uniform(5, 30) * blotches
    noise: np.ndarray = random.normal(0, 6, (SIDE, SIDE, 3))
    return colour + grey[..., None] + noise


def outline(label: int, random: np.random.Generator) -> np.ndarray:
    """Return a (SIDE, SIDE) mask of one shape, somewhere in the picture and whole."""
    radius = random.uniform(12, 26)
    x, y = random.uniform(radius, SIDE - 1 - radius, 2)
    mask = Image.new("1", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    kind = CLASSES[label - 1]
    if kind in ("disc", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
        inner = 0.5 * radius
        if kind == "ring":
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    else:
        draw.regular_polygon((x, y, radius), 4 if kind == "square" else 3, rotation=random.uniform(0, 360), fill=1)
    return np.asarray(mask)


def picture(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int]]]]:
    """Draw one picture.

    Returns:
        (SIDE, SIDE, 3) uint8 pixels, (SIDE, SIDE) uint8 class indices, and (class index, [x, y, width, height]) of each
        shape. No two shapes touch.
    """
    pixels, mask = ground(random), np.zeros((SIDE, SIDE), np.uint8)
    found: list[tuple[int, list[int]]] = []
    for _ in range(random.integers(1, 5)):
        label = int(random.integers(1, len(CLASSES) + 1))
        shape = outline(label, random)
        rows, columns = (np.flatnonzero(shape.any(axis)) for axis in (1, 0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        if mask[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1].any():
            continue  # would touch another one
        hue = (HUES[label - 1] + random.normal(0, HUE_SPREAD)) % 1
        colour = np.multiply(colorsys.hsv_to_rgb(hue, random.uniform(0.4, 0.9), random.uniform(0.5, 0.95)), 255)
        pixels[shape] = colour + random.normal(0, 10, (int(shape.sum()), 3))
        mask[shape] = label
        found.append((label, [int(left), int(top), int(right - left), int(bottom - top)]))
    return pixels.clip(0, 255).astype(np.uint8), mask, found


def write_split(folder: Path, count: int, seed: int) -> None:
    """Write pictures, masks and boxes into a folder."""
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = f"{number:04}.png"
        pixels, mask, found = picture(random)
        Image.fromarray(pixels).save(folder / "images" / name)
        Image.fromarray(mask).save(folder / "masks" / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for label, box in found:
            place = {"id": len(annotations), "image_id": number, "category_id": label, "bbox": box}
            annotations.append({**place, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": place, "name": name} for place, name in enumerate(CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Parse the command line and write both halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures; fewer to try something out")
    arguments = parser.parse_args()
    for name, (count, seed) in SPLITS.items():
        write_split(arguments.folder / name, max(1, round(count * arguments.share)), seed)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
