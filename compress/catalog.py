"""Names of built-in criteria, methods, stages, runtimes, tasks and data sources, and of optional packages.

A registry maps a name to an object, or to the "module:attribute" that it is imported from on first use. Importing this
module imports neither torch nor any of the objects. Install hints name packages, not extras of this project, whose name
on the package index belongs to another project.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from compress.errors import InternalError, PackageMissing, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name, imported on first use.

    Args:
        kind: Noun for the entries in messages, such as "criterion".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}
        self._summaries: dict[str, str] = {}

    def declare(self, name: str, place: str, summary: str = "") -> None:
        """Add a name whose object is imported on first use.

        Args:
            name: As written in pipeline files.
            place: "module:attribute" of the object.
            summary: One line for `compress list`.

        Raises:
            InternalError: The name is registered already.
        """
        self._add(name, place, summary)

    def declare_all(self, package: str, entries: Iterable[tuple[str, str, str]]) -> None:
        """Declare (name, place, summary) of several objects; places are relative to a package.

        Raises:
            InternalError: A name is registered already.
        """
        for name, place, summary in entries:
            self.declare(name, f"{package}.{place}", summary)

    def register(self, name: str, entry: T, summary: str = "") -> None:
        """Add an object, for plug-ins.

        Args:
            name: As written in pipeline files.
            entry: The object.
            summary: One line for `compress list`.

        Raises:
            InternalError: The name is registered already.
        """
        self._add(name, entry, summary)

    def summary(self, name: str) -> str:
        """Return the line for `compress list`, "" for a name without one; imports nothing."""
        return self._summaries.get(name, "")

    def get(self, name: str) -> T:
        """Return the object of a name, imported if need be.

        Raises:
            UnknownName: The name is not registered; the message lists the choices, the hint the closest one.
        """
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry  # type: ignore[return-value]

    def check(self, name: str) -> None:
        """Check that a name is registered; imports nothing.

        Raises:
            UnknownName: As in `get`.
        """
        if name not in self._entries:
            raise UnknownName(f"{self.kind} must be one of {', '.join(self)}, got '{name}'.", hint=closest(name, self))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, name: str, entry: T | str, summary: str) -> None:
        if name in self._entries:
            raise InternalError(f"{self.kind} '{name}' is registered twice.")
        self._entries[name], self._summaries[name] = entry, summary


def closest(name: str, choices: Registry[T] | list[str]) -> str | None:
    """Return the hint "did you mean 'x'?" with the closest choice; None if no choice is close."""
    matches = get_close_matches(name, list(choices), n=1, cutoff=0.51)
    return f"did you mean '{matches[0]}'?" if matches else None


NOTHING, TORCH_MODEL, ONNX_MODEL, VERDICT = "nothing", "TorchModel", "OnnxModel", "Verdict"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """Declaration of a stage, for planning without importing it.

    Attributes:
        name: As written in pipeline files.
        place: "module:Class" of the implementation.
        version: Part of the cache key; raised when results change for the same input.
        consumes: Kind of artifact that the stage takes.
        produces: Kind of artifact that the stage yields.
        uses_data: True if results depend on the images.
        summary: One line for `compress list`.
    """

    name: str
    place: str
    version: int
    consumes: str
    produces: str
    uses_data: bool
    summary: str


STAGES: dict[str, StageEntry] = {
    entry.name: entry
    for entry in (
        StageEntry("load", "compress.stages.load:LoadStage", 6, NOTHING, TORCH_MODEL, True,
                   "build the network, load its weights, measure the baseline"),
        StageEntry("prune", "compress.stages.prune:PruneStage", 13, TORCH_MODEL, TORCH_MODEL, True,
                   "remove channels and residual blocks down to a budget"),
        StageEntry("slim", "compress.stages.slim:SlimStage", 11, TORCH_MODEL, TORCH_MODEL, True,
                   "remove channels and blocks and factorise layers under one budget"),
        StageEntry("low_rank", "compress.stages.low_rank:LowRankStage", 9, TORCH_MODEL, TORCH_MODEL, True,
                   "factorise kernels into products of smaller ones"),
        StageEntry("finetune", "compress.stages.finetune:FinetuneStage", 9, TORCH_MODEL, TORCH_MODEL, True,
                   "train the slim network; the best epoch on validation is kept"),
        StageEntry("export", "compress.stages.export:ExportStage", 4, TORCH_MODEL, ONNX_MODEL, True,
                   "write and check the ONNX file"),
        StageEntry("quantize", "compress.stages.quantize:QuantizeStage", 1, ONNX_MODEL, ONNX_MODEL, True,
                   "quantise the ONNX file to INT8, with ranges from calibration images"),
        StageEntry("verify", "compress.stages.verify:VerifyStage", 5, ONNX_MODEL, VERDICT, True,
                   "measure the file in its runtime and check the gates"),
    )
}  # fmt: skip

NOMINAL = "nominal"  # images without perturbation
CORRUPTIONS = (
    "gaussian_noise",
    "impulse_noise",
    "gaussian_blur",
    "brightness",
    "contrast",
    "jpeg",
    "pixelate",
    "elastic",
    "fog",
)

SOURCES: dict[str, str] = {
    "arrays": ".npz or .npy arrays: uint8 images (N, H, W, C); integer labels, masks or numbers",
    "coco": "images, and boxes in a JSON file of the COCO format",
    "folder": "one sub-folder of image files for each class",
    "idx": "pair of IDX files (MNIST format), plain or .gz",
    "masks": "images, and a PNG of class indices for each",
    "own": "data set class of your own",
    "torchvision": "classification data set of torchvision, by its class name",
    "unlabelled": "images without labels: a folder, or an array",
    "yolo": "images, and boxes in one .txt file for each",
}

NETWORKS: dict[str, str] = {
    "factory": '"pkg.module:callable" or "file.py:callable" of your own that returns a torch.nn.Module',
    "onnx": "ONNX file with its weights",
    "timm": "network of timm, by its name (pip install timm)",
    "torchvision": "network of torchvision, by its name: classification, segmentation, single-stage detection",
}

TASKS: Registry[Any] = Registry("task")
TASKS.declare_all("compress.tasks", (
    ("classification", "classification:Classification", "one of K classes for each image; top-1"),
    ("segmentation", "segmentation:Segmentation", "one of K classes for each pixel; mIoU"),
    ("detection", "detection:Detection", "boxes, by a postprocess function of your own; mAP"),
    ("regression", "regression:Regression", "numbers for each image; RMSE"),
    ("embedding", "imitation:Embedding", "outputs that must stay close to the baseline's; distance"),
))  # fmt: skip

# Metrics that gates may name, by task and kind of limit. PERTURBED are those of the primary metric under perturbations.
PERTURBED = ("noise", "corruptions", "shifted")
_OF_IMITATION = {"max_drop": ("cosine",), "max_rise": ("distance",), "min": ("cosine",), "max": ("distance",)}
_OF_DETECTION = tuple(f"{part}{name}" for part in ("", "mask_", "keypoint_") for name in ("map", "map50", "map75"))
_NO_LIMITS: dict[str, tuple[str, ...]] = {"max_drop": (), "max_rise": (), "min": (), "max": ()}
GATED: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "max_drop": ("top1", "top5", "worst_class", *PERTURBED, "worst_distribution"),
        "max_rise": ("calibration_error", "excess_error"),
        "min": ("top1", "top5", "worst_class", *PERTURBED),
        "max": ("calibration_error", "churn", "softmax_distance"),
    },
    "segmentation": {
        **_NO_LIMITS,
        "max_drop": ("miou", "pixel_accuracy", *PERTURBED, "worst_distribution"),
        "min": ("miou", "pixel_accuracy", *PERTURBED),
    },
    "detection": {
        **_NO_LIMITS,
        "max_drop": (*_OF_DETECTION, *PERTURBED, "worst_distribution"),
        "min": (*_OF_DETECTION, *PERTURBED),
    },
    "regression": {
        **_NO_LIMITS,
        "max_rise": ("rmse", "mae", *PERTURBED, "worst_distribution"),
        "max": ("rmse", "mae", *PERTURBED),
    },
    "embedding": {
        **_OF_IMITATION,
        "max_rise": ("distance", *PERTURBED, "worst_distribution"),
        "max": ("distance", *PERTURBED),
    },
}
# Metrics in addition to those of the task, for a network measured without labels.
GATED_WITHOUT_LABELS: dict[str, tuple[str, ...]] = {
    "max_drop": ("agreement", "cosine"),
    "max_rise": ("distance",),
    "min": ("agreement", "cosine"),
    "max": ("distance",),
}
SHARES = {
    "top1", "top5", "worst_class", "noise", "corruptions", "shifted", "worst_distribution", "calibration_error",
    "excess_error", "churn", "miou", "pixel_accuracy", "agreement", *_OF_DETECTION,
}  # fmt: skip

CRITERIA: Registry[Any] = Registry("criterion")
CRITERIA.declare_all("compress.pruning.criteria", (
    ("l1", "magnitude:L1", "sum of absolute weights of the filters that produce a channel"),
    ("l2", "magnitude:L2", "Euclidean norm of the filters that produce a channel"),
    ("bn_scale", "magnitude:BnScale", "absolute scale of the batch norms behind a channel"),
    ("taylor", "taylor:Taylor", "estimated change of the loss when a channel is masked"),
    ("reconstruction", "reconstruction:Reconstruction",
     "widths by taylor; first removed is what refitted readers can replace best"),
    ("greedy", "reconstruction:Greedy",
     "forward selection of the channels that reproduce their readers' outputs best; no labels"),
    ("greedy_refit", "reconstruction:GreedyRefit",
     "greedy with readers refitted at each step, for strong compression; no labels"),
    ("greedy_loss", "greedy_loss:GreedyLoss", "forward selection by the loss, for small networks"),
    ("lasso", "reconstruction:Lasso", "LASSO path over the channels of each reader; no labels"),
    ("grasp", "gradient_flow:Grasp", "derivative of the gradient norm with respect to a mask on each channel"),
    ("snip", "gradient_flow:Snip", "connection sensitivity: taylor with one gradient over all images"),
    ("pfp", "pfp:Pfp", "largest share of a channel in an output of its readers; no labels"),
    ("sipp", "pfp:Sipp", "pfp with the mean over positions in place of the largest share; no labels"),
    ("random", "magnitude:Random", "seeded random numbers, for comparison"),
    ("tp_magnitude", "torch_pruning:TpMagnitude", "torch-pruning: squared weights, mean over the layers of the group"),
    ("tp_fpgm", "torch_pruning:TpFpgm", "torch-pruning: distance to the other channels of the group"),
    ("tp_lamp", "torch_pruning:TpLamp", "torch-pruning: tp_magnitude over the sum of all scores at least as large"),
    ("tp_taylor", "torch_pruning:TpTaylor", "torch-pruning: |weight * gradient|, summed, mean over the layers"),
    ("tp_hessian", "torch_pruning:TpHessian",
     "torch-pruning: weight^2 * mean squared gradient, summed, mean over the layers"),
    ("tp_bn_scale", "torch_pruning:TpBnScale",
     "torch-pruning: absolute scales, mean over the batch norms of the group"),
    ("tp_random", "torch_pruning:TpRandom", "torch-pruning: seeded random numbers"),
))  # fmt: skip

WITHOUT_ERRORS = frozenset(  # criteria with scores only: no errors of readers, no losses
    {"l1", "l2", "bn_scale", "taylor", "grasp", "snip", "pfp", "sipp", "random", "tp_magnitude", "tp_fpgm", "tp_lamp",
     "tp_taylor", "tp_hessian", "tp_bn_scale", "tp_random"}
)  # fmt: skip
WITH_ERRORS = ("greedy", "greedy_refit", "greedy_loss", "lasso", "reconstruction")

METHODS: Registry[Any] = Registry("method")
METHODS.declare_all("compress.pruning.methods", (
    ("gsm", "gsm:Gsm", "gradients for the most important channels only; the others decay"),
    ("gates", "gates:Gates", "learned number of kept channels in each group, and learned choice of blocks"),
    ("greg", "greg:Greg", "penalty on the channels to remove, growing step by step"),
    ("increg", "increg:IncReg", "penalties that rise and fall with the rank of a channel"),
    ("csgd", "csgd:Csgd", "similar channels pulled together until they can be merged"),
    ("grda", "grda:Grda", "growing threshold on batch-norm scales until enough of them are zero"),
    ("regrow", "regrow:Regrow", "masked training; at every choice some removed channels return at random"),
    ("tpp", "tpp:Tpp", "greg, with removed filters decorrelated from kept ones"),
))  # fmt: skip

RANKS: dict[str, tuple[str, str]] = {  # name -> setting of `low_rank` that takes it, summary
    "nc": ("schemes", "kh x kw convolution C -> r, then 1 x 1 convolution r -> N"),
    "nc2": ("schemes", "nc with the input channels in 2 groups, each of rank r"),
    "nc4": ("schemes", "nc with the input channels in 4 groups, each of rank r"),
    "vh": ("schemes", "kh x 1 convolution C -> r, then 1 x kw convolution r -> N"),
    "tucker2": ("schemes", "1 x 1 convolution, kh x kw convolution between two ranks, 1 x 1 convolution"),
    "svd": ("schemes", "two 1 x 1 convolutions or two linear layers"),
    "shared_error": ("allocation", "one relative error for all layers, solved from the budget"),
    "alds": ("allocation", "smallest bound of the residuals' operator norms; groups and ranks are chosen together"),
    "energy": (
        "allocation",
        "retained energy of each layer against its cost, at a price solved from the budget",
    ),
    "trp": ("method", "training with kernels projected to low rank at intervals"),
}

RUNTIMES: Registry[Any] = Registry("runtime")
RUNTIMES.declare_all("compress.verification.runtimes", (
    ("litert", "litert:LiteRt", "LiteRT (TensorFlow Lite) on a CPU, in float32; the file is converted by litert-torch"),
    ("ncnn", "ncnn:Ncnn", "ncnn on a CPU, or on a GPU by Vulkan, in float32; the file is converted by pnnx"),
    ("onnxruntime", "onnxruntime:OnnxRuntime", "ONNX Runtime with any of its execution providers"),
    ("onnx_reference", "onnx_reference:OnnxReference",
     "reference evaluator of the ONNX project on the CPU; slow, a second opinion on tiny networks"),
    ("openvino", "openvino:OpenVino", "OpenVINO on a CPU, GPU or NPU, in the precision of the file"),
    ("torch_eager", "torch_eager:TorchEager", "PyTorch on the CPU, for comparison"),
))  # fmt: skip
RUNTIME_PACKAGES = {  # names of distributions, besides those of the default install
    "litert": ("ai-edge-litert", "litert-torch"),
    "ncnn": ("ncnn", "pnnx"),
    "openvino": ("openvino",),
}


INSTALL = {
    "ai_edge_litert": "pip install 'ai-edge-litert>=2.3'",
    "cryptography": "pip install 'cryptography>=43'",
    "fsspec": "pip install 'fsspec>=2025.3'",
    "litert_torch": "pip install 'litert-torch>=0.10'",
    "ncnn": "pip install 'ncnn>=1.0.20250503'",
    "optuna": "pip install 'optuna>=5.0'",
    "openvino": "pip install 'openvino>=2025.0'",
    "pnnx": "pip install 'pnnx>=20250530'",
    "pycocotools": "pip install 'pycocotools>=2.0.7'",
    "ray": "pip install 'ray>=2.40'",
    "s3fs": "pip install 's3fs>=2025.3'",
    "tensorboard": "pip install 'tensorboard>=2.18'",
    "timm": "pip install 'timm>=1.0.20'",
    "torchmetrics": "pip install 'torchmetrics>=1.6'",
}
DETECTION = ("torchmetrics", "pycocotools")


def require_packages(names: Iterable[str], what: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: Import names of the packages.
        what: Subject of the message, such as "The task detection".

    Raises:
        PackageMissing: A package is not installed.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise missing_package(missing, what)


def missing_package(names: Iterable[str], what: str) -> PackageMissing:
    """Return the error for packages that are not installed; its hint is the command that installs them."""
    names = list(names)
    are = "packages {}, which are" if len(names) > 1 else "package {}, which is"
    hint = "; ".join(INSTALL.get(name, f"pip install {name}") for name in names)
    return PackageMissing(f"{what} needs the {are.format(' and '.join(names))} not installed.", hint=hint)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a package without a specification
        return False
