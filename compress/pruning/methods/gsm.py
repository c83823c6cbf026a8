"""Global Sparse Momentum: only the channels that matter most are trained on, the others decay by themselves."""

from typing import ClassVar

from compress.config.schema import GsmConfig
from compress.pruning.methods.base import Scored, Setting


class Gsm(Scored):
    """In each step the channels that do not fit into the budget get no gradient, only decay.

    A channel whose score rises again while the choice is open takes part again. What goes decays by a factor of its
    own, sized so that it comes to e^-8 within the steps after the choice stands.

    Args:
        setting: What to work with.
        options: See `GsmConfig`.

    Raises:
        StageError: The run is too short for the decay; says how many steps would do.

    Source: Ding et al. 2019, "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", arXiv:1909.12778.
        Channels in place of single weights, their Taylor scores, and the decay of their own are adaptations.
    """

    name: ClassVar[str] = "gsm"

    def __init__(self, setting: Setting, options: GsmConfig | None = None) -> None:
        options = options or GsmConfig()
        super().__init__(setting, round(setting.steps * (1 - options.frozen_ratio)), options.interval)
        self.passive_decay = options.passive_decay or setting.sized_decay(self.frozen)
        if options.passive_decay is not None:
            setting.require_decay(self.frozen, options.passive_decay, f"gsm.passive_decay {options.passive_decay:g}")

    def on_gradients(self, step: int) -> None:
        """Take the gradient from what goes, and let it decay."""
        self.observe(step)
        for name in self.chosen:
            goes = self.goes(name)
            self.tensors[name].stop(goes)
            self.tensors[name].decay(goes * (self.passive_decay - self.setting.weight_decay))
