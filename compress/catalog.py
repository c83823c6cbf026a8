"""How does a name become an object, without importing what nobody asked for?

Which built-in criteria, stages, runtimes and data set kinds are there? Names only; nothing heavy is imported.

Packages that only some pipelines need, and how to install them.

Hints name these packages, never this program's extras: its name on the package index is somebody else's.
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
    """Names of one kind of thing; an entry is an object or the place ("module:attribute") to import it from.

    Args:
        kind: What the entries are, for messages: "criterion", "runtime".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}
        self._summaries: dict[str, str] = {}

    def declare(self, name: str, place: str, summary: str = "") -> None:
        """Say where `name` is imported from once somebody asks for it, and in one line what it is.

        Raises:
            InternalError: The name is taken.
        """
        self._add(name, place)
        self._summaries[name] = summary

    def register(self, name: str, entry: T, summary: str = "") -> None:
        """Add an object under `name`, with one line that says what it is; for plug-ins.

        Raises:
            InternalError: The name is taken.
        """
        self._add(name, entry)
        self._summaries[name] = summary

    def summary(self, name: str) -> str:
        """Return the line that says what `name` is, or ""; imports nothing."""
        return self._summaries.get(name, "")

    def get(self, name: str) -> T:
        """Return the object called `name`, importing it if need be.

        Raises:
            UnknownName: There is none; names the choices and the closest match.
        """
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry  # type: ignore[return-value]

    def check(self, name: str) -> None:
        """Raise UnknownName unless `name` is registered; imports nothing."""
        if name not in self._entries:
            raise UnknownName(f"{self.kind} must be one of {', '.join(self)}, got '{name}'.", hint=closest(name, self))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, name: str, entry: T | str) -> None:
        if name in self._entries:
            raise InternalError(f"{self.kind} '{name}' is registered twice.")
        self._entries[name] = entry


def closest(name: str, choices: Registry[T] | list[str]) -> str | None:
    """Return "did you mean 'x'?" for the closest choice, or None when nothing is close."""
    matches = get_close_matches(name, list(choices), n=1, cutoff=0.51)
    return f"did you mean '{matches[0]}'?" if matches else None


