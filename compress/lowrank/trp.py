"""Trained rank pruning: kernels are cut to the ranks of the budget again and again while the network trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.lowrank.factorize import factorize, main_directions, multiply
from compress.model.recipe import Factorize


class TrainedRank:
    """Training hooks that cut kernels to low rank every few steps; a nuclear norm pulls towards lower ranks.

    Between these steps, kernels of full rank are trained, so that removed directions can come back if the loss needs
    them. With time the kernels stay near low rank, and the factorisation at the end loses next to nothing.

    Args:
        module: The network; its layers are changed in place.
        choose: Returns scheme and ranks of each layer for its present weights; unchanged layers are absent.
        interval: Steps from one cut to the next.
        strength: Weight of the nuclear norm's sub-gradient, which is added only in steps that begin with a cut.

    The kernels have full rank after the last step; the factorisation that follows cuts them once.

    Source: Xu et al. 2020, "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI, arXiv:2004.14566.
        Ranks by a budget in place of a share of the energy are an adaptation.
    """

    name: ClassVar[str] = "trp"

    def __init__(
        self, module: nn.Module, choose: Callable[[], Sequence[Factorize]], interval: int, strength: float
    ) -> None:
        self.module, self.choose, self.interval, self.strength = module, choose, interval, strength
        self._present: dict[str, tuple[str, tuple[int, ...]]] = {}

    def parameters(self) -> Iterable[Tensor]:
        """Return nothing: only the network is learned."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Cut the kernels to low rank every `interval` steps."""
        if step % self.interval == 0:
            self.cut()

    def on_gradients(self, step: int) -> None:
        """Add the sub-gradient of the nuclear norm in the steps that began with a cut."""
        if step % self.interval:
            return
        for layer, (scheme, ranks) in self._present.items():
            weight = self._weight(layer)
            if weight.grad is not None:
                weight.grad.add_(main_directions(weight.cpu(), scheme, ranks).to(weight), alpha=self.strength)

    def on_step_end(self, step: int) -> None:
        """Do nothing."""

    @torch.no_grad()
    def cut(self) -> None:
        """Replace each kernel by the nearest kernel of the ranks within the budget."""
        self._present = {edit.layer: (edit.scheme, edit.ranks) for edit in self.choose()}
        for layer, (scheme, ranks) in self._present.items():
            weight = self._weight(layer)
            weight.copy_(multiply(factorize(weight.cpu(), scheme, ranks).weights, scheme))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which `load_state_dict` resumes."""
        return {"present": {layer: [scheme, list(ranks)] for layer, (scheme, ranks) in self._present.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state."""
        self._present = {layer: (scheme, tuple(ranks)) for layer, (scheme, ranks) in state["present"].items()}

    def _weight(self, layer: str) -> Tensor:
        weight = self.module.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight
