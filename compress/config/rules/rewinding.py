"""Checks of `finetune: {weights: rewound}` against the stages before it."""

from typing import Any

from compress.config.document import Document
from compress.config.problems import Problem, format_path


def check_rewinding(document: Document) -> list[Problem]:
    """Return one problem for each rewinding of a network that has no checkpoint of its whole form.

    That is a network from an ONNX file, whose layers have the names of its graph, one that another tool slimmed, and
    one with factorised layers.
    """
    stages = document.value.get("stages")
    stages = [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []
    problems = []
    for index, stage in enumerate(stages):
        if stage.get("stage") != "finetune" or stage.get("weights") != "rewound":
            continue
        path = ("stages", index, "weights")
        text, hint = _obstacle(stages[:index])
        if text is not None:
            problems.append(Problem(document.origin(path), f"{format_path(path)} must not be rewound {text}", hint))
    return problems


def _obstacle(before: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    for index, stage in enumerate(before):
        name, model = stage.get("stage"), stage.get("model")
        if name == "load" and isinstance(model, dict) and "onnx" in model:
            return "with model.onnx: no checkpoint has the names of a file's layers.", "name the network's factory."
        if name == "load" and stage.get("narrow") is True:
            text = "with narrow: a checkpoint of the whole network does not tell which of its channels were kept."
            return text, "set weights: inherited, or random."
        if name == "low_rank":
            return f"after low_rank (stages[{index}]): a checkpoint has no factors of its layers.", None
        moves = stage.get("moves", ["ranks"])
        if name == "slim" and isinstance(moves, list) and "ranks" in moves:
            text = f"after slim with ranks (stages[{index}]): a checkpoint has no factors of its layers."
            return text, f"set stages[{index}].moves: [channels, blocks]."
    return None, None
