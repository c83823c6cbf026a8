"""What may a pipeline file say? Strict, frozen, closed pydantic models; no torch.

Ratios are in (0, 1] and always relative to the untouched network (the baseline). Paths are relative to the pipeline
file unless they are absolute.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import Self  # in typing from Python 3.11 on

from compress.catalog import (
    CORRUPTIONS,
    CRITERIA,
    METHODS,
    NETWORKS,
    RUNTIMES,
    SOURCES,
    TASKS,
    WITH_ERRORS,
    WITHOUT_ERRORS,
    Registry,
)


class Section(BaseModel):
    """Base of every part of a pipeline file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _registered(registry: Registry[Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in registry:
            raise ValueError(f"must be one of {', '.join(registry)}")
        return name

    return AfterValidator(check)


MAX_SIDE = 8192  # pixels


def _to_names(value: object) -> object:
    """Return a list of names as a tuple; a folder called 0 may stand there as a number."""
    plain = [str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in _as_list(value)]
    return tuple(plain) if isinstance(value, list | tuple) else value


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def _to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_order(value: object) -> object:
    return "shuffled" if value == "random" else value  # its name until 0.1


def _check_blocks(value: object) -> object:
    if value in ("auto", "joint") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("must be a whole number of at least 0, auto or joint")


def _check_resize(value: object) -> object:
    sides = value if isinstance(value, list | tuple) else (value, value)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    if whole and max(sides, default=0) > MAX_SIDE:
        raise ValueError(f"must be at most {MAX_SIDE}")
    if value is None or (whole and len(sides) == 2):
        return _to_tuple(value)
    raise ValueError("must be a whole number of at least 1, or [height, width]")


Floats = Annotated[tuple[float, ...], BeforeValidator(_to_tuple)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_to_tuple)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Size = Annotated[tuple[Side, Side], BeforeValidator(_to_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_to_tuple)]
KeptRatio = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Limit = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Calls = Annotated[int, Field(ge=1, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Threads = Annotated[int, Field(ge=1, le=1024)]


REFERENCE = r"^[^:]+(:[^:]+)?:[A-Za-z_][A-Za-z0-9_]*$"


class ArraysSource(Section):
    """Image arrays: uint8 (N, H, W, C), and integer labels, masks (N, H, W) or numbers (N, ...), as the task needs."""

    arrays: str = Field(description="path of the .npz, or of the .npy with the images")
    labels: str | None = Field(None, description="path of the .npy with the labels; not needed for .npz")
    image_key: str = Field("x", description="name of the image array in an .npz")
    label_key: str = Field("y", description="name of the label array in an .npz")


class IdxSource(Section):
    """A pair of IDX files."""

    idx: str = Field(description="path of the image file, plain or .gz")
    labels: str = Field(description="path of the label file, plain or .gz")


class FolderSource(Section):
    """One sub-folder of image files for each class."""

    folder: str = Field(description="path of the folder")
    classes: Annotated[tuple[str, ...], BeforeValidator(_to_names)] | None = Field(
        None, description="folder names in the order of class indices; by default sorted as text"
    )


class TorchvisionSource(Section):
    """Any torchvision classification data set."""

    torchvision: str = Field(description="class name in torchvision.datasets, such as CIFAR10")
    root: str = Field("data", description="folder that torchvision reads from and downloads to")
    download: bool = Field(False, description="whether torchvision may fetch missing files")
    train: bool | None = Field(None, description="which half; by default data.train reads the training half")


class MasksSource(Section):
    """Pictures, and a picture of class indices for each: PNG with the same name."""

    masks: str = Field(description="path of the folder with the masks")
    images: str = Field(description="path of the folder with the pictures")


class CocoSource(Section):
    """Boxes in a JSON file of the COCO form."""

    coco: str = Field(description="path of the JSON file")
    images: str = Field(description="path of the folder with the pictures")
    letterbox: Size | None = Field(None, description="[height, width] that pictures are fitted into, grey at the rims")


class YoloSource(Section):
    """Boxes in one .txt file for each picture: class, centre and size as shares, one box a line."""

    yolo: str = Field(description="path of the folder with the .txt files; a picture without one has no box")
    images: str = Field(description="path of the folder with the pictures")
    letterbox: Size | None = Field(None, description="[height, width] that pictures are fitted into, grey at the rims")


class UnlabelledSource(Section):
    """Images without labels: what is learned and measured is the distance to the untouched network."""

    unlabelled: str = Field(description="path of a folder of pictures, or of a .npy or .npz with images")
    image_key: str = Field("x", description="name of the image array in an .npz")


class OwnSource(Section):
    """A data set class of your own: `__len__`, and `__getitem__` -> (image, target)."""

    own: str = Field(pattern=REFERENCE, description='"pkg.module:Class" or "path/to/file.py:Class"')
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

    @model_validator(mode="after")
    def _check_channels(self) -> "PreprocessingConfig":
        wanted = 1 if self.channels == "L" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, wanted):
                raise ValueError(f"{name} must have 1 or {wanted} values for channels {self.channels}")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be above 0")
        return self


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
    array_folder: str | None = Field(
        None, description="folder with train.npz and test.npz (x, y) to read instead of train and evaluation"
    )
    array_folder_env: str | None = Field(
        None, description="environment variable that may name such a folder; array_folder goes before it"
    )


class TaskConfig(Section):
    """What the network is for: what is learned, and what is measured. The name of a task alone will do."""

    name: Annotated[str, _registered(TASKS)] | None = Field(None, description=f"one of {', '.join(TASKS)}")
    own: str | None = Field(None, pattern=REFERENCE, description='a task of your own: "path/to/file.py:Class"')
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the task of your own")
    ignore_index: int | None = Field(None, description="segmentation: value of mask pixels that do not count; 255")
    postprocess: str | None = Field(
        None, pattern=REFERENCE, description='detection: "path/to/file.py:function" that makes boxes of outputs'
    )
    loss: str | None = Field(
        None,
        pattern=REFERENCE,
        description="detection: function of outputs and targets; without, the untouched network is learned from",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.name is None) == (self.own is None):
            raise ValueError("must hold exactly one of name, own")
        for key, owner in TASK_OPTIONS.items():
            if key in self.model_fields_set and getattr(self, key) is not None and (self.name or "own") != owner:
                if key == "kwargs" and not self.kwargs:
                    continue
                raise ValueError(f"{key} must be left out unless the task is {owner}")
        if self.name == "detection" and self.postprocess is None:
            raise ValueError("postprocess must be given for the task detection")
        return self


TASK_OPTIONS = {"kwargs": "own", "ignore_index": "segmentation", "postprocess": "detection", "loss": "detection"}


def _to_task(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


TaskOrName = Annotated[TaskConfig, BeforeValidator(_to_task)]
DEFAULT_TASK = TaskConfig(name="classification")


class InputConfig(Section):
    """One input of a network that takes several, or one that is no image."""

    shape: Ints = Field(description="sizes without the batch axis; [] for one number")
    dtype: Literal["float32", "int64", "int32", "bool"] = "float32"
    high: int | None = Field(None, ge=1, le=2**24, description="whole numbers are below this, at least 0")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if any(size < 1 for size in self.shape):
            raise ValueError("shape must hold sizes of at least 1")
        if self.high is not None and not self.dtype.startswith("int"):
            raise ValueError("high must stand beside a dtype of whole numbers")
        return self


def _to_input(value: object) -> object:
    return {"shape": value} if isinstance(value, list) else value


Input = Annotated[InputConfig, BeforeValidator(_to_input, json_schema_input_type=InputConfig | list[int])]


class NetworkSection(Section):
    """What every way to name a network has in common."""

    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments that it is built with")
    inputs: dict[str, Input] = Field(
        default_factory=dict,
        description="name -> shape without the batch axis, or shape, dtype and high; without it: one image",
    )
    outputs: Names = Field((), description="which outputs to keep, in this order, where there are several; [] for all")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not all(name.isidentifier() for name in self.inputs):
            raise ValueError("inputs must hold names of letters, digits and _ that begin with no digit")
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError("outputs must name each output once")
        return self


class FactoryModel(NetworkSection):
    """A callable that builds the network."""

    factory: str = Field(
        pattern=REFERENCE,
        description='"pkg.module:callable" or "path/to/file.py:callable"',
    )


class TorchvisionModel(NetworkSection):
    """A network of torchvision.models by its name: classification, segmentation, single-stage detection."""

    torchvision: str = Field(description="such as resnet18, fcn_resnet50, ssdlite320_mobilenet_v3_large")


class TimmModel(NetworkSection):
    """A network of timm by its name; timm is the extra `timm`."""

    timm: str = Field(description="such as convnext_tiny")


class OnnxFileModel(Section):
    """A network that is there as an ONNX file, weights and all."""

    onnx: str = Field(description="path of the .onnx file, in floating point")
    inputs: dict[str, Ints] = Field(
        {}, description="shape of one image by input, such as {input: [3, 224, 224]}, where the file leaves it open"
    )
    outputs: Names = Field((), description="which outputs to keep, in this order, where there are several; [] for all")


def _model_kind(value: object) -> str | None:
    has = value.__contains__ if isinstance(value, dict) else lambda key: hasattr(value, key)
    kinds = [kind for kind in NETWORKS if has(kind)]
    return kinds[0] if len(kinds) == 1 else None


Model = Annotated[
    Annotated[FactoryModel, Tag("factory")]
    | Annotated[OnnxFileModel, Tag("onnx")]
    | Annotated[TimmModel, Tag("timm")]
    | Annotated[TorchvisionModel, Tag("torchvision")],
    Discriminator(
        _model_kind,
        custom_error_type="model_kind",
        custom_error_message=f"must hold exactly one of the keys {', '.join(NETWORKS)}",
    ),
]


class LoadConfig(Section):
    """Build the network, load its weights strictly, measure the baseline."""

    stage: Literal["load"]
    model: Model
    weights: str | None = Field(
        None,
        description="safetensors, a torch checkpoint that weights_only=True can read, a TorchScript archive, a "
        "torch.export program; pretrained, for what timm or torchvision offer; none, for a seeded initialisation; left "
        "out with model.onnx",
    )
    narrow: bool = Field(
        False,
        description="the weights are those of a network slimmed by another tool: their shapes tell the widths, and the "
        "narrow network is the baseline",
    )
    rewrites: Literal["measured", "always", "never"] = Field(
        "measured", description="rewrite the graph for the runtime, baseline included: where that measures faster"
    )


class RankTargetConfig(Section):
    """What must not be exceeded: a share kept of the baseline, or milliseconds. Exactly one."""

    latency: KeptRatio | None = Field(None, description="kept share of the baseline's latency, where `deploy` says")
    latency_ms: float | None = Field(None, gt=0, description="milliseconds a call, where `deploy` says")
    macs: KeptRatio | None = Field(None, description="kept share of the baseline's MACs")
    params: KeptRatio | None = Field(None, description="kept share of the baseline's params")

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if len(self.given()) != 1:
            raise ValueError(f"must hold exactly one of {', '.join(type(self).model_fields)}")
        return self

    def given(self) -> dict[str, float]:
        """Return the quantities that are limited, in a fixed order."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def needs_latency(self) -> bool:
        """Whether latencies have to be known to meet it."""
        return self.latency is not None or self.latency_ms is not None


class TargetConfig(RankTargetConfig):
    """What must not be exceeded: shares are of the baseline. At least one; all that are given hold."""

    size_mb: float | None = Field(None, gt=0, description="size of the ONNX file, in 10^6 bytes")

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if not self.given():
            raise ValueError(f"must hold at least one of {', '.join(type(self).model_fields)}")
        return self


class TorchPruningConfig(Section):
    """An importance of the user's own, written for torch-pruning."""

    torch_pruning: str = Field(
        pattern=REFERENCE, description='a subclass of torch_pruning.importance.Importance: "path/to/file.py:Class"'
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    gradients: Literal["none", "mean", "squares"] | None = Field(
        None,
        description="what it finds in .grad: nothing, the gradient of the mean loss, or the mean of the squared "
        "gradients of single images; by default mean or squares where it derives from torch-pruning's Taylor or "
        "Hessian class",
    )
    comparable: bool = Field(
        False,
        description="whether scores of different groups have one scale; else each group's are divided by their mean",
    )


def _criterion_kind(value: object) -> str:
    return "section" if isinstance(value, dict | Section) else "name"


Criterion = Annotated[
    Annotated[str, _registered(CRITERIA), Tag("name")] | Annotated[TorchPruningConfig, Tag("section")],
    Discriminator(_criterion_kind),
]


class CutConfig(Section):
    """How channels are chosen and cut down to a budget, and what is repaired afterwards."""

    target: TargetConfig
    criterion: Criterion = Field(
        "reconstruction", description="how channels are ranked: a name, or an importance of your own"
    )
    order: Annotated[Literal["criterion", "shuffled"], BeforeValidator(_to_order)] = Field(
        "criterion",
        description="which channels of a group go first; shuffled: any, at the same widths, as a sanity check",
    )
    damage: Literal["scores", "errors", "sensitivity"] = Field(
        "scores",
        description="what narrowing a group costs: by the criterion's own measure, the relative error of its refitted "
        "readers, or the loss measured at each width",
    )
    allocation: Literal["global", "uniform", "shared_error"] = Field(
        "global",
        description="least damage in all, the same removed share of each group, or one bound on the damage of each",
    )
    multiple_of: Count = Field(8, description="widths are multiples of this where the group is wide enough")
    min_width: Count = Field(1, description="channels that every group keeps at least")
    max_removed_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="cap of each group")
    residual: Literal["auto", "cut", "keep"] = Field(
        "auto",
        description="channels that run along shortcuts: cut like all others, kept, or whatever the validation loss "
        "likes best of neither, few and as many as their scores say",
    )
    residual_factors: Annotated[tuple[Positive, ...], BeforeValidator(_to_tuple), Field(min_length=1)] = Field(
        (1e4, 4.0, 1.0),
        description="what residual: auto multiplies the damage of channels along shortcuts by, one after the other",
    )
    whole_networks: Annotated[int, Field(ge=4, le=10_000)] | None = Field(
        None,
        description="networks that are cut, repaired and scored to learn how much each damage counts; none by default, "
        "24 where blocks are joint",
    )
    exclude: Names = Field((), description="layers whose channel groups stay whole; * matches any text")
    score_images: Count = Field(512, description="calibration images that criteria look at")
    images_per_gradient: Count = Field(
        8, description="images of one gradient in taylor scores: their derivatives are averaged before they are squared"
    )
    refit_images: Count = Field(512, description="calibration images that the least-squares repair fits layers to")
    repair: Annotated[
        tuple[Literal["scaling", "least_squares", "bias_folding", "batch_norm"], ...], BeforeValidator(_to_tuple)
    ] = Field(
        ("scaling", "least_squares", "bias_folding", "batch_norm"),
        description="after the cut, each kept only if it lowers the validation loss; scaling is of criteria that find "
        "factors for the channels they keep; [] for none",
    )

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        if self.whole_networks is not None and self.allocation != "global":
            raise ValueError("allocation must be global where whole_networks is given")
        return self

    @model_validator(mode="after")
    def _check_errors(self) -> Self:
        has_scores_alone = isinstance(self.criterion, TorchPruningConfig) or self.criterion in WITHOUT_ERRORS
        if self.damage == "errors" and has_scores_alone:
            named = self.criterion if isinstance(self.criterion, str) else "an importance of your own"
            raise ValueError(
                f"damage must be scores or sensitivity with {named}, which has no errors "
                f"({', '.join(WITH_ERRORS[:-1])} and {WITH_ERRORS[-1]} have)"
            )
        return self


class AugmentationConfig(Section):
    """What is varied while training."""

    crop_padding: int = Field(
        0, ge=0, le=MAX_SIDE, description="pixels of padding before a random crop back to the size"
    )
    flip: bool = Field(False, description="mirror half of the images left to right")
    mixup: float = Field(0.0, ge=0, description="alpha of the shares in which pairs of images are mixed; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of the share of a rectangle out of another image; 0 is off")


class DistillationConfig(Section):
    """Learning from the outputs of the untouched network, and from its feature maps."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="share of the loss")
    temperature: float = Field(4.0, gt=0, description="divides the logits")
    features: float = Field(
        0.0, ge=0, description="weight of the difference between feature maps of the same shape; 0 is off"
    )


class OriginalTrainingConfig(Section):
    """How the network was trained before: the peak rate to fine-tune with follows from it."""

    learning_rate: float = Field(gt=0, description="its peak")
    epochs: float = Field(gt=0, description="its length")


class TrainingConfig(Section):
    """How to train: SGD with Nesterov momentum or AdamW, a warm-up, a schedule down from the peak rate."""

    epochs: float | None = Field(None, gt=0, description="passes over the training split")
    steps: Count | None = Field(None, description="optimiser steps, instead of epochs")
    batch_size: BatchSize = 128
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the schedule; without it what follows from original, or 0.02; of adamw 0.001"
    )
    original: OriginalTrainingConfig | None = Field(None, description="how the network was trained before")
    probe: bool = Field(
        False, description="train an epoch at 0.1, 0.3 and 1 times the peak first; the best on validation is taken"
    )
    momentum: Share = 0.9
    weight_decay: float = Field(1e-4, ge=0)
    warmup_ratio: Share = Field(0.05, description="share of the steps with a rising rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd, with Nesterov momentum, or adamw")
    schedule: Literal["cosine", "one_cycle", "step"] = Field("cosine", description="of the learning rate")
    gradient_clip: float | None = Field(
        None,
        gt=0,
        description="largest norm of all gradients together; without it 1 where the network has no norms or does not "
        "choose among classes",
    )
    accumulation: Count = Field(1, description="batches a step, where memory holds no larger one")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the average of the weights that is measured and kept; 0 is off"
    )
    average_ratio: Share = Field(
        0.0, description="share of the steps, at the end, whose average is one more candidate; 0 is off"
    )
    label_smoothing: Share = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of convolutions and linear layers while training; weights stay fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the network trains; auto takes the GPU where there is one"
    )
    compiled: bool = Field(False, description="train through torch.compile; needs a C++ compiler")
    sync_batch_norm: bool = Field(
        False, description="batch norms of several processes use the statistics of the whole batch"
    )
    save_minutes: float = Field(
        5.0, ge=0, description="between saves of the state; after each epoch there is one anyway"
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    distillation: DistillationConfig | None = None

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        return 0.0

    @property
    def keeps_original_peak(self) -> bool:
        """True where the peak rate is that of the original training however short this one is."""
        return False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("must hold exactly one of epochs, steps")
        if self.learning_rate is not None and self.original is not None:
            raise ValueError("must hold at most one of learning_rate, original")
        return self


class GsmConfig(Section):
    """Settings of the method gsm."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps, at the end, in which the choice stands"
    )
    interval: Count = Field(20, description="steps from one choice to the next before that")
    passive_decay: float | None = Field(
        None, gt=0, description="L2 factor of what gets no gradient; by default sized for the run"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of SGD while the method decides, in place of training.momentum; 0.98 in the paper"
    )


class GatesMethodConfig(Section):
    """Settings of the method gates."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.34, description="share of the steps, at the end, in which the gates are fixed"
    )
    gate_rate: float | None = Field(None, gt=0, description="learning rate of the gates; by default sized for the run")
    multiplier_rate: float | None = Field(
        None, gt=0, description="how fast the price rises while the budget is exceeded; by default sized for the run"
    )


def _check_rising(section: Section, first: str, second: str) -> None:
    """Check that one share is below another; the one that was given is named, with the default of the other."""
    low, high = getattr(section, first), getattr(section, second)
    if low < high:
        return
    if first in section.model_fields_set:
        default = "" if second in section.model_fields_set else ", the default"
        raise ValueError(f"{first} must be below {second} ({high:g}{default})")
    raise ValueError(f"{second} must be above {first} ({low:g}, the default)")


class GregConfig(Section):
    """Settings of the method greg."""

    variant: Literal[1, 2] = Field(
        2, description="1 chooses early by scores; 2 first lets the penalty of all channels grow alike"
    )
    interval: Count = Field(5, description="steps from one increase of the penalties to the next")
    ceiling: float | None = Field(
        None, gt=0, description="of the penalty of what goes; by default 1, or more where the run is too short for that"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="share of the steps after which the penalty has reached its ceiling"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        _check_rising(self, "picked_at", "full_at")
        return self


class IncRegConfig(Section):
    """Settings of the method increg."""

    frozen_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4, description="share of the steps, at the end, in which the choice stands"
    )
    interval: Count = Field(10, description="steps from one change of the penalties to the next")
    ceiling: float | None = Field(
        None,
        gt=0,
        description="of a penalty; a channel that reaches it is the first to go; by default 1, or more where the run "
        "is too short for that",
    )


class CsgdConfig(Section):
    """Settings of the method csgd."""

    pull: float | None = Field(
        None, gt=0, description="factor that draws channels to the mean of their cluster; by default sized for the run"
    )


class GrdaConfig(Section):
    """Settings of the method grda."""

    mu: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.51, description="exponent of the threshold's growth")
    c: float | None = Field(None, gt=0, description="factor of the threshold; by default sized for the run")
    interval: Count = Field(10, description="steps from one look at whether the zeros are enough to the next")
    reached_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the steps after which the threshold is what the weights at the start ask for"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="share of the steps after which the choice is final even where the zeros are not enough"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        _check_rising(self, "reached_at", "until")
        return self


class RegrowConfig(Section):
    """Settings of the method regrow."""

    interval: Count | None = Field(
        None, description="steps from one choice to the next; by default a fortieth of the run"
    )
    ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of a group's channels that comes back after the first choice; falls to 0 as a cosine"
    )
    until: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="share of the steps after which the choice is final"
    )


class TppConfig(Section):
    """Settings of the method tpp."""

    strength: float = Field(1.0, ge=0, description="of the Gram term next to the penalty; 0 is off")
    interval: Count = Field(5, description="steps from one increase of the penalties to the next")
    ceiling: float | None = Field(
        None, gt=0, description="of the penalty of what goes; by default 1, or more where the run is too short for that"
    )
    picked_at: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the steps before the choice")
    full_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.6, description="share of the steps after which the penalty has reached its ceiling"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        _check_rising(self, "picked_at", "full_at")
        return self


def _check_training(method: str | None, training: TrainingConfig | None) -> None:
    """Check that a method has its training, and that training nothing that would undo what it does by the last step."""
    if (method is None) != (training is None):
        missing, given = ("training", "method") if training is None else ("method", "training")
        raise ValueError(f"{missing} must be given where {given} is")
    for name in ("ema", "average_ratio", "probe"):
        if training is not None and getattr(training, name):
            raise ValueError(f"training.{name} must be left out where a method is at work")
    if training is not None and training.precision == "fp16":
        raise ValueError("training.precision must not be fp16 where a method is at work, which reads gradients")


class PruneConfig(CutConfig):
    """Remove channels, and residual blocks, down to a budget; then repair without training."""

    stage: Literal["prune"]
    blocks: Annotated[int | Literal["auto", "joint"], BeforeValidator(_check_blocks)] = Field(
        0,
        description="residual blocks to remove first, least damage first; auto tries how many are best, or lets the "
        "method decide; joint chooses blocks and widths in one solve",
    )
    method: Annotated[str, _registered(METHODS)] | None = Field(
        None, description="what decides, while the network trains, which channels go; by default scores do at once"
    )
    training: TrainingConfig | None = Field(None, description="how the network trains while the method decides")
    gsm: GsmConfig | None = Field(None, description="settings of that method")
    gates: GatesMethodConfig | None = Field(None, description="settings of that method")
    greg: GregConfig | None = Field(None, description="settings of that method")
    increg: IncRegConfig | None = Field(None, description="settings of that method")
    csgd: CsgdConfig | None = Field(None, description="settings of that method")
    grda: GrdaConfig | None = Field(None, description="settings of that method")
    regrow: RegrowConfig | None = Field(None, description="settings of that method")
    tpp: TppConfig | None = Field(None, description="settings of that method")

    @model_validator(mode="before")
    @classmethod
    def _resolve_residual(cls, values: Any) -> Any:
        """Say `cut` where a method decides and nothing is said: it ranks channels along shortcuts like all others."""
        if isinstance(values, dict) and values.get("method") is not None and "residual" not in values:
            return {**values, "residual": "cut"}
        return values

    @property
    def method_settings(self) -> Section | None:
        """The section of the method, if it is given; a plug-in's method has none."""
        return getattr(self, self.method) if self.method in METHOD_SETTINGS else None

    @property
    def trials(self) -> int:
        """Number of whole networks that are cut, repaired and scored before the choice."""
        return self.whole_networks or (JOINT_NETWORKS if self.blocks == "joint" else 0)

    @property
    def method_training(self) -> TrainingConfig | None:
        """Training while the method decides, with the method's own momentum where it sets one."""
        momentum = getattr(self.method_settings, "momentum", None)
        if self.training is None or momentum is None:
            return self.training
        return self.training.model_copy(update={"momentum": momentum})

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        _check_training(self.method, self.training)
        if self.method is not None and self.blocks == "joint":
            raise ValueError("blocks must not be joint where a method decides by scores of its own")
        if self.method is not None and self.whole_networks is not None:
            raise ValueError("whole_networks must be left out where a method decides by scores of its own")
        if self.blocks == "joint" and self.allocation != "global":
            raise ValueError("allocation must be global where blocks is joint")
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and self.method != name:
                raise ValueError(f"{name} must be left out unless it is the method")
        for name in ("criterion", "order", "damage"):
            if self.method is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} must be left out where a method decides by scores of its own")
        if self.method is not None and self.residual == "auto":
            raise ValueError("residual must be cut or keep where a method decides: auto compares networks cut at once")
        if self.method not in (None, "gates") and self.blocks == "auto":
            raise ValueError("blocks must be a number unless the method is gates, which alone decides about blocks")
        if self.training is not None and self.training.optimizer != "sgd":
            raise ValueError("training.optimizer must be sgd where a method decides: decays are sized for it")
        return self


JOINT_NETWORKS = 24
METHOD_SETTINGS = ("gsm", "gates", "greg", "increg", "csgd", "grda", "regrow", "tpp")

Schemes = Annotated[
    tuple[Literal["nc", "vh", "tucker2", "svd", "nc2", "nc4"], ...],
    BeforeValidator(_to_tuple),
    Field(min_length=1, description="schemes to choose from; nc2 and nc4 are nc in 2 and 4 groups of input channels"),
]
SCHEMES: Schemes = ("nc", "vh", "tucker2", "svd")
ALDS_SCHEMES: Schemes = ("nc", "nc2", "nc4", "svd")
RankAllocation = Annotated[
    Literal["shared_error", "alds", "energy"],
    Field(
        description="shared_error: one relative error for all layers; alds: least bound of operator norms, groups of "
        "channels too; energy: retained energy against cost"
    ),
]


def _fill_schemes(values: Any, key: str) -> Any:
    """Return the values with the schemes of alds where it allocates ranks and no schemes are given."""
    if isinstance(values, dict) and values.get(key) == "alds" and "schemes" not in values:
        return {**values, "schemes": ALDS_SCHEMES}
    return values


def _check_alds_schemes(allocation: str, schemes: Schemes) -> None:
    if allocation == "alds" and not set(schemes) <= set(ALDS_SCHEMES):
        raise ValueError(f"schemes must be of {', '.join(ALDS_SCHEMES)} where alds allocates ranks")


class TrpConfig(Section):
    """Settings of the method trp."""

    interval: Count = Field(20, description="steps from one cut to low rank to the next")
    strength: float = Field(3e-4, ge=0, description="of the pull towards lower ranks in the steps of a cut")


class LowRankConfig(Section):
    """Replace kernels by products of smaller ones (NC, VH, Tucker-2, SVD), where that is cheaper."""

    stage: Literal["low_rank"]
    relative_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="shared bound of the relative error of every layer"
    )
    target: RankTargetConfig | None = Field(None, description="budget that decides the ranks")
    allocation: RankAllocation = "shared_error"
    schemes: Schemes = SCHEMES
    error_of: Literal["outputs", "kernels"] = Field(
        "kernels", description="kernels; or outputs on calibration images, better where no training follows"
    )
    score_images: Count = Field(256, description="calibration images that outputs are looked at on")
    multiple_of: Count = Field(8, description="ranks are multiples of this where the layer is wide enough")
    exclude: Names = Field((), description="layers that stay dense; * matches any text")
    method: Literal["trp"] | None = Field(
        None, description="trp cuts kernels to low rank again and again while the network trains; by default once"
    )
    training: TrainingConfig | None = Field(None, description="how the network trains with that method")
    trp: TrpConfig | None = Field(None, description="settings of that method")

    @model_validator(mode="before")
    @classmethod
    def _resolve_schemes(cls, values: Any) -> Any:
        return _fill_schemes(values, "allocation")

    @model_validator(mode="after")
    def _check_one(self) -> "LowRankConfig":
        if (self.relative_error is None) == (self.target is None):
            raise ValueError("must hold exactly one of relative_error, target")
        if self.allocation != "shared_error" and self.target is None:
            raise ValueError("allocation must be shared_error where relative_error is given: the others need a target")
        _check_alds_schemes(self.allocation, self.schemes)
        _check_training(self.method, self.training)
        if self.trp is not None and self.method is None:
            raise ValueError("trp must be left out unless it is the method")
        if self.method is not None and self.error_of == "outputs":
            raise ValueError("error_of must be kernels where a method cuts kernels while training")
        return self


class FinetuneConfig(TrainingConfig):
    """Train the slim network."""

    stage: Literal["finetune"]
    weights: Literal["inherited", "rewound", "random"] = Field(
        "inherited",
        description="start of training: the weights that the cut left, those of rewind_to cut in the same way, or a "
        "new initialisation at the same structure",
    )
    rewind_to: str | None = Field(
        None, description="checkpoint of the whole network early in its training; formats as weights of load"
    )
    rewind_schedule: Literal["whole", "tail"] | None = Field(
        None,
        description="whole: the whole original schedule from its own peak; tail: what of it follows rewind_epoch; "
        "by default the schedule and peak of fine-tuning",
    )
    rewind_epoch: float | None = Field(
        None, ge=0, description="epoch of the original training that weights or schedule go back to"
    )
    norms: bool = Field(
        True,
        description="put batch norms behind the convolutions of a network that has none while it trains; they are "
        "folded into them afterwards",
    )

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        if self.rewind_schedule != "tail" or self.original is None or self.rewind_epoch is None:
            return 0.0
        return self.rewind_epoch / self.original.epochs

    @property
    def keeps_original_peak(self) -> bool:
        """True where the peak rate is that of the original training however short this one is."""
        return self.rewind_schedule is not None

    @model_validator(mode="after")
    def _check_rewinding(self) -> Self:
        if self.weights == "rewound" and self.rewind_to is None:
            raise ValueError("rewind_to must name a checkpoint where weights is rewound")
        if self.weights != "rewound" and self.rewind_to is not None:
            raise ValueError("rewind_to must be left out unless weights is rewound")
        if self.rewind_schedule is not None and self.probe:
            raise ValueError("probe must be false with rewind_schedule, which fixes the peak rate")
        if self.rewind_schedule == "whole" and self.original is None and self.learning_rate is None:
            raise ValueError("original must be given with rewind_schedule: whole, or learning_rate")
        if self.rewind_schedule == "tail":
            if self.original is None:
                raise ValueError("original must be given with rewind_schedule: tail")
            if self.rewind_epoch is None:
                raise ValueError("rewind_epoch must be given with rewind_schedule: tail")
        elif self.weights != "rewound" and self.rewind_epoch is not None:
            raise ValueError("rewind_epoch must be left out unless weights is rewound or rewind_schedule is tail")
        if self.original is not None and self.rewind_epoch is not None and self.rewind_epoch >= self.original.epochs:
            raise ValueError(f"rewind_epoch must be below original.epochs ({self.original.epochs:g})")
        return self


class SlimConfig(CutConfig):
    """Remove channels and residual blocks and factorise layers under one budget, in one step or in several."""

    stage: Literal["slim"]
    moves: Annotated[tuple[Literal["channels", "blocks", "ranks"], ...], BeforeValidator(_to_tuple)] = Field(
        ("channels", "blocks", "ranks"), description="what may be done; channels always"
    )
    rank_allocation: RankAllocation = "shared_error"
    schemes: Schemes = SCHEMES
    steps: Count = Field(1, description="times the network is slimmed, each time nearer to the target")
    between: TrainingConfig | None = Field(None, description="training after each step but the last")

    @model_validator(mode="before")
    @classmethod
    def _resolve_schemes(cls, values: Any) -> Any:
        return _fill_schemes(values, "rank_allocation")

    @model_validator(mode="after")
    def _check_moves(self) -> Self:
        _check_alds_schemes(self.rank_allocation, self.schemes)
        if "channels" not in self.moves:
            raise ValueError("moves must hold channels; for ranks alone there is the stage low_rank")
        given = list(self.target.given())
        if "ranks" in self.moves and (len(given) > 1 or "size_mb" in given):
            raise ValueError("target must hold latency, latency_ms, macs or params alone while moves hold ranks")
        if self.steps > 1 and not set(given) <= {"latency", "macs", "params"}:
            raise ValueError("target must be in shares (latency, macs, params) while steps is above 1")
        if self.steps > 1 and self.between is None:
            raise ValueError("steps must be 1 without between, which says how to train from step to step")
        if self.steps == 1 and self.between is not None:
            raise ValueError("between must be left out while steps is 1")
        return self


class ExportConfig(Section):
    """Write and check the ONNX file."""

    stage: Literal["export"]
    opset: int = Field(18, ge=18, le=23, description="version of the default ONNX operator set")
    dynamic_batch: bool = Field(True, description="whether the batch axis stays open")
    dynamic: Annotated[tuple[Literal["height", "width"], ...], BeforeValidator(_to_tuple)] = Field(
        (), description="which axes of the image stay open; parity is checked at other sizes, too"
    )
    simplify: bool = Field(True, description="run onnxslim; parity is checked again after it")
    external_data: bool = Field(False, description="weights in a second file; forced above 1.8 GB")


class QuantizeConfig(Section):
    """Round the exported file to INT8; the float file is kept to compare with."""

    stage: Literal["quantize"]
    images: int = Field(256, ge=8, description="calibration images whose activations decide the ranges")
    method: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="what of the activations a range keeps: all, what loses least, all but the outermost"
    )
    per_channel: bool = Field(True, description="whether each output channel of a weight has a scale of its own")
    reduce_range: bool = Field(False, description="7 bits for weights, for processors without VNNI")
    activation_type: Literal["uint8", "int8"] = Field(
        "uint8", description="of activations; int8, with its zero point at 0, for TensorRT and ARM"
    )
    weight_type: Literal["int8", "uint8"] = Field("int8", description="of weights")
    exclude: Names = Field((), description="layers or nodes that stay float; * matches any text")

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        if (self.activation_type, self.weight_type) == ("int8", "uint8"):
            raise ValueError(
                "weight_type must be int8 where activation_type is: no runtime has kernels for uint8 there"
            )
        return self


