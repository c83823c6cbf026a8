"""Global Sparse Momentum: only the most important channels are trained, the others decay."""

from typing import ClassVar

import numpy as np

from compress.config.schema.methods import GsmConfig
from compress.pruning.methods.base import Setting
from compress.pruning.methods.scored import Scored

_DECAYED_WHILE_OPEN = 2.0


class Gsm(Scored):
    """Training-time method: in each step, channels beyond the budget get no gradient and only decay.

    A channel whose score rises again before the final choice is trained again. Removed channels have a separate decay
    factor. Before the final choice, it brings a channel that is removed all the time to e^-2, because a channel that
    has decayed does not come back; after the choice, to e^-8. A given `passive_decay` is used all the time, as in the
    paper: it must bring a channel that is removed from the first choice on to e^-8.

    The `momentum` of the options replaces that of the training, before this method is made.

    Args:
        setting: Network, budget and schedule.
        options: See `GsmConfig`.

    Raises:
        StageError: The run is too short for the decay; the hint names a sufficient number of steps.

    Source: Ding et al. 2019, "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", arXiv:1909.12778.
        Channels in place of single weights, their Taylor scores, and the separate decay are adaptations.
    """

    name: ClassVar[str] = "gsm"

    def __init__(self, setting: Setting, options: GsmConfig | None = None) -> None:
        options = options or GsmConfig()
        frozen = round(setting.steps * (1 - options.frozen_ratio))
        super().__init__(setting, frozen, options.interval, first=min(options.interval, frozen))
        if options.passive_decay is not None:
            setting.require_steps(frozen)
            setting.require_decay(self.first, options.passive_decay, f"gsm.passive_decay {options.passive_decay:g}")
            self.decays = np.full(setting.steps, options.passive_decay)
        else:
            self.decays = np.full(setting.steps, setting.sized_decay(frozen))
            if frozen > self.first:
                self.decays[:frozen] = setting.factor(_DECAYED_WHILE_OPEN, self.first, frozen)

    def on_gradients(self, step: int) -> None:
        """Zero the gradients of removed channels, and add their decay."""
        self.observe(step)
        for name in self.chosen:
            goes = self.goes(name)
            self.tensors[name].stop(goes)
            self.tensors[name].decay(goes * (float(self.decays[step]) - self.setting.weight_decay))
