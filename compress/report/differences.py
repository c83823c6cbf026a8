"""In which settings do runs differ? Resolved pipelines as flat keys, stages by name, and only what is not the same."""

from collections.abc import Sequence
from typing import Any

import yaml

MISSING_VALUE = "–"
IGNORED = ("name",)  # it heads the column


def list_differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values are not the same in all pipelines, with the value in each as text.

    A stage that some pipelines lack is one key. A stage that comes twice in a pipeline is "stages.prune", then
    "stages.prune (2)".

    Args:
        configs: Resolved pipelines.

    >>> list_differences([{"seed": 0, "deploy": {"threads": 1}}, {"seed": 1, "deploy": {"threads": 1}}])
    [('seed', ['0', '1'])]
    """
    named = [_name_stages(config) for config in configs]
    order = [list(one.get("stages") or {}) for one in named]
    rows = []
    if len({tuple(stages) for stages in order}) > 1:
        rows.append(("order of the stages", [" → ".join(stages) or MISSING_VALUE for stages in order]))
    _compare(named, "", rows)
    return rows


def _name_stages(config: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline whose list of stages is a dict by name."""
    stages: dict[str, Any] = {}
    for stage in config.get("stages") or []:
        if not isinstance(stage, dict):
            continue
        name = str(stage.get("stage"))
        count = sum(other == name or other.startswith(f"{name} (") for other in stages)
        stages[name if not count else f"{name} ({count + 1})"] = {k: v for k, v in stage.items() if k != "stage"}
    return {**{key: value for key, value in config.items() if key not in IGNORED}, "stages": stages}


def _compare(values: Sequence[Any], key: str, rows: list[tuple[str, list[str]]]) -> None:
    """Add a row for `values`, or for what lies below them, where they are not all the same."""
    if all(isinstance(value, dict) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            _compare([value.get(name, _ABSENT) for value in values], f"{key}.{name}" if key else str(name), rows)
        return
    if any(value != values[0] or isinstance(value, bool) != isinstance(values[0], bool) for value in values):
        rows.append((key, [_show(value) for value in values]))


def _show(value: Any) -> str:
    """Return a value as it would stand in a pipeline file, on one line."""
    if value is _ABSENT:
        return MISSING_VALUE
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


_ABSENT = object()