class GatesConfig(Section):
    """Limits that the file must keep; each one given is checked."""

    max_drop: dict[str, Limit] = Field(
        {}, description="largest loss against the baseline, of a share as one (0.01 is one point)"
    )
    max_rise: dict[str, Limit] = Field(
        {}, description="largest gain against the baseline; excess_error is what corruptions cost more than it"
    )
    min: dict[str, Limit] = Field({}, description="smallest value")
    max: dict[str, Limit] = Field(
        {}, description="largest value; churn is the share of predictions that are not the baseline's"
    )
    max_drop_on: dict[str, Limit] = Field(
        {}, description="largest loss on a distribution by its name, such as jpeg 3 or a shifted data set"
    )
    max_ratio: dict[
        Literal["macs", "params", "size", "p50", "p90", "p95", "p99", "cold_start", "memory", "energy"], Positive
    ] = Field({}, description="largest share of what the baseline has or takes")
    judge_by: Literal["estimate", "bound", "significant"] = Field(
        "estimate",
        description="estimate: the figure itself must keep its limit; bound: its 95 % interval must show that; "
        "significant: as estimate, but only what the interval shows to be broken fails",
    )
    min_speedup: float | None = Field(None, gt=0, description="baseline latency / slim latency, medians")
    max_latency_ms: float | None = Field(None, gt=0, description="median latency")
    max_quantile_ms: dict[Literal["p90", "p95", "p99"], Positive] = Field({}, description="latency of the slower calls")
    max_macs: int | None = Field(None, gt=0, description="multiply-accumulates for one image")
    max_params: int | None = Field(None, gt=0, description="scalars in parameters")
    max_cold_start_ms: float | None = Field(None, gt=0, description="until a session is there, in a new process")
    max_memory_mb: float | None = Field(None, gt=0, description="growth of memory with the session, in 10^6 bytes")
    min_images_per_second: float | None = Field(None, gt=0, description="at the batch size where they are most")
    max_size_mb: float | None = Field(None, gt=0, description="all files of the model, in 10^6 bytes")
    parity: float = Field(
        1e-3,
        gt=0,
        description="largest absolute difference to torch on real samples; without torch, to itself and other places",
    )
    max_fallback_nodes: int | None = Field(
        None, ge=0, description="nodes that another execution provider than the one asked for computes"
    )


