"""Cuts chosen by torch-pruning, as edits of our recipes.

torch-pruning cuts a copy of the network. The channels it keeps are read from its groups and become one `RemoveChannels`
edit of the same network, so that the cut network can be repaired, trained and exported as ours is.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits, example_input
from compress.cost.macs import COUNTED
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.adapter import random_inputs
from compress.model.artifacts import TorchModel
from compress.model.recipe import RemoveChannels
from compress.pruning.shortcuts import FixedShortcut
from compress.pruning.trial import difference, find_cuttable

SPARSITY = 5e-4  # `reg` of torch-pruning's own CIFAR-10 scripts (reproduce/scripts/prune/cifar/*/group_sl*)
STEPS = 5
BATCH = 128
Removed = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Setting:
    """How torch-pruning chooses channels.

    Attributes:
        criterion: "magnitude" (L2 of the group) or "taylor".
        ranking: "local" (one ratio in each group), "global" (one ranking) or "isomorphic" (one for groups alike).
        multiple: Widths are rounded to multiples of it by `round_to`; None leaves them as they come.
        streams: Whether channels of residual streams are cut too, or those inside blocks alone.
        steps: `iterative_steps`; scores are computed again in each.
        sparse: Whether the network has been trained for it, by `GroupNormPruner.regularize`.
    """

    criterion: str = "magnitude"
    ranking: str = "local"
    multiple: int | None = 8
    streams: bool = False
    steps: int = 1
    sparse: bool = False

    @property
    def name(self) -> str:
        """The setting in words, for tables."""
        parts = [
            "group-norm sparse training" if self.sparse else self.criterion,
            self.ranking,
            f"multiples of {self.multiple}" if self.multiple else "any width",
            "streams too" if self.streams else "inside blocks",
        ]
        return ", ".join(parts + ([f"{self.steps} steps"] if self.steps > 1 else []))

    @property
    def slug(self) -> str:
        """The setting as part of a file name."""
        return "-".join(str(value) for value in asdict(self).values()).lower()

    @property
    def families(self) -> tuple[str, ...]:
        """The families it competes in; of each the best setting on validation is trained."""
        if self.sparse:
            return ("group-norm sparse training",)
        if self.steps > 1:
            return ("iterative",)
        return self.ranking, self.criterion


def every_setting() -> list[Setting]:
    """Return the grid that is cut: one-shot, iterative, and after sparse training.

    Which multiple suits the runtime depends on the processor: 8 with AVX2, 16 with AVX-512.
    """
    rankings, criteria, multiples = ("local", "global", "isomorphic"), ("magnitude", "taylor"), (8, 16)
    found = [
        Setting(criterion, ranking, multiple, streams)
        for streams in (False, True)
        for multiple in (*multiples, None)
        for ranking in rankings
        for criterion in criteria
    ]
    for streams in (False, True):
        for multiple in multiples:
            # a local ranking gives the same widths in one step and in several
            found += [Setting(criterion, "global", multiple, streams, STEPS) for criterion in criteria]
            found += [Setting("magnitude", ranking, multiple, streams, sparse=True) for ranking in ("local", "global")]
    return found


class Cutter:
    """torch-pruning on one network.

    Args:
        model: The network; left as it is.
        split: Images and labels for Taylor scores.
    """

    def __init__(self, model: TorchModel, split: Split) -> None:
        self.model, self.split = model, split
        self.example = example_input(model.signature)
        self.groups, _ = find_cuttable(model.module, self.example)
        self._dense_gradients: dict[str, Tensor] = {}

    def removed(self, setting: Setting, ratio: float) -> Removed:
        """Return the channels that torch-pruning removes at a ratio, by our groups; empty where it removes none.

        Raises:
            RuntimeError: The network without those channels computes something else than torch-pruning's.
        """
        slim = with_plain_shortcuts(self.model.module)
        names = {part: name for name, part in slim.named_modules()}
        pruner = torch_pruning.pruner.BasePruner(
            slim, self.example, self._importance(setting), pruning_ratio=ratio, **self._options(slim, setting)
        )
        kept: dict[str, Tensor] = {}
        for step in range(setting.steps):
            if setting.criterion == "taylor":
                self._set_gradients(slim, is_dense=step == 0)
            for group in pruner.step(interactive=True):
                for dependency, indices in group:
                    part = dependency.target.module
                    if isinstance(part, COUNTED) and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                        width = len(part.weight)
                        present = kept.setdefault(names[part], torch.arange(width))
                        kept[names[part]] = present[~torch.isin(torch.arange(width), torch.tensor(indices))]
                group.prune()
        removed = self._as_removed(kept)
        self._check(removed, slim)
        return removed

    def cut(self, removed: Mapping[str, tuple[int, ...]]) -> TorchModel:
        """Return the network without channels."""
        return cut(self.model, removed)

    def _importance(self, setting: Setting) -> Any:
        if setting.criterion == "taylor":
            return torch_pruning.importance.GroupTaylorImportance()
        return torch_pruning.importance.GroupMagnitudeImportance(p=2)

    def _options(self, module: nn.Module, setting: Setting) -> dict[str, Any]:
        return {
            "global_pruning": setting.ranking != "local",
            "isomorphic": setting.ranking == "isomorphic",
            "iterative_steps": setting.steps,
            "round_to": setting.multiple,
            "ignored_layers": self.ignored_layers(module, setting.streams),
            # torch-pruning writes into its default arguments, which later pruners of this process would share
            "in_channel_groups": {},
            "out_channel_groups": {},
            "num_heads": {},
        }

    def ignored_layers(self, module: nn.Module, streams: bool) -> list[nn.Module]:
        """Return the layers of a copy that lose no outputs: the last one and, unless `streams`, those of the streams.

        Args:
            module: As `with_plain_shortcuts` returns it.
            streams: Whether channels of residual streams may go.
        """
        allowed = {
            producer.layer
            for group in self.groups.values()
            if streams or not group.is_summed
            for producer in group.producers
        }
        fixed = {name for name, part in self.model.module.named_modules() if isinstance(part, FixedShortcut)}
        allowed |= fixed if streams else set()
        return [part for name, part in module.named_modules() if isinstance(part, COUNTED) and name not in allowed]

    def _set_gradients(self, module: nn.Module, is_dense: bool) -> None:
        """Give a copy the gradients that Taylor scores need; those of the dense network are computed once."""
        if is_dense and self._dense_gradients:
            for name, parameter in module.named_parameters():
                parameter.grad = self._dense_gradients[name].clone()
            return
        module.zero_grad()
        for images, labels in evaluation_batches(self.split, BATCH):
            F.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
        if is_dense:
            self._dense_gradients = {
                name: parameter.grad.clone()
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }

    def _as_removed(self, kept: Mapping[str, Tensor]) -> Removed:
        """Return what each group of ours loses; a group is read off the first layer that produces its channels."""
        removed = {}
        for name, group in self.groups.items():
            member = group.producers[0]
            left = kept.get(member.layer)
            if left is not None and len(left) < group.width:
                gone = ~torch.isin(member.slots, left)
                removed[name] = tuple(sorted(member.channels[gone].tolist()))
        return removed

    @torch.no_grad()
    def _check(self, removed: Mapping[str, tuple[int, ...]], theirs: nn.Module) -> None:
        """Compare the outputs of the edit with those of torch-pruning's network."""
        images = random_inputs(self.model.module, self.example, 2, 0)
        got, wanted = self.cut(removed).module.eval()(images), theirs.eval()(images)
        if found := difference(got, wanted):
            raise RuntimeError(f"The edit is not torch-pruning's cut: {found}.")