NOTHING, TORCH_MODEL, ONNX_MODEL, VERDICT = "nothing", "TorchModel", "OnnxModel", "Verdict"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """What the planner must know of a stage before it is imported.

    Attributes:
        name: As in the pipeline file.
        place: "module:Class" of the implementation.
        version: Raised when the stage's results change for the same input; part of the cache key.
        consumes: Kind of artifact it needs.
        produces: Kind of artifact it yields.
        uses_data: Whether its result depends on the images.
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
        StageEntry("prune", "compress.stages.prune:PruneStage", 11, TORCH_MODEL, TORCH_MODEL, True,
                   "remove channels and residual blocks down to a budget"),
        StageEntry("slim", "compress.stages.slim:SlimStage", 9, TORCH_MODEL, TORCH_MODEL, True,
                   "remove channels and blocks and factorise layers under one budget"),
        StageEntry("low_rank", "compress.stages.low_rank:LowRankStage", 7, TORCH_MODEL, TORCH_MODEL, True,
                   "replace kernels by products of smaller ones"),
        StageEntry("finetune", "compress.stages.finetune:FinetuneStage", 9, TORCH_MODEL, TORCH_MODEL, True,
                   "train the slim network, best epoch chosen on validation"),
        StageEntry("export", "compress.stages.export:ExportStage", 4, TORCH_MODEL, ONNX_MODEL, True,
                   "write and check the ONNX file"),
        StageEntry("quantize", "compress.stages.quantize:QuantizeStage", 1, ONNX_MODEL, ONNX_MODEL, True,
                   "round the ONNX file to INT8, ranges from calibration images"),
        StageEntry("verify", "compress.stages.verify:VerifyStage", 5, ONNX_MODEL, VERDICT, True,
                   "measure the file in its runtime and hold it to the gates"),
    )
}  # fmt: skip

NOMINAL = "nominal"  # images as they are
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
    "arrays": ".npz or .npy arrays: uint8 (N, H, W, C) images; integer labels, masks or numbers",
    "coco": "pictures, and boxes in a JSON file of the COCO form",
    "folder": "one sub-folder of image files for each class",
    "idx": "a pair of IDX files (the MNIST format), plain or .gz",
    "masks": "pictures, and a PNG of class indices for each",
    "own": "a data set class of your own",
    "torchvision": "any torchvision classification data set by its class name",
    "unlabelled": "a folder of pictures, or an array of images, without labels",
    "yolo": "pictures, and boxes in one .txt file for each",
}

NETWORKS: dict[str, str] = {
    "factory": '"pkg.module:callable" or "file.py:callable" of your own, which returns a torch.nn.Module',
    "onnx": "an ONNX file, weights and all",
    "timm": "a network of timm by its name (pip install timm)",
    "torchvision": "a network of torchvision by its name: classification, segmentation, single-stage detection",
}

TASKS: Registry[Any] = Registry("task")
TASKS.declare(
    "classification", "compress.tasks.classification:Classification", "one of K classes for each image; top-1"
)
TASKS.declare("segmentation", "compress.tasks.segmentation:Segmentation", "one of K classes for each pixel; mIoU")
TASKS.declare("detection", "compress.tasks.detection:Detection", "boxes, by a postprocess of your own; mAP")
TASKS.declare("regression", "compress.tasks.regression:Regression", "numbers for each image; RMSE")
TASKS.declare(
    "embedding",
    "compress.tasks.imitation:Embedding",
    "outputs that must stay where they were",
)

# what gates may name: kind of limit -> figures. What is harder is looked at with the figure that
# decides.
HARDER = ("noise", "corruptions", "shifted")
_OF_IMITATION = {"max_drop": ("cosine",), "max_rise": ("distance",), "min": ("cosine",), "max": ("distance",)}
_NO_LIMITS: dict[str, tuple[str, ...]] = {"max_drop": (), "max_rise": (), "min": (), "max": ()}
GATED: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "max_drop": ("top1", "top5", "worst_class", *HARDER, "worst_distribution"),
        "max_rise": ("calibration_error", "excess_error"),
        "min": ("top1", "top5", "worst_class", *HARDER),
        "max": ("calibration_error", "churn", "softmax_distance"),
    },
    "segmentation": {
        **_NO_LIMITS,
        "max_drop": ("miou", "pixel_accuracy", *HARDER, "worst_distribution"),
        "min": ("miou", "pixel_accuracy", *HARDER),
    },
    "detection": {
        **_NO_LIMITS,
        "max_drop": ("map", "map50", "map75", *HARDER, "worst_distribution"),
        "min": ("map", "map50", "map75", *HARDER),
    },
    "regression": {
        **_NO_LIMITS,
        "max_rise": ("rmse", "mae", *HARDER, "worst_distribution"),
        "max": ("rmse", "mae", *HARDER),
    },
    "embedding": {
        **_OF_IMITATION,
        "max_rise": ("distance", *HARDER, "worst_distribution"),
        "max": ("distance", *HARDER),
    },
}
# of a network that is measured without labels, beside what its task names
GATED_WITHOUT_LABELS: dict[str, tuple[str, ...]] = {
    "max_drop": ("agreement", "cosine"),
    "max_rise": ("distance",),
    "min": ("agreement", "cosine"),
    "max": ("distance",),
}
SHARES = {
    "top1", "top5", "worst_class", "noise", "corruptions", "shifted", "worst_distribution", "calibration_error",
    "excess_error", "churn", "miou", "pixel_accuracy", "map", "map50", "map75", "agreement",
}  # fmt: skip

CRITERIA: Registry[Any] = Registry("criterion")
CRITERIA.declare(
    "l1", "compress.pruning.criteria.magnitude:L1", "sum of absolute weights of the filters that produce a channel"
)
CRITERIA.declare("l2", "compress.pruning.criteria.magnitude:L2", "euclidean norm of the filters that produce a channel")
CRITERIA.declare(
    "bn_scale", "compress.pruning.criteria.magnitude:BnScale", "absolute scale of the batch norms behind a channel"
)
CRITERIA.declare(
    "taylor", "compress.pruning.criteria.taylor:Taylor", "estimated change of the loss when a channel is gated off"
)
CRITERIA.declare(
    "reconstruction",
    "compress.pruning.criteria.reconstruction:Reconstruction",
    "taylor for the widths; the channels that refitted readers miss least go first",
)
CRITERIA.declare(
    "greedy",
    "compress.pruning.criteria.reconstruction:Greedy",
    "greedy forward selection: channels that imitate their readers' outputs best enter first; no labels",
)
CRITERIA.declare(
    "greedy_refit",
    "compress.pruning.criteria.reconstruction:GreedyRefit",
    "forward selection with refitted readers at each step, for strong compression; no labels",
)
CRITERIA.declare(
    "greedy_loss",
    "compress.pruning.criteria.greedy_loss:GreedyLoss",
    "forward selection by the loss of the network, for small networks",
)
CRITERIA.declare(
    "lasso", "compress.pruning.criteria.reconstruction:Lasso", "LASSO path over the channels of each reader; no labels"
)
CRITERIA.declare(
    "grasp",
    "compress.pruning.criteria.gradient_flow:Grasp",
    "derivative of the gradient norm by a mask of each channel",
)
CRITERIA.declare(
    "snip",
    "compress.pruning.criteria.gradient_flow:Snip",
    "connection sensitivity: taylor with one gradient of all images",
)
CRITERIA.declare(
    "pfp", "compress.pruning.criteria.pfp:Pfp", "largest share of a channel in an output of its readers; no labels"
)
CRITERIA.declare(
    "sipp", "compress.pruning.criteria.pfp:Sipp", "pfp with the mean over positions in place of the largest; no labels"
)
CRITERIA.declare("random", "compress.pruning.criteria.magnitude:Random", "seeded random numbers, to compare with")
for _name, _class, _summary in (
    ("tp_magnitude", "TpMagnitude", "squared weights, mean over the layers of the group"),
    ("tp_fpgm", "TpFpgm", "distance to the other channels of the group"),
    ("tp_lamp", "TpLamp", "tp_magnitude over the sum of all scores that are not smaller"),
    ("tp_taylor", "TpTaylor", "|weight * gradient|, summed, mean over the layers"),
    ("tp_hessian", "TpHessian", "weight^2 * mean squared gradient, summed, mean over the layers"),
    ("tp_bn_scale", "TpBnScale", "absolute scales, mean over the batch norms of the group"),
    ("tp_random", "TpRandom", "seeded random numbers"),
):
    CRITERIA.declare(_name, f"compress.pruning.criteria.torch_pruning:{_class}", f"torch-pruning: {_summary}")

WITHOUT_ERRORS = frozenset(  # order by scores: no errors of readers, no losses
    {"l1", "l2", "bn_scale", "taylor", "grasp", "snip", "pfp", "sipp", "random", "tp_magnitude", "tp_fpgm", "tp_lamp",
     "tp_taylor", "tp_hessian", "tp_bn_scale", "tp_random"}
)  # fmt: skip
WITH_ERRORS = ("greedy", "greedy_refit", "greedy_loss", "lasso", "reconstruction")

METHODS: Registry[Any] = Registry("method")
METHODS.declare(
    "gsm", "compress.pruning.methods.gsm:Gsm", "train on the channels that matter most, the others decay by themselves"
)
METHODS.declare(
    "gates", "compress.pruning.methods.gates:Gates", "learn how many channels of each group go, and which blocks"
)
METHODS.declare("greg", "compress.pruning.methods.greg:Greg", "a penalty on what goes that grows step by step")
METHODS.declare(
    "increg", "compress.pruning.methods.increg:IncReg", "penalties that rise and fall with a channel's rank"
)
METHODS.declare("csgd", "compress.pruning.methods.csgd:Csgd", "draw alike channels together until they can be merged")
METHODS.declare(
    "grda", "compress.pruning.methods.grda:Grda", "a growing threshold on batch-norm scales until the zeros are enough"
)
METHODS.declare(
    "regrow",
    "compress.pruning.methods.regrow:Regrow",
    "train masked; at every choice some channels come back at random",
)
METHODS.declare("tpp", "compress.pruning.methods.tpp:Tpp", "greg, with removed filters decorrelated from kept ones")

RANKS: dict[str, tuple[str, str]] = {  # name -> setting of `low_rank` that takes it, what it does
    "nc": ("schemes", "kh x kw convolution C -> r, then 1 x 1 convolution r -> N"),
    "nc2": ("schemes", "nc with the input channels in 2 groups, each of rank r"),
    "nc4": ("schemes", "nc with the input channels in 4 groups, each of rank r"),
    "vh": ("schemes", "kh x 1 convolution C -> r, then 1 x kw convolution r -> N"),
    "tucker2": ("schemes", "1 x 1 convolution, kh x kw convolution between two ranks, 1 x 1 convolution"),
    "svd": ("schemes", "two 1 x 1 convolutions or two linear layers"),
    "shared_error": ("allocation", "one relative error for all layers, solved from the budget"),
    "alds": ("allocation", "smallest bound of the residuals' operator norms; chooses groups and ranks together"),
    "energy": ("allocation", "per layer retained energy against cost, the price of cost solved from the budget"),
    "trp": ("method", "train with kernels cut to low rank again and again"),
}

RUNTIMES: Registry[Any] = Registry("runtime")
RUNTIMES.declare(
    "onnxruntime",
    "compress.verification.runtimes.onnxruntime:OnnxRuntime",
    "ONNX Runtime with any of its execution providers",
)
RUNTIMES.declare(
    "onnx_reference",
    "compress.verification.runtimes.onnx_reference:OnnxReference",
    "the ONNX standard's own evaluator on the CPU, slow: a second opinion on tiny networks",
)
RUNTIMES.declare(
    "torch_eager", "compress.verification.runtimes.torch_eager:TorchEager", "torch on the CPU, to compare with"
)


INSTALL = {
    "cryptography": "pip install 'cryptography>=43'",
    "pycocotools": "pip install 'pycocotools>=2.0.7'",
    "tensorboard": "pip install 'tensorboard>=2.18'",
    "timm": "pip install 'timm>=1.0.20'",
    "torchmetrics": "pip install 'torchmetrics>=1.6'",
}
DETECTION = ("torchmetrics", "pycocotools")


def require_packages(names: Iterable[str], what: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: Names that are imported.
        what: It is that needs them, for the message.

    Raises:
        PackageMissing: One is not.
    """
    missing = [name for name in names if not _is_there(name)]
    if missing:
        raise missing_package(missing, what)


def missing_package(names: Iterable[str], what: str) -> PackageMissing:
    """Return the error that says so, with the lines that install them."""
    names = list(names)
    are = "packages {}, which are" if len(names) > 1 else "package {}, which is"
    hint = "; ".join(INSTALL.get(name, f"pip install {name}") for name in names)
    return PackageMissing(f"{what} needs the {are.format(' and '.join(names))} not installed.", hint=hint)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a package that hides itself
        return False
