"""Schema of `data`: sources of images, splits, preprocessing."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from compress.catalog import (
    SOURCES,
)
from compress.config.schema.base import (
    MAX_SIDE,
    Count,
    FilePath,
    Floats,
    OptionalPath,
    Reference,
    Section,
    Size,
    to_names,
    to_tuple,
)


def _check_resize(value: object) -> object:
    sides = value if isinstance(value, list | tuple) else (value, value)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    if whole and max(sides, default=0) > MAX_SIDE:
        raise ValueError(f"must be at most {MAX_SIDE}")
    if value is None or (whole and len(sides) == 2):
        return to_tuple(value)
    raise ValueError("must be a whole number of at least 1, or [height, width]")


class ArraysSource(Section):
    """Image arrays: uint8 (N, H, W, C), and integer labels, masks (N, H, W) or numbers (N, ...), as the task needs."""

    arrays: FilePath = Field(description="path of the .npz, or of the .npy with the images")
    labels: OptionalPath = Field(None, description="path of the .npy with the labels; not needed for .npz")
    image_key: str = Field("x", description="name of the image array in an .npz")
    label_key: str = Field("y", description="name of the label array in an .npz")


class IdxSource(Section):
    """A pair of IDX files."""

    idx: FilePath = Field(description="path of the image file, plain or .gz")
    labels: FilePath = Field(description="path of the label file, plain or .gz")


class FolderSource(Section):
    """One sub-folder of image files for each class."""

    folder: FilePath = Field(description="path of the folder")
    classes: Annotated[tuple[str, ...], BeforeValidator(to_names)] | None = Field(
        None, description="folder names in the order of class indices; by default sorted as text"
    )


class TorchvisionSource(Section):
    """Any torchvision classification data set."""

    torchvision: str = Field(description="class name in torchvision.datasets, such as CIFAR10")
    root: FilePath = Field("data", description="folder that torchvision reads from and downloads to")
    download: bool = Field(False, description="whether torchvision may fetch missing files")
    train: bool | None = Field(None, description="which half; by default data.train reads the training half")


class MasksSource(Section):
    """Pictures, and a picture of class indices for each: PNG with the same name."""

    masks: FilePath = Field(description="path of the folder with the masks")
    images: FilePath = Field(description="path of the folder with the pictures")


class CocoSource(Section):
    """Boxes in a JSON file of the COCO form."""

    coco: FilePath = Field(description="path of the JSON file")
    images: FilePath = Field(description="path of the folder with the pictures")
    letterbox: Size | None = Field(None, description="[height, width] that pictures are fitted into, grey at the rims")


class YoloSource(Section):
    """Boxes in one .txt file for each picture: class, centre and size as shares, one box a line."""

    yolo: FilePath = Field(description="path of the folder with the .txt files; a picture without one has no box")
    images: FilePath = Field(description="path of the folder with the pictures")
    letterbox: Size | None = Field(None, description="[height, width] that pictures are fitted into, grey at the rims")


class UnlabelledSource(Section):
    """Images without labels: what is learned and measured is the distance to the baseline."""

    unlabelled: FilePath = Field(description="path of a folder of pictures, or of a .npy or .npz with images")
    image_key: str = Field("x", description="name of the image array in an .npz")


class OwnSource(Section):
    """A data set class of your own: `__len__`, and `__getitem__` -> (image, target)."""

    own: Reference = Field(description='"pkg.module:Class" or "path/to/file.py:Class"')
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")


def _source_kind(value: object) -> str | None:
    if isinstance(value, dict):
        kinds = [kind for kind in SOURCES if kind in value]
    else:
        kinds = [kind for kind in SOURCES if hasattr(value, kind)]
    return kinds[0] if len(kinds) == 1 else None


Source = Annotated[
    Annotated[ArraysSource, Tag("arrays")]
    | Annotated[IdxSource, Tag("idx")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[TorchvisionSource, Tag("torchvision")]
    | Annotated[MasksSource, Tag("masks")]
    | Annotated[CocoSource, Tag("coco")]
    | Annotated[YoloSource, Tag("yolo")]
    | Annotated[UnlabelledSource, Tag("unlabelled")]
    | Annotated[OwnSource, Tag("own")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message=f"must hold exactly one of the keys {', '.join(sorted(SOURCES))}",
    ),
]


def _validation_kind(value: object) -> str | None:
    return _source_kind(value) if isinstance(value, dict | Section) else "count"


Validation = Annotated[
    Annotated[Count, Tag("count")]
    | Annotated[ArraysSource, Tag("arrays")]
    | Annotated[IdxSource, Tag("idx")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[TorchvisionSource, Tag("torchvision")]
    | Annotated[MasksSource, Tag("masks")]
    | Annotated[CocoSource, Tag("coco")]
    | Annotated[YoloSource, Tag("yolo")]
    | Annotated[UnlabelledSource, Tag("unlabelled")]
    | Annotated[OwnSource, Tag("own")],
    Discriminator(
        _validation_kind,
        custom_error_type="source_kind",
        custom_error_message="must be a number of images, or hold exactly one of the keys "
        + ", ".join(sorted(SOURCES)),
    ),
]


class PreprocessingConfig(Section):
    """What happens to an image before the network sees it: resize, crop, scale, mean, std, layout."""

    mean: Floats = Field((0.0,), description="per channel, subtracted after scaling")
    std: Floats = Field((1.0,), description="per channel, divided by after subtracting")
    scale: float = Field(1 / 255, gt=0, description="multiplies the uint8 value first")
    resize: Annotated[int | tuple[int, int] | None, BeforeValidator(_check_resize)] = Field(
        None, description="shorter side in pixels before the crop; or [height, width], which keeps no proportions"
    )
    crop: Size | None = Field(None, description="[height, width] of the centre crop")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "L"] = "RGB"

    def _check_rules(self) -> None:
        wanted = 1 if self.channels == "L" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, wanted):
                raise ValueError(f"{name} must have 1 or {wanted} values for channels {self.channels}")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be above 0")


class DataConfig(Section):
    """Where the images are and how they are split. Calibration, and validation as a number, come out of `train`."""

    train: Source
    evaluation: Source
    calibration: Count = Field(1000, description="images for scores and batch-norm statistics")
    validation: Validation = Field(
        2000,
        description="images that choose the best epoch, repairs and numbers of blocks: how many to take out of train; "
        "or a source of their own, which the network was not trained on",
    )
    split_seed: int = Field(0, ge=0, description="decides which training images go where")
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    array_folder: OptionalPath = Field(
        None, description="folder with train.npz and test.npz (x, y) to read instead of train and evaluation"
    )
    array_folder_env: str | None = Field(
        None, description="environment variable that may name such a folder; array_folder goes before it"
    )
