"""Does one network go all the way? Load, inspect, cut to shares of its MACs, compare, export, compare again.

    python benchmarks/support_trial.py '{"set": "torchvision", "name": "resnet18", ...}'

prints what is known as soon as it is known, one line of JSON after the other; the last line has everything.

    compare    the slim network equals the original with the removed channels masked, in float64
    parity     the slim network's ONNX file equals it, in ONNX Runtime
    reload     the network built anew, with the recipe replayed and the saved weights loaded, equals the slim one

A failure is "refused" if the package itself said so, by an error of its own.
"""

import copy
import json
import os
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support_networks import Entry, build, build_from_library, entry_of
from torch import Tensor, nn

from compress.allocation.problem import Budget, from_widths
from compress.allocation.widths import width_levels
from compress.catalog import CRITERIA
from compress.checkpoint.rebuild import apply_edits, load_strict, read_weights, write_weights
from compress.cost.macs import count_macs
from compress.errors import BudgetUnreachable, CompressError, InternalError, ModelError, UnsupportedLayer
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.inspection.least_latency import random_inputs
from compress.inspection.potential import Potential, find_potential
from compress.inspection.targets import CUT_LIMITS, vary_weights
from compress.model.adapter import flatten_outputs
from compress.model.artifacts import FactorySpec, Signature
from compress.model.recipe import Recipe, RemoveChannels
from compress.networks.wiring import signature_of
from compress.onnx_file.counting import count_onnx
from compress.progress import SilentProgress
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.selection import find_candidates, score_groups, select_channels
from compress.pruning.surgery import remove_channels
from compress.pruning.trial import masked_copy
from compress.pruning.width_costs import build_cost
from compress.search.export import OPSET
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.runtimes.torch_eager import TorchEager

SHARES = (0.7, 0.4)
CRITERION = "l2"
CUT_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output
PARITY_LIMIT = 1e-4  # of the largest output
RELOAD_LIMIT = 1e-6  # of the largest output
LEAST_EFFECT = 1e-3  # what silencing channels must change of the outputs, for the comparison to say anything

Record = dict[str, Any]
Groups = Mapping[str, ChannelGroup]


