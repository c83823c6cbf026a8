"""How does the untouched network come back, to be learned from?"""

from torch import nn

from compress.checkpoint.rebuild import apply_edits, build_untouched, example_input, load_strict, read_weights
from compress.model.artifacts import TorchModel


def original_of(artifact: TorchModel) -> nn.Module:
    """Return the untouched network in eval mode, without gradients.

    Raises:
        ModelError: The factory fails.
        ArtifactError: The baseline's weights cannot be read or do not fit.
    """
    built = build_untouched(artifact.factory, artifact.signature)
    original = apply_edits(built, artifact.recipe.of_baseline, example_input(artifact.signature))
    load_strict(original, read_weights(artifact.baseline.weights_path), "The baseline's weights")
    return original.requires_grad_(False)
