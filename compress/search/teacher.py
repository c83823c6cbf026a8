"""Baseline as the teacher of distillation, for outputs and feature maps."""

import copy
from dataclasses import dataclass

from torch import nn

from compress.checkpoint.rebuild import apply_edits, build_baseline, example_input, load_strict, read_weights
from compress.model.artifacts import TorchModel


@dataclass(frozen=True)
class BaselineTeacher:
    """The baseline of a model, rebuilt from its factory, the edits before the pipeline and its weights.

    Attributes:
        model: Any model that the pipeline has made from the baseline.
    """

    model: TorchModel

    def build(self) -> nn.Module:
        """Return the baseline in eval mode, without gradients.

        Raises:
            ModelError: The factory fails.
            ArtifactError: The baseline's weights cannot be read or do not fit.
        """
        built = build_baseline(self.model.factory, self.model.signature)
        baseline = apply_edits(built, self.model.recipe.of_baseline, example_input(self.model.signature))
        load_strict(baseline, read_weights(self.model.baseline.weights_path), "The baseline's weights")
        return baseline.requires_grad_(False).eval()


@dataclass(frozen=True)
class LoadedTeacher:
    """Teacher that copies a network just loaded and not yet changed.

    Attributes:
        module: The network.
    """

    module: nn.Module

    def build(self) -> nn.Module:
        """Return a copy of the network in eval mode, without gradients."""
        return copy.deepcopy(self.module).requires_grad_(False).eval()
