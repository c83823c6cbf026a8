"""Trained rank pruning: kernels are cut to the ranks of the budget again and again while the network trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.lowrank.factorize import factorize, main_directions, multiply
from compress.model.recipe import Factorize


class TrainedRank:
    """Every so many steps each kernel becomes its nearest of low rank, and a nuclear norm pulls towards lower ranks.

    Between these steps training goes on with whole kernels, so that what is cut off can come back where the loss wants
    it; with time the kernels stay near low rank, and the factorisation at the end loses next to nothing.

    Args:
        module: The network; its layers are changed in place.
        choose: Returns the new form of each layer by its present weights; unchanged layers are absent.
        interval: Steps from one cut to the next.
        strength: Factor of the sub-gradient of the nuclear norm, in the steps that begin with a cut.

    The kernels are whole after the last step; the factorisation that follows cuts them once.

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
        """Return nothing: all that is learned is the network."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Cut the kernels to low rank when it is time to."""
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
        """Nothing is done."""

    @torch.no_grad()
    def cut(self) -> None:
        """Replace each kernel by the nearest one of the ranks that the budget gives it."""
        self._present = {edit.layer: (edit.scheme, edit.ranks) for edit in self.choose()}
        for layer, (scheme, ranks) in self._present.items():
            weight = self._weight(layer)
            weight.copy_(multiply(factorize(weight.cpu(), scheme, ranks).weights, scheme))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which `load_state_dict` goes on."""
        return {"present": {layer: [scheme, list(ranks)] for layer, (scheme, ranks) in self._present.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._present = {layer: (scheme, tuple(ranks)) for layer, (scheme, ranks) in state["present"].items()}

    def _weight(self, layer: str) -> Tensor:
        weight = self.module.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight
