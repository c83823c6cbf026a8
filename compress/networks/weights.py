"""Files of weights: reading them as data, and loading them into a network.

Supported files are safetensors, torch checkpoints that `weights_only=True` accepts, TorchScript archives and
torch.export programs; no code in them runs. A state dict may be nested in a checkpoint under the usual names. A moving
average is preferred to the weights themselves, since training measured the average.

Stored weights are converted to the dtypes of the network where that is sound; others are refused by name:

    float16, bfloat16 -> float32   exact, noted
    float64 -> float32             rounded, warned about
    integers -> buffers            only where no value changes
    anything else                  refused: integers as parameters, complex numbers, 8-bit floats, meta tensors
"""

import pickle  # noqa: TID251 - for the exception that torch raises; nothing is loaded with it
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.errors import ArtifactError, NonFinite, translated
from compress.networks.torch_archives import read_archive

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COUNTER = "num_batches_tracked"  # averaged by some tools; read in training only
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Conversion:
    """Conversion of stored weights of one type.

    Attributes:
        text: Sentence on the conversion, for the user.
        is_exact: Whether all values are unchanged.
    """

    text: str
    is_exact: bool


def convert_weights(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], buffers: Collection[str], source: str
) -> tuple[dict[str, Tensor], list[Conversion]]:
    """Return weights in the dtypes of a network, and the conversions made.

    Args:
        state: Name -> tensor, with the names and shapes of `expected`.
        expected: Name -> tensor of the network.
        buffers: Names of the network's buffers.
        source: Origin of the weights, as the beginning of a message.

    Raises:
        ArtifactError: A tensor has a dtype that cannot be converted; the message names the tensor.
    """
    refused = {name: why for name, value in state.items() if (why := _unfit(name, value, expected[name], buffers))}
    if refused:
        shown = ", ".join(f"{name} {why}" for name, why in list(refused.items())[:_SHOWN])
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ArtifactError(
            f"{source} must hold weights of the network's types, got {shown}{more}.",
            hint="Save the network's own state_dict() in floating point; weights of few bits need their scales.",
        )
    found = {name: value.to(expected[name].dtype) for name, value in state.items()}
    return found, _conversions(state, found, source)


def _unfit(name: str, value: Tensor, wanted: Tensor, buffers: Collection[str]) -> str:
    """Return the fault of a tensor's dtype; "" if there is no fault."""
    said = f"{_name(value.dtype)} instead of {_name(wanted.dtype)}"
    if value.is_meta:
        return "on the meta device, without values"
    if value.dtype == wanted.dtype and value.dtype in (*_FLOATS, *_WHOLE, torch.complex64, torch.complex128):
        return ""
    if value.dtype in _FLOATS and wanted.dtype in _FLOATS:
        beyond = value.isfinite() & ~value.to(wanted.dtype).isfinite()
        return f"{said} with values beyond its range" if bool(beyond.any()) else ""
    if value.dtype not in (*_FLOATS, *_WHOLE) or name not in buffers:
        return said
    is_same = bool((value.to(wanted.dtype).to(value.dtype) == value).all())
    return "" if is_same or name.endswith(_COUNTER) else said


def _conversions(before: Mapping[str, Tensor], after: Mapping[str, Tensor], source: str) -> list[Conversion]:
    pairs: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, value in before.items():
        if value.dtype != after[name].dtype and not name.endswith(_COUNTER):
            pairs.setdefault((value.dtype, after[name].dtype), []).append(name)
    return [_conversion(before, after, names, source) for names in pairs.values()]


def _conversion(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: list[str], source: str) -> Conversion:
    lost = max(_relative_change(before[name], after[name]) for name in names)
    old, new = _name(before[names[0]].dtype), _name(after[names[0]].dtype)
    done = (
        f"{source}: {len(names)} tensor{'' if len(names) == 1 else 's'} ({names[0]}{' ...' if len(names) > 1 else ''})"
    )
    if lost == 0:
        return Conversion(f"{done} converted from {old} to {new}; every value is the same.", True)
    return Conversion(
        f"{done} rounded from {old} to {new}, by up to {lost:.1g} of the largest value of a tensor.", False
    )


def _relative_change(before: Tensor, after: Tensor) -> float:
    """Return the largest change of any value over the largest value."""
    if before.numel() == 0:
        return 0.0
    wide = before.to(torch.float64)
    change = (wide - after.to(torch.float64)).abs().max()
    return float(change / wide.abs().max()) if bool(change > 0) else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "module_ema", "shadow")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
COUNTERS = ("n_averaged",)  # beside the weights in torch's AveragedModel
_DEEPEST = 4
_OTHER_NETWORK = "Check model.factory and model.kwargs, such as the number of classes or the depth."
_FORMATS = (
    "Whole files are read of these formats: safetensors, torch.save of a state dict, TorchScript, torch.export. Copy "
    "the file again if it was cut short."
)
_LEFT_OVER = (
    "All weights of the network are in the file. The others belong to something else, such as a loss or a "
    "second network: save the file without it."
)


def read_weights(path: Path, expected: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a state dict without running any code in its file.

    Args:
        path: File of weights.
        expected: Names in the network's state dict; if empty, only DataParallel's prefix is stripped.

    Returns:
        Name -> tensor. A common prefix of the names is stripped if more of them are then in `expected`.

    Raises:
        ArtifactError: The file is missing or corrupt, cannot be read without running code, or holds no state dict.
    """
    if not path.is_file():
        raise ArtifactError(f"Weights file '{path}' does not exist.")
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"'{path}' must be a safetensors file: {error}", hint=_FORMATS) from error
    else:
        archive = read_archive(path)
        state = _unwrap(_read_checkpoint(path), path) if archive is None else archive
    return fit_prefix(state, expected)


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a network's parameters and buffers as safetensors.

    Raises:
        OSError: The file cannot be written; safetensors' own writer raises an error of another type.
    """
    # clones, because safetensors refuses tensors that share memory
    path.write_bytes(save({name: value.clone().contiguous() for name, value in module.state_dict().items()}))


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = _OTHER_NETWORK
) -> list[Conversion]:
    """Load weights whose keys and shapes must all match, and return the conversions of their dtypes.

    Args:
        module: The network; changed in place.
        state: Name -> tensor.
        source: Origin of the weights, as the subject of a message.
        hint: Hint in the error if the weights belong to another network.

    Raises:
        ArtifactError: Keys are missing, unexpected, of another shape or of an unfit dtype; the message names them.
        NonFinite: A weight is NaN or infinite.
    """
    expected, state = _expected(module), _saved(module, state)
    missing, unexpected = _other_names(expected, state)
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    _raise_unfit(source, missing, unexpected, shapes, hint)
    counters = set(expected) - set(state)
    buffers = {name for name, _ in module.named_buffers()}
    state, conversions = convert_weights(state, expected, buffers, source)
    _check_shared(module, state, source)
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise NonFinite(f"{source} must be finite, NaN or infinity in {some(broken)}.")
    module.load_state_dict({**{name: expected[name] for name in counters}, **state})
    return conversions