class Trial:
    """The steps of one network, each timed; told to `say` before and after.

    Args:
        say: Is given what is known.

    Attributes:
        spec: Specification of the network: its inputs and the outputs to keep.
        record: What is known.
    """

    def __init__(self, say: Callable[[Record], None] = lambda _: None) -> None:
        self.say = say
        self.spec = FactorySpec("factory", "support_trial:slim")
        self.record: Record = {"seconds": {}, "cuts": [], "failures": []}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        self.say({"step": name})
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.fail(name, error)
            raise Stopped from error
        finally:
            seconds = self.record["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 2)
            self.record["peak_memory_mb"] = peak_memory_mb()
            self.say(self.record)

    def fail(self, step: str, reason: Exception | str) -> None:
        """Add a failure."""
        failure: Record = {"step": step, "reason": _reason(reason)}
        if isinstance(reason, CompressError) and not isinstance(reason, WrongResult | InternalError):
            failure |= {"refused": True, **({"hint": reason.hint} if reason.hint else {})}
        self.record["failures"].append(failure)


Make = Callable[[Trial], tuple[nn.Module, Tensor]]


class WrongResult(ModelError):
    """A check of this file has failed: the package did something wrong, or the comparison says nothing."""


class Stopped(Exception):
    """A step has failed, and those after it need what it would have given."""


def try_network(entry: Entry, say: Callable[[Record], None] = lambda _: None) -> Record:
    """Take a network of the lists through all steps.

    Args:
        entry: Which.
        say: Is given what is known after each step.

    Returns:
        As `try_module`.
    """

    def make(trial: Trial) -> tuple[nn.Module, Tensor]:
        if entry.factory is not None:
            module, trial.spec, example = build_from_library(entry)
            trial.record |= {"input": list(entry.size or ()), "own_input": None}
            vary_weights(module, example)
            _amplify(module, example.shape[1:])
            return module, example
        module, shape, own = build(entry)
        trial.record |= {"input": list(shape), "own_input": None if own is None else list(own)}
        example = torch.zeros([1, *shape])
        if entry.set != "onnx":  # files have weights that somebody trained
            vary_weights(module, example)
        return module, example

    return try_module(make, SHARES, say, SHARES if entry.factory is None else SHARES[-1:])


def try_module(
    make: Make,
    shares: Sequence[float] = SHARES,
    say: Callable[[Record], None] = lambda _: None,
    exported: Sequence[float] | None = None,
) -> Record:
    """Take a network through all steps.

    Args:
        make: Returns the network and one input, (1, ...).
        shares: Of its MACs, to each of which it is cut.
        say: Is given what is known after each step.
        exported: Shares at which the slim network is exported and reloaded, too; all by default.

    Returns:
        Its figures, the seconds of each step, peak memory, and what failed; it has passed when nothing has.
    """
    trial = Trial(say)
    try:
        with trial.step("load"):
            module, example = make(trial)
            _require_telling(module, example.shape[1:])
        potential, groups = _inspect(module, example, trial)
        for share in shares:
            slim, removed = _cut(module, example, potential, groups, share, trial)
            if exported is None or share in exported:
                _export(slim, example, trial)
                _reload(make, slim, removed, example, trial)
    except Stopped:
        pass
    return trial.record


@torch.no_grad()
def _amplify(module: nn.Module, shape: Sequence[int]) -> None:
    """Double kernels, twice at most, while outputs hardly depend on the input: networks without norms fade out."""
    for _ in range(2):
        if _spread(module, shape) > LEAST_EFFECT:
            return
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter *= 2


@torch.no_grad()
def _spread(module: nn.Module, shape: Sequence[int]) -> float:
    """Return how much outputs differ from input to input; infinity if one is not finite."""
    generator = torch.Generator().manual_seed(1)
    first, second = (_tensors(module(torch.randn([2, *shape], generator=generator))) for _ in range(2))
    if not all(bool(output.isfinite().all()) for output in first):
        return float("inf")
    return _distance(first, second)


def _require_telling(module: nn.Module, shape: Sequence[int]) -> None:
    """Raise WrongResult unless the outputs are finite and differ from image to image."""
    spread = _spread(module, shape)
    if spread == float("inf"):
        raise WrongResult("The outputs must be finite, got NaN or infinity with varied weights.")
    if not spread > LEAST_EFFECT:
        raise WrongResult("The outputs must depend on the images, they hardly do with varied weights.")


def _inspect(module: nn.Module, example: Tensor, trial: Trial) -> tuple[Potential, Groups]:
    with trial.step("inspect"):
        potential, groups = find_potential(module, example, CUT_LIMITS, SilentProgress())
        trial.record |= {
            "macs": potential.macs,
            "params": potential.params,
            "groups": len(potential.groups),
            "blocks": len(potential.blocks),
            "least_share": potential.least_share,
            "fixed_share": potential.fixed_share,
            "uncut": dict(Counter(item.reason for item in potential.uncut)),
        }
        if not groups:
            raise UnsupportedLayer("No prunable channel group found.")
    return potential, groups


def _cut(
    module: nn.Module, example: Tensor, potential: Potential, groups: Groups, share: float, trial: Trial
) -> tuple[nn.Module, RemoveChannels]:
    cut: Record = {"asked": share}
    trial.record["cuts"].append(cut)
    with trial.step("cut"):
        try:
            removed = choose(module, example, groups, share)
        except BudgetUnreachable as error:  # what can be reached is cut and compared all the same
            trial.fail("cut", error)
            removed = _least(potential, groups)
        edit = RemoveChannels(removed)
        slim = remove_channels(module, edit, example)
        cut["reached"] = count_macs(slim, example) / potential.macs
    with trial.step("compare"):
        _compare(module, slim, removed, groups, example.shape[1:], cut)
    return slim, edit


def _export(slim: nn.Module, example: Tensor, trial: Trial) -> None:
    cut = trial.record["cuts"][-1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim.onnx"
        with trial.step("export"):
            signature = signature_of(slim, trial.spec, example)
            export_onnx(slim, signature, path, ExportSettings(opset=OPSET))
            cut["file_macs"] = count_onnx(path).macs
        with trial.step("parity"):
            inputs = random_inputs(signature, batch=3)
            with OnnxRuntime(path) as file, TorchEager(slim, signature) as reference:
                got, wanted = file.run(inputs), reference.run(inputs)
            pairs = [[torch.from_numpy(one[spec.name]) for spec in signature.outputs] for one in (got, wanted)]
            cut["parity"] = _distance(*pairs)
            if not cut["parity"] <= PARITY_LIMIT:
                raise WrongResult(
                    f"ONNX output differs from PyTorch by {cut['parity']:.1e} of the largest output (limit "
                    f"{PARITY_LIMIT:.0e}){_rounding(slim, signature, inputs, pairs)}."
                )


def _rounding(
    slim: nn.Module, signature: Signature, inputs: Mapping[str, np.ndarray], pairs: Sequence[Sequence[Tensor]]
) -> str:
    """Return how far the file and PyTorch are from PyTorch in float64, in words; nothing if it does not run."""
    try:
        arrays = [torch.from_numpy(inputs[spec.name]).double() for spec in signature.inputs]
        with torch.no_grad():
            wanted = _tensors(copy.deepcopy(slim).double()(*arrays))
    except (CompressError, RuntimeError):
        return ""
    file, own = (_distance(one, wanted) for one in pairs)
    return f"; in float64 the file is off by {file:.1e}, PyTorch by {own:.1e}"


@torch.no_grad()
def _reload(make: Make, slim: nn.Module, edit: RemoveChannels, example: Tensor, trial: Trial) -> None:
    with trial.step("reload"), tempfile.TemporaryDirectory() as folder:
        weights, text = Path(folder) / "slim.safetensors", Recipe((edit,)).to_json()
        write_weights(slim, weights)
        again = apply_edits(make(Trial())[0], Recipe.from_json(text), example)
        load_strict(again, read_weights(weights), f"'{weights.name}'")
        images = torch.randn([2, *example.shape[1:]], generator=torch.Generator().manual_seed(3))
        difference = _distance(_tensors(again(images)), _tensors(slim(images)))
        if not difference <= RELOAD_LIMIT:
            raise WrongResult(f"The reloaded network must equal the slim one, it differs by {difference:.1e} of it.")


def choose(module: nn.Module, example: Tensor, groups: Groups, share: float) -> dict[str, tuple[int, ...]]:
    """Return the channels that go for a share of the MACs to be left, as `prune` chooses them by weights alone.

    Raises:
        BudgetUnreachable: The widths that the limits allow leave more.
    """
    levels = {name: width_levels(group.width, group.parts, CUT_LIMITS) for name, group in groups.items()}
    criterion = CRITERIA.get(CRITERION)(seed=0)
    candidates = find_candidates(groups, score_groups(groups, criterion, None), levels, criterion.comparable)
    cost = build_cost(module, example, groups, "macs")
    budget = Budget("macs", from_widths(cost, levels), share * cost.full, cost.full, "the baseline's macs")
    return select_channels(groups, candidates, [budget], CUT_LIMITS, "global").removed


def _least(potential: Potential, groups: Groups) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, width in potential.least_widths.items():
        group = groups[name]
        found[name] = group.expand(range(width // group.parts, group.width // group.parts))
    return found


@torch.no_grad()
def _compare(
    module: nn.Module,
    slim: nn.Module,
    removed: Mapping[str, tuple[int, ...]],
    groups: Groups,
    shape: Sequence[int],
    cut: Record,
) -> None:
    """Compare the slim network with the original whose removed channels are masked.

    Raises:
        ModelError: They differ, or silencing changes so little that the comparison says nothing.
    """
    images = torch.randn([2, *shape], generator=torch.Generator().manual_seed(2))
    precision = torch.float64
    try:
        got = _outputs(slim, images, precision)
    except RuntimeError:  # some networks make float32 tensors of their own on the way
        precision = torch.float32
        got = _outputs(slim, images, precision)
    expected = _tensors(masked_copy(module, removed, groups).to(precision)(images.to(precision)))
    cut["difference"] = _distance(got, expected)
    cut["effect"] = _distance(_outputs(module, images, precision), expected)
    cut["precision"] = str(precision).removeprefix("torch.")
    if not cut["difference"] <= CUT_LIMIT[precision]:
        raise WrongResult(
            f"The slim network must equal the original with its channels masked, it differs by "
            f"{cut['difference']:.1e} of it."
        )
    if not cut["effect"] >= LEAST_EFFECT:
        raise WrongResult(f"Silencing channels must change the outputs, it changes {cut['effect']:.1e} of them.")


def _outputs(module: nn.Module, images: Tensor, precision: torch.dtype) -> list[Tensor]:
    return _tensors(copy.deepcopy(module).to(precision)(images.to(precision)))


def _tensors(outputs: object) -> list[Tensor]:
    return [tensor for _, tensor in flatten_outputs(outputs)]


def _distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of any output over the largest value of that output."""
    if [one.shape for one in got] != [one.shape for one in wanted]:
        raise WrongResult(f"Outputs must have the shapes {_shapes(wanted)}, got {_shapes(got)}.")
    return max(
        float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-30)
        for a, b in zip(got, wanted, strict=True)
    )


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _reason(error: Exception | str) -> str:
    if isinstance(error, CompressError):
        return error.message
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}"


def peak_memory_mb() -> int:
    """Return the most memory that this process has held, the interpreter and torch included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Read an entry, try it, print what is known."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the lines

    def say(record: Record) -> None:
        lines.write(json.dumps(record) + "\n")
        lines.flush()

    say({**try_network(entry_of(json.loads(sys.argv[1])), say), "is_done": True})


if __name__ == "__main__":
    main()
