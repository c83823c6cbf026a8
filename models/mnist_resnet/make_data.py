"""Make the embedded MNIST subset: 20,000 class-balanced training images and the whole test set, as gzip IDX files.

    python models/mnist_resnet/make_data.py TRAIN.npz T10K_IMAGES.gz T10K_LABELS.gz

TRAIN.npz holds all 60,000 training images as `x` and their labels as `y`. The subset is drawn by a fixed seed.
"""

import gzip
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

from compress.data.sources.classification import read_arrays
from compress.data.splits import carve

HERE = Path(__file__).resolve().parent
IMAGES = 20_000
SEED = 0


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as gzip IDX, with no time stamp so that the bytes are repeatable."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def main(train: Path, test_images: Path, test_labels: Path) -> None:
    """Write the four files into `data/` beside this script."""
    source = read_arrays(train, None)
    chosen = carve(source.labels, {"subset": IMAGES}, SEED)["subset"]
    folder = HERE / "data"
    folder.mkdir(exist_ok=True)
    write_idx(folder / "train-20k-images-idx3-ubyte.gz", source.images[chosen, :, :, 0])
    write_idx(folder / "train-20k-labels-idx1-ubyte.gz", source.labels[chosen].astype(np.uint8))
    shutil.copyfile(test_images, folder / "t10k-images-idx3-ubyte.gz")
    shutil.copyfile(test_labels, folder / "t10k-labels-idx1-ubyte.gz")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