def check_names(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ArtifactError if a state dict lacks weights or has unexpected ones; shapes are not checked."""
    missing, unexpected = _other_names(_expected(module), _saved(module, state))
    _raise_unfit(source, missing, unexpected, [], _OTHER_NETWORK)


def _expected(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _saved(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without non-persistent buffers of the network, which TorchScript saves as well."""
    unsaved = {name for name, _ in module.named_buffers()} - set(_expected(module))
    return {name: value for name, value in state.items() if name not in unsaved}


def _other_names(expected: Collection[str], state: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the missing names of a state dict, other than batch counters, and its unexpected names."""
    missing = [name for name in set(expected) - set(state) if not name.endswith("num_batches_tracked")]
    return sorted(missing), sorted(set(state) - set(expected))


def _raise_unfit(source: str, missing: list[str], unexpected: list[str], shapes: list[str], hint: str) -> None:
    problems = [
        f"{kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if names
    ]
    if problems:
        raise ArtifactError(
            f"{source} must fit the network exactly; {'; '.join(problems)}.",
            hint=_LEFT_OVER if unexpected and not missing and not shapes else hint,
        )


def _check_shared(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ArtifactError if the file has two values for a parameter that layers share."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        is_twice = other != name and name in state and other in state
        if is_twice and not torch.equal(state[name], state[other]):
            raise ArtifactError(
                f"{source} has two values for one parameter that layers of the network share: {other} and {name}.",
                hint="Let the factory tie the weights only if the network was trained so.",
            )


def fit_prefix(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the prefix that DataParallel, torch.compile or Lightning put before the names.

    The chosen prefix covers most of the expected names. Entries without it keep their names, so that `load_strict`
    refuses them by name.

    Args:
        state: Name -> tensor.
        expected: Names in the network's state dict; () if they are not known.

    >>> one = torch.ones(1)
    >>> list(fit_prefix({"module._orig_mod.a": one, "module._orig_mod.b": one}, ["a", "b"]))
    ['a', 'b']
    >>> list(fit_prefix({"head.a": one}, ["head.a"])), list(fit_prefix({"model.a": one}, ["c"]))
    (['head.a'], ['model.a'])
    >>> list(fit_prefix({"model.a": one, "criterion.weight": one}, ["a"]))
    ['a', 'criterion.weight']
    """
    if not expected:
        prefixed = all(name.startswith("module.") for name in state)
        return {name.removeprefix("module.") if prefixed else name: value for name, value in state.items()}
    names = set(expected)
    found = Counter(prefix for name in state for prefix in _prefixes(name) if name[len(prefix) :] in names)
    most = max(found.values(), default=0)
    if most <= len(names & set(state)):
        return dict(state)
    best = min((prefix for prefix, matches in found.items() if matches == most), key=_rank)
    stripped = {name.removeprefix(best): value for name, value in state.items()}
    return stripped if len(stripped) == len(state) else dict(state)


def _rank(prefix: str) -> tuple[bool, int]:
    """Return the sort key of prefixes with equally many matches: averages first, then short ones."""
    return not set(prefix.split(".")) & set(AVERAGES), len(prefix)


def _prefixes(name: str) -> Iterator[str]:
    """Yield all prefixes of a name that end with a dot."""
    for place in re.finditer(r"\.", name):
        yield name[: place.end()]


def _read_checkpoint(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise ArtifactError(f"Weights file '{path}' is empty.", hint=_FORMATS)

    def refused(error: Exception) -> ArtifactError:
        if not isinstance(error, pickle.UnpicklingError):  # torch raises many types, down to AssertionError
            return ArtifactError(
                f"Weights file '{path}' is no readable torch checkpoint, got {type(error).__name__}: "
                f"{first_sentence(error)}",
                hint=_FORMATS,
            )
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        return ArtifactError(
            f"Weights file '{path}' was refused: it is not a plain state dict, reading it could run code"
            f"{f' ({culprit[1]})' if culprit else ''}.",
            hint=_extraction(path, culprit[1] if culprit else ""),
        )

    with translated(refused), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about odd pickles, which are an error here or harmless
        return torch.load(path, weights_only=True, map_location="cpu")


_NO_CLASSES = ("__builtin__", "_io", "builtins", "io", "nt", "os", "posix", "runpy", "shutil", "subprocess", "sys")


def _extraction(path: Path, culprit: str) -> str:
    """Return the hint for a file that would run code; for a pickled module, lines that extract its state dict."""
    if culprit.partition(".")[0] in ("", *_NO_CLASSES):
        return "Save `model.state_dict()` with safetensors or torch.save and give that file."
    target = path.with_name(f"{path.stem}_state.pt").name
    if culprit.startswith("ultralytics"):
        lines = ("from ultralytics import YOLO", f'model = YOLO("{path.name}").model.float()')
    else:
        lines = ("import torch", f'model = torch.load("{path.name}", weights_only=False)')
    save = f'torch.save(model.state_dict(), "{target}")'
    more = "" if lines[0] == "import torch" else "import torch\n  "
    return (
        f"Extract the weights where you trust the file, and give {target}:\n  {more}{lines[0]}\n  {lines[1]}\n  {save}"
    )


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        found = [key for key in (*AVERAGES, *WRAPPERS) if isinstance(loaded, Mapping) and _is_filled(loaded.get(key))]
        if not found:
            break
        loaded = loaded[found[0]]
    if isinstance(loaded, Mapping):
        loaded = {key: value for key, value in loaded.items() if key not in COUNTERS}
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ArtifactError(
            f"'{path}' must hold a state dict (names to tensors), it holds {_contents(loaded)}.",
            hint=f"A state dict may be nested under one of {', '.join((*AVERAGES, *WRAPPERS))}.",
        )
    for what, is_so in (
        ("dense", lambda v: v.layout == torch.strided),
        ("not quantised", lambda v: not v.is_quantized),
        ("not nested", lambda v: not v.is_nested),
    ):
        if odd := [str(name) for name, value in loaded.items() if not is_so(value)]:
            raise ArtifactError(f"The tensors in '{path}' must be {what}, {some(odd)} is not.")
    return {str(name): value for name, value in loaded.items()}


def _contents(loaded: Any) -> str:
    """Describe an object that is no state dict."""
    if not isinstance(loaded, Mapping):
        return f"an object of type {type(loaded).__name__}"
    odd = [f"{name} ({type(value).__name__})" for name, value in loaded.items() if not isinstance(value, Tensor)]
    return f"{some(odd)} besides {len(loaded) - len(odd)} tensors" if odd else "no entries"


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def some(names: list[str], count: int = 4) -> str:
    """Return the first names, and the number of further ones."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
