"""Structure of a network in training mode, compared with evaluation mode.

User modules that read `self.training` may return other tensors in training mode (auxiliary heads, raw maps of a
detector), run layers that evaluation never runs, or need targets. Such modules are found one by one and stay in
evaluation mode during training. Norms, dropout and all other modules train as usual. So training covers only deployed
layers, all of which pruning handles.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.model.adapter import flatten_outputs
from compress.networks.weights import some
from compress.user_code import describe_error, is_interrupt

_SAME_WITHIN = 1e-3  # of the largest value


@dataclass(frozen=True, slots=True)
class TrainingMode:
    """Differences of a network between training mode and evaluation mode.

    Attributes:
        evaluated: Paths of the modules that stay in evaluation mode during training; "" is the network itself.
        notes: Notes for the user, a sentence each.
        returns_more: Whether training mode returns further outputs beside the kept ones.
    """

    evaluated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    returns_more: bool = False


@dataclass(frozen=True)
class _Outcome:
    """One run: its outputs by name, the parameters it used, whether it drew random numbers, and its error."""

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    is_random: bool = False
    error: str | None = None

    def shapes(self, names: Iterable[str]) -> list[tuple[int, ...] | None]:
        """Return the shape of each named output, None for an output that the run did not return."""
        return [tuple(self.outputs[name].shape) if name in self.outputs else None for name in names]


def compare_modes(module: nn.Module, example: Tensor, kept: tuple[str, ...]) -> TrainingMode:
    """Run copies of a network in both modes and find the modules that must not be put into training mode.

    Args:
        module: Network in eval mode, on the CPU, that runs on the example; unchanged, as is the random state.
        example: One array of the data.
        kept: Names of the kept outputs.
    """
    if isinstance(module, fx.GraphModule) or _is_graph(module):
        return TrainingMode()
    own = [name for name, part in module.named_modules() if not type(part).__module__.startswith("torch.nn.")]
    two = torch.cat([example, example])[:2]  # some code in training mode needs two samples
    wanted = _run(module, two, ())
    if not own or wanted.error is not None:
        return TrainingMode()

    def differs(names: list[str]) -> bool:
        got = _run(module, two, names)
        return got.error is not None or got.shapes(kept) != wanted.shapes(kept) or not got.used <= wanted.used

    trained = _run(module, two, own)
    if trained.error is None and trained.shapes(kept) == wanted.shapes(kept) and trained.used <= wanted.used:
        more = list(trained.outputs) != list(wanted.outputs)
        return TrainingMode(notes=tuple(_other_values(wanted, trained, kept)), returns_more=more)
    evaluated = tuple(_culprits(own, differs))
    if differs([name for name in own if name not in evaluated]):
        evaluated = tuple(own)
    return TrainingMode(evaluated, (_explained(module, wanted, trained, kept, evaluated),))


def _culprits(names: list[str], differs: Any) -> list[str]:
    """Return the modules that change the run in training mode, by bisection: most of them have no effect."""
    if not differs(names):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    return [*_culprits(names[:middle], differs), *_culprits(names[middle:], differs)]


def _run(module: nn.Module, example: Tensor, training: Iterable[str]) -> _Outcome:
    """Run a copy once in evaluation mode, with only the modules named in `training` in training mode."""
    tried = copy.deepcopy(module).eval()
    for name in training:
        tried.get_submodule(name).training = True
    watch = _Used({id(value): name for name, value in tried.named_parameters()})
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), watch:
            outputs = dict(flatten_outputs(tried(example)))
    except BaseException as error:
        if is_interrupt(error):
            raise
        return _Outcome(error=describe_error(error))
    return _Outcome(outputs, frozenset(watch.used), watch.is_random)


class _Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recorder of the parameters that a run reads, and of random operators."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.used, self.is_random = names, set[str](), False

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and id(value) in self.names:
                self.used.add(self.names[id(value)])
        self.is_random |= torch.Tag.nondeterministic_seeded in operator.tags
        return operator(*args, **(kwargs or {}))


def _other_values(wanted: _Outcome, trained: _Outcome, kept: tuple[str, ...]) -> Iterable[str]:
    """Yield a note for each kept output with other values in training mode, unless the run drew random numbers."""
    if trained.is_random:
        return
    for name in kept:
        one, other = wanted.outputs[name].double(), trained.outputs[name].double()
        limit = _SAME_WITHIN * max(1e-3, float(one.abs().max()) if one.numel() else 0.0)
        if not torch.allclose(one, other, rtol=_SAME_WITHIN, atol=limit, equal_nan=True):
            yield (
                f"Output '{name}' has other values in training mode than in evaluation mode, such as logits in one and "
                "probabilities in the other: training uses the former, every measurement the latter."
            )


def _explained(
    module: nn.Module, wanted: _Outcome, trained: _Outcome, kept: tuple[str, ...], evaluated: tuple[str, ...]
) -> str:
    """Return a note on the behaviour of the network in training mode, and on the outputs it is trained by."""
    extra = sorted({name.rpartition(".")[0] for name in trained.used - wanted.used})
    facts = []
    if trained.error is not None:
        facts.append(f"fails ({trained.error})")
    elif list(trained.outputs) != list(wanted.outputs) or trained.shapes(kept) != wanted.shapes(kept):
        facts.append(f"returns {_listed(trained)} in place of {_listed(wanted)}")
    if extra:
        layers = some([f"'{name}'" if name else "parameters of its own" for name in extra])
        facts.append(f"runs {layers}, which evaluation does not")
    places = [f"'{name}' ({type(module.get_submodule(name)).__name__})" for name in evaluated if name]
    places = ["the network itself", *places] if "" in evaluated else places
    return (
        f"In training mode the network {' and '.join(facts) or 'runs other code'}. It is trained by what it returns in "
        f"evaluation mode, {', '.join(kept)}: {some(places)} and its code for training are left out of training."
    )


def _listed(outcome: _Outcome) -> str:
    return some([f"{name} {('N', *value.shape[1:])}".replace("'", "") for name, value in outcome.outputs.items()])


def _is_graph(module: nn.Module) -> bool:
    """Return whether a module runs the code of a traced graph, which has no training mode."""
    return isinstance(getattr(module, "_graph", None), fx.Graph)
