"""Global Sparse Momentum: only the channels that matter most are trained on, the others decay by themselves."""

from typing import ClassVar

import numpy as np

from compress.config.schema.methods import GsmConfig
from compress.pruning.methods.base import Scored, Setting

_DECAYED_WHILE_OPEN = 2.0


class Gsm(Scored):
    """In each step the channels that do not fit into the budget get no gradient, only decay.

    A channel whose score rises again while the choice is open takes part again. What goes decays by a factor of its
    own: while the choice is open, so weak that a channel which goes all the time comes to e^-2, for what has decayed
    does not come back; after that so strong that the rest is e^-8. A `passive_decay` of the user's own holds all the
    time, as in the paper: it must bring a channel that goes from the first choice on to e^-8.

    The `momentum` of the options takes the place of that of the training, before this method is made.

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
        """Take the gradient from what goes, and let it decay."""
        self.observe(step)
        for name in self.chosen:
            goes = self.goes(name)
            self.tensors[name].stop(goes)
            self.tensors[name].decay(goes * (float(self.decays[step]) - self.setting.weight_decay))
