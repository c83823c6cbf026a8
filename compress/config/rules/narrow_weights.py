"""Checks of `narrow`, which loads networks that were slimmed by other tools."""

from compress.config.document import Document
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.problems import Problem, format_path


def check_narrow(document: Document) -> list[Problem]:
    """Return one problem for each `load` with `narrow: true` whose weights come with the network.

    Weights that are missing are reported by `onnx_model.check_weights`.
    """
    stages, problems = document.value.get("stages"), []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("stage") != "load" or stage.get("narrow") is not True:
            continue
        place, weights, model = ("stages", index, "narrow"), stage.get("weights"), stage.get("model")
        if isinstance(model, dict) and "onnx" in model:
            why = "an ONNX file has the widths it has, and its weights with them"
        elif weights in (PRETRAINED, UNTRAINED):
            why = f"the widths are read from a file of weights, got weights: {weights}"
        else:
            continue
        problems.append(Problem(document.origin(place), f"{format_path(place)} must be left out: {why}."))
    return problems
