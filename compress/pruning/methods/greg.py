"""Growing regularisation: the penalty on removed channels grows every few steps, until they vanish."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.config.schema.methods import GregConfig
from compress.pruning.methods.base import Setting
from compress.pruning.methods.scored import Scored

_ALIKE = 0.01
_RECOVERY = -1e-4


class Greg(Scored):
    """Training-time method: an L2 penalty on the removed channels grows up to a ceiling, and is constant from there.

        variant 1   channels are chosen early, by scores (first-order importance, as in all methods; no filter norms)
        variant 2   first the penalty of all channels grows alike: channels that the loss needs resist, the others
                    shrink, and scores separate them better; kept channels then get a small negative penalty

    Args:
        setting: Network, budget and schedule.
        options: See `GregConfig`.

    Raises:
        StageError: The run is too short for the penalty to bring the channels down; the hint names a
            sufficient number of steps.

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization", ICLR, arXiv:2012.09243. First-order scores
        in place of filter norms, one ranking of all channels under a budget in place of ratios by hand, penalties on
        the batch norms too, and a schedule in shares of the run are adaptations.
    """

    name: ClassVar[str] = "greg"

    def __init__(self, setting: Setting, options: GregConfig | None = None) -> None:
        self.options = options = options or GregConfig()
        picked, self.full = round(setting.steps * options.picked_at), round(setting.steps * options.full_at)
        super().__init__(setting, picked, options.interval, first=picked)
        self.penalties = {name: torch.zeros(group.width) for name, group in setting.groups.items()}
        increases = max(1, (self.full - picked) // options.interval)
        self.increase_alike = _ALIKE / max(1, picked // options.interval)
        after = np.arange(setting.steps - picked) // options.interval + 1
        shape = np.minimum(after / increases, 1.0)
        if options.ceiling is None:
            self.ceiling = setting.sized_ceiling(picked, shape)
        else:
            self.ceiling = options.ceiling
            setting.require_decay(picked, shape * self.ceiling, f"a penalty that grows to {self.ceiling:g}")
        self.increase = self.ceiling / increases

    def on_gradients(self, step: int) -> None:
        """Raise the penalties on schedule, and add them to the gradients."""
        self.observe(step)
        if step % self.interval == 0:
            for name, penalties in self.penalties.items():
                self._raise(penalties, self.goes(name), step)
        for name, penalties in self.penalties.items():
            self.tensors[name].decay(penalties, with_filters=True)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {**super().state_dict(), "penalties": self.penalties}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load_state_dict(state)
        self.penalties = state["penalties"]

    def _raise(self, penalties: Tensor, goes: Tensor, step: int) -> None:
        is_second = self.options.variant == 2
        if step < self.frozen:
            if is_second:
                penalties.add_(self.increase_alike)
            return
        raised = (penalties + self.increase).clamp_max(self.ceiling)
        penalties.copy_(torch.where(goes, raised, torch.full_like(raised, _RECOVERY if is_second else 0.0)))