class RobustnessConfig(Section):
    """Noise, corruptions and other data sets under which the file is compared with the baseline."""

    images: Count = Field(1000, description="of the evaluation split, spread evenly")
    noise: Literal["uniform", "gaussian"] = Field("uniform", description="added to what goes into the network")
    noise_levels: Floats = Field((0.1, 0.2, 0.3, 0.4, 0.5), description="in units of the network's input; [] for none")
    corruptions: Names = Field(CORRUPTIONS, description=f"of {', '.join(CORRUPTIONS)}; [] for none")
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], BeforeValidator(_to_tuple)] = Field(
        (3,), min_length=1, description="1 to 5"
    )
    shifted: dict[str, Source] = Field(
        {}, description="data sets from elsewhere with the same classes, each by a name of yours"
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions must be of {', '.join(CORRUPTIONS)}; '{name}' is not")
        if any(level <= 0 for level in self.noise_levels):
            raise ValueError("noise_levels must be above 0")
        if not self.noise_levels and not self.corruptions and not self.shifted:
            raise ValueError("must hold noise_levels, corruptions or shifted")
        return self


class ResourcesConfig(Section):
    """What a file takes besides the time of a call: to start, in memory, and at other batch sizes."""

    batch_sizes: Annotated[tuple[BatchSize, ...], BeforeValidator(_to_tuple)] = Field(
        (1, 8, 32), min_length=1, description="images a call for the throughput"
    )


class AlsoConfig(Section):
    """One more place where the same file is opened, compared with the one that ships it, and timed beside it."""

    runtime: Annotated[str, _registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads | None = Field(None, description="intra-op threads; those of verify by default")
    required: bool = Field(False, description="whether the verdict fails where this cannot be had")

    @property
    def label(self) -> str:
        """What tells it from others in the names of checks."""
        name = self.provider if self.runtime == "onnxruntime" else self.runtime
        return name if self.threads is None else f"{name}.{self.threads}"


class VerifyConfig(Section):
    """Measure the file in the runtime that ships it."""

    stage: Literal["verify"]
    runtime: Annotated[str, _registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider; must be the one in use")
    threads: Threads = Field(1, description="intra-op threads of the latency measurement")
    batch_size: BatchSize = Field(1, description="images a call in the latency measurement")
    warmup: Calls = Field(10, description="calls before the measurement")
    repeats: Calls = Field(
        100, description="timed calls of each model, in several sittings; up to five times as many of fast models"
    )
    parity_samples: int = Field(64, ge=1, description="real images compared with torch")
    robustness: RobustnessConfig | None = Field(None, description="noise and corruptions to look at; by default none")
    resources: ResourcesConfig | None = Field(
        ResourcesConfig(), description="start, memory and throughput; null leaves them out"
    )
    second_opinion: bool = Field(
        False, description="whether the ONNX reference evaluator must have agreed; asked for tiny networks in any case"
    )
    also: Annotated[tuple[AlsoConfig, ...], BeforeValidator(_to_tuple)] = Field(
        (), description="more runtimes and providers to compare and to time the file on"
    )
    gates: GatesConfig = GatesConfig()

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        labels = [one.label for one in self.also]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"also must name each place once; {label} stands there {labels.count(label)} times")
        for one in self.also:
            place = (one.runtime, one.provider, one.threads or self.threads)
            if place == (self.runtime, self.provider, self.threads):
                raise ValueError(
                    f"also must name other places than the one that ships the file; {one.label} is that one"
                )
        return self


StageConfig = Annotated[
    LoadConfig
    | PruneConfig
    | SlimConfig
    | LowRankConfig
    | FinetuneConfig
    | ExportConfig
    | QuantizeConfig
    | VerifyConfig,
    Field(discriminator="stage"),
]


class GatesFile(VerifyConfig):
    """What `compress verify --gates` reads: the settings of a `verify` stage, and on what to measure."""

    stage: Literal["verify"] = "verify"
    seed: int = Field(0, ge=0, lt=2**63, description="decides noise and corruptions")
    task: TaskOrName = Field(DEFAULT_TASK, description="what the network is for")
    evaluation: Source | None = Field(None, description="images and labels; --data goes before it")
    preprocessing: PreprocessingConfig | None = Field(
        None, description="what happens to an image first; by default what the file says about itself"
    )


class DeployConfig(Section):
    """Where the model will run. Budgets in milliseconds are measured there, and so is the verdict."""

    runtime: Annotated[str, _registered(RUNTIMES)] = "onnxruntime"
    provider: str = Field("CPUExecutionProvider", description="execution provider")
    threads: Threads = Field(1, description="intra-op threads")
    batch_size: BatchSize = Field(1, description="images a call")
    repeats: Calls = Field(100, description="timed calls of each variant, of slow ones fewer; more on a noisy machine")
    precision: Literal["fp32", "fp16"] = Field("fp32", description="of the files; fp16 where the provider has it")
    table: str | None = Field(None, description="latency table that `compress profile` wrote; measured here by default")
    accept_foreign_table: bool = Field(False, description="use a table of another machine as it is")


class PipelineConfig(Section):
    """A whole pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="name of the run folder")
    seed: int = Field(0, ge=0, lt=2**63, description="decides everything random")
    threads: Threads | None = Field(None, description="torch threads; all cores by default")
    plugins: Names = Field((), description="modules that register criteria and runtimes of your own")
    task: TaskOrName = Field(DEFAULT_TASK, description="what the network is for; classification by default")
    data: DataConfig
    deploy: DeployConfig | None = None
    stages: Annotated[tuple[StageConfig, ...], BeforeValidator(_to_tuple)] = Field(min_length=1)
