"""Schema of `data`: image sources, splits and preprocessing."""

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
    """Image arrays, uint8 (N, H, W, C), with integer labels (N,), masks (N, H, W) or numbers (N, ...) by task."""

    arrays: FilePath = Field(description="path of the .npz, or of the .npy with the images")
    labels: OptionalPath = Field(None, description="path of the .npy with the labels; not needed for .npz")
    image_key: str = Field("x", description="name of the image array in an .npz")
    label_key: str = Field("y", description="name of the label array in an .npz")


class IdxSource(Section):
    """Pair of IDX files."""

    idx: FilePath = Field(description="path of the image file, plain or .gz")
    labels: FilePath = Field(description="path of the label file, plain or .gz")


class FolderSource(Section):
    """Folder with one sub-folder of image files for each class."""

    folder: FilePath = Field(description="path of the folder")
    classes: Annotated[tuple[str, ...], BeforeValidator(to_names)] | None = Field(
        None, description="folder names in the order of class indices; by default sorted as text"
    )


class TorchvisionSource(Section):
    """Classification data set of torchvision."""

    torchvision: str = Field(description="class name in torchvision.datasets, such as CIFAR10")
    root: FilePath = Field("data", description="folder that torchvision reads from and downloads to")
    download: bool = Field(False, description="true: torchvision may download missing files")
    train: bool | None = Field(None, description="true: the training half; by default only for data.train")


class MasksSource(Section):
    """Images, and for each a PNG of class indices with the same name."""

    masks: FilePath = Field(description="path of the folder with the masks")
    images: FilePath = Field(description="path of the folder with the images")


KeyPoints = Annotated[int, Field(ge=1, le=1000)] | None


def _check_one_kind(source: Any) -> None:
    if source.polygons and source.keypoints is not None:
        raise ValueError("polygons must be left out beside keypoints")


class CocoSource(Section):
    """Images, and boxes in a JSON file of the COCO format."""

    coco: FilePath = Field(description="path of the JSON file")
    images: FilePath = Field(description="path of the folder with the images")
    letterbox: Size | None = Field(None, description="[height, width] that images are fitted into, with grey borders")
    polygons: bool = Field(False, description="true: polygons of objects are read, for masks")
    keypoints: KeyPoints = Field(None, description="number of key points of each object")

    def _check_rules(self) -> None:
        _check_one_kind(self)


class YoloSource(Section):
    """Images, and boxes in one .txt file for each: class, relative centre and relative size, one box a line."""

    yolo: FilePath = Field(description="path of the folder with the .txt files; an image without one has no box")
    images: FilePath = Field(description="path of the folder with the images")
    letterbox: Size | None = Field(None, description="[height, width] that images are fitted into, with grey borders")
    polygons: bool = Field(False, description="true: a line is a class and the corners of a polygon: masks")
    keypoints: KeyPoints = Field(None, description="number of key points behind each box, x, y or x, y, visibility")

    def _check_rules(self) -> None:
        _check_one_kind(self)


class UnlabelledSource(Section):
    """Images without labels; the distance to the outputs of the baseline is trained on and measured."""

    unlabelled: FilePath = Field(description="path of a folder of images, or of a .npy or .npz file")
    image_key: str = Field("x", description="name of the image array in an .npz")


class OwnSource(Section):
    """Data set class of your own: `__len__`, and `__getitem__` -> (image, target)."""

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


def _split_kind(value: object) -> str | None:
    return _source_kind(value) if isinstance(value, dict | Section) else "count"


CountOrSource = Annotated[
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
        _split_kind,
        custom_error_type="source_kind",
        custom_error_message="must be a number of images, or hold exactly one of the keys "
        + ", ".join(sorted(SOURCES)),
    ),
]


class PreprocessingConfig(Section):
    """Preprocessing of an image: resize, crop, scale, mean, std, layout."""

    mean: Floats = Field((0.0,), description="per channel, subtracted after the scale")
    std: Floats = Field((1.0,), description="per channel, divisor after the mean")
    scale: float = Field(1 / 255, gt=0, description="factor of uint8 values, applied first")
    resize: Annotated[int | tuple[int, int] | None, BeforeValidator(_check_resize)] = Field(
        None, description="shorter side in pixels before the crop, or [height, width] without regard to proportions"
    )
    crop: Size | None = Field(None, description="[height, width] of the centre crop")
    layout: Literal["NCHW", "NHWC"] = Field("NCHW", description="order of the axes of the input")
    channels: Literal["RGB", "BGR", "L"] = Field("RGB", description="order of the channels; L for one grey channel")

    def _check_rules(self) -> None:
        wanted = 1 if self.channels == "L" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, wanted):
                raise ValueError(f"{name} must have 1 or {wanted} values for channels {self.channels}")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be above 0")


class DataConfig(Section):
    """Image sources and splits. Calibration images, and those given by number, are taken from `train`."""

    train: Source = Field(description="images that are trained on, and that splits are taken from")
    evaluation: CountOrSource = Field(
        description="images that the verdict is measured on: a source of their own, or a number to take from train, "
        "if the network was trained without them"
    )
    calibration: Count = Field(1000, description="number of images for scores and batch-norm statistics")
    validation: CountOrSource = Field(
        2000,
        description="images that decide about epochs, repairs and numbers of blocks: number to take from train, or a "
        "source of their own that the network was not trained on",
    )
    split_seed: int = Field(0, ge=0, description="seed of the split of the training images")
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    array_folder: OptionalPath = Field(
        None, description="folder with train.npz and test.npz (x, y), in place of train and evaluation"
    )
    array_folder_env: str | None = Field(
        None, description="environment variable with such a folder; array_folder has precedence"
    )