def cut(model: TorchModel, removed: Mapping[str, tuple[int, ...]]) -> TorchModel:
    """Return a network without channels, with the edit in its recipe."""
    if not removed:
        return replace(model, module=copy.deepcopy(model.module))
    edit = RemoveChannels(dict(removed))
    slim = apply_edits(model.module, type(model.recipe)((edit,)), example_input(model.signature))
    return replace(model, module=slim, recipe=model.recipe.then(edit))


def with_plain_shortcuts(module: nn.Module) -> nn.Module:
    """Return a copy whose fixed shortcuts are plain 1 x 1 convolutions, which torch-pruning can follow and cut."""
    copied = copy.deepcopy(module)
    for name, part in list(copied.named_modules()):
        if isinstance(part, FixedShortcut):
            weight = next(part.buffers())
            plain = nn.Conv2d(part.in_channels, part.out_channels, 1, part.strides, bias=False)
            plain.weight.data.copy_(weight)
            copied.set_submodule(name, plain)
    return copied


def trained_weights(into: nn.Module, trained: nn.Module) -> nn.Module:
    """Return a copy of a network with the weights of its twin with plain shortcuts."""
    found = copy.deepcopy(into)
    own, state = found.state_dict(), trained.state_dict()
    found.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return found


class GroupNormHooks:
    """Group-norm sparse training of torch-pruning, for our training loop.

    Args:
        cutter: Knows the network.
        module: What is trained, as `with_plain_shortcuts` returns it; its shortcuts are frozen here.
        streams: Whether channels of residual streams are regularised too.
    """

    def __init__(self, cutter: Cutter, module: nn.Module, streams: bool) -> None:
        shortcuts = [name for name, part in cutter.model.module.named_modules() if isinstance(part, FixedShortcut)]
        self.module = module
        self.pruner = torch_pruning.pruner.GroupNormPruner(
            module,
            cutter.example,
            torch_pruning.importance.GroupMagnitudeImportance(p=2),
            reg=SPARSITY,
            ignored_layers=cutter.ignored_layers(module, streams),
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        for name in shortcuts:
            module.get_submodule(name).requires_grad_(False)

    def parameters(self) -> Iterable[Tensor]:
        """Nothing is learned besides the network."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Nothing."""

    def on_gradients(self, step: int) -> None:
        """Add the gradients of the group norms."""
        self.pruner.regularize(self.module)

    def on_step_end(self, step: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the pruner has no state that matters here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from nothing."""
