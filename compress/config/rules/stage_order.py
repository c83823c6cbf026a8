"""Can the stages run in the order given? Derived from what each one consumes and produces."""

from typing import Any

from compress.catalog import NOTHING, STAGES, VERDICT
from compress.config.document import Document
from compress.config.problems import Problem

_ARTICLES = {"TorchModel": "a TorchModel", "OnnxModel": "an OnnxModel", VERDICT: "a Verdict"}


def check_order(document: Document) -> list[Problem]:
    """Return one problem for each stage that cannot follow the one before it.

    Stages whose names are not known are passed over; they are reported elsewhere.
    """
    stages = document.value.get("stages")
    if not isinstance(stages, list) or not stages:
        return []
    names = [_name(entry) for entry in stages]
    problems = []
    for index, name in enumerate(names):
        text, hint = _check_place(index, name, names)
        if text is not None:
            problems.append(Problem(document.origin(("stages", index)), text, hint, "order"))
    last = names[-1]
    if last is not None and STAGES[last].produces != VERDICT:
        problems.append(
            Problem(
                document.origin(("stages", len(names) - 1)),
                f"stages must end with 'verify', but stages[{len(names) - 1}] '{last}' is the last one.",
                "without verify nothing is checked, and nothing passes by checking nothing.",
                "order",
            )
        )
    return problems


def _name(entry: Any) -> str | None:
    name = entry.get("stage") if isinstance(entry, dict) else None
    return name if isinstance(name, str) and name in STAGES else None


def _label(names: list[str | None], index: int) -> str:
    return f"stages[{index}]" + (f" '{names[index]}'" if names[index] else "")


def _check_place(index: int, name: str | None, names: list[str | None]) -> tuple[str | None, str | None]:
    """Return what is wrong with the place of one stage, and a hint."""
    if name is None:
        return None, None
    wanted = STAGES[name].consumes
    if index == 0:
        if wanted == NOTHING:
            return None, None
        return f"stages[0] '{name}' needs {_ARTICLES[wanted]}, but nothing comes before it.", "begin with load."
    before = names[index - 1]
    if wanted == NOTHING:
        return (
            f"stages[{index}] '{name}' must be the first stage, but {_label(names, index - 1)} comes before it.",
            None,
        )
    if name == "quantize" and name in names[:index]:
        first = names.index(name)
        return f"stages[{index}] 'quantize' needs a float file, but stages[{first}] 'quantize' quantises it.", None
    if before is None or STAGES[before].produces == wanted:
        return None, None
    yields = _ARTICLES[STAGES[before].produces]
    place = f"stages[{index}] '{name}' needs {_ARTICLES[wanted]}"
    hint = f"put export before {name}." if name in ("quantize", "verify") else None
    return f"{place}, but stages[{index - 1}] '{before}' yields {yields}.", hint
