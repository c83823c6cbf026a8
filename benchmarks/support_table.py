"""Page of the support matrix, from its results."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from support_networks import SETS, left_out

Record = Mapping[str, Any]
TITLES = {
    "torchvision": "torchvision, classification",
    "timm": "timm, one small network of each family",
    "segmentation": "torchvision, segmentation",
    "detection": "torchvision, detection (backbone and heads)",
    "video": "torchvision, video",
    "onnx": "ONNX files",
}
HEAD = """# Support matrix

`python benchmarks/support_matrix.py --table` writes this page from `support.json`, the results of the same program.
Networks of ultralytics, segmentation_models_pytorch, monai and others: [other libraries](other-libraries.md).

Each network is built with random weights. Batch-norm statistics, scales and biases differ in every channel, so that a
wrong cut shows. It is inspected and cut to 0.7 and to 0.4 of its MACs, with the widths that `prune` chooses by l2
scores. Each slim network is compared with the baseline with masked channels (in float64), exported to ONNX, and
compared with its file in ONNX Runtime. A network passes if both cuts do.

- *input*: of one image; a star marks a smaller one than the network's own, for speed (the graph is the same)
- *groups*: prunable channel groups of all; *blocks*: removable residual blocks
- *least*: share of the MACs at the least widths within the default limits
- *cut* and *parity*: largest difference relative to the largest output value, of both cuts
- seconds: one thread of a busy machine, both cuts together; *GB*: peak memory of the process, Python and torch (about
  0.5 GB) included
"""
COLUMNS = ("network", "family", "input", "GMACs", "M params", "groups", "blocks", "least", "reached", "cut", "parity",
           "inspect s", "cut s", "export s", "GB", "result")  # fmt: skip


def render(values: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        values: Contents of `support.json`.
    """
    sets: dict[str, dict[str, Record]] = {name: {} for name in SETS}
    for key, record in values["networks"].items():
        name, _, network = key.partition("/")
        sets[name][network] = record
    known = {name: records for name, records in sets.items() if records}
    versions = ", ".join(f"{name} {value}" for name, value in values["environment"].items() if name != "cores")
    parts = [HEAD, f"Made with {versions}, {values['environment']['cores']} cores.", "## Summary", _summary(known)]
    parts += ["## Failures", _failures(known), "## Channel groups that are not prunable", uncut(known)]
    for name, records in known.items():
        parts += [f"## {TITLES[name]}", table(COLUMNS, [_row(network, record) for network, record in records.items()])]
        parts += [f"Left out: {', '.join(names)} ({why})." for why, names in left_out(name).items()]
    return "\n\n".join(parts) + "\n"


def normalised(reason: str) -> str:
    """Return a reason without names, shapes and numbers, to find those that are alike.

    >>> normalised("Group 'layer1.0' has 12 channels in (3, 4), a norm's own")
    "Group '…' has n channels in (…), a norm's own"
    """
    reason = re.sub(r"(?<!\w)'[^']*'", "'…'", reason.splitlines()[0] if reason else "")
    reason = re.sub(r"\([0-9][^()]*\)|\[[0-9][^\[\]]*\]", "(…)", reason)
    return re.sub(r"[-+]?\b\d[\d.,]*(e[-+]?\d+)?\b", "n", reason)


def _summary(known: Mapping[str, Mapping[str, Record]]) -> str:
    rows = []
    for name, records in known.items():
        passed = sum(not record["failures"] for record in records.values())
        cuts = [cut for record in records.values() for cut in record["cuts"]]
        wrong = sum(failure["step"] == "compare" for record in records.values() for failure in record["failures"])
        rows.append(
            (TITLES[name], f"{passed} of {len(records)}", f"{passed / len(records):.1%}",
             str(sum("difference" in cut for cut in cuts)), str(wrong), largest(cuts, "difference"),
             largest(cuts, "parity"))
        )  # fmt: skip
    columns = (
        "set",
        "passed",
        "share",
        "slim networks compared",
        "wrong ones",
        "largest difference",
        "largest parity",
    )
    return table(columns, rows)


def _failures(known: Mapping[str, Mapping[str, Record]]) -> str:
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for records in known.values():
        for network, record in records.items():
            for failure in record["failures"]:
                alike[failure["step"], normalised(failure["reason"])].append(f"{network}: {failure['reason']}")
    if not alike:
        return "None."
    parts = []
    for (step, reason), each in sorted(alike.items(), key=lambda item: -len(item[1])):
        lines = [f"  - `{' '.join(one.split())}`" for one in each]
        parts.append("\n".join([f"- **{step}** ({len(each)}): `{reason}`", *lines]))
    return "\n".join(parts)


def uncut(known: Mapping[str, Mapping[str, Record]]) -> str:
    """Return a table of the reasons against pruning, with the groups and networks they concern."""
    groups: dict[str, int] = defaultdict(int)
    networks: dict[str, list[str]] = defaultdict(list)
    for records in known.values():
        for network, record in records.items():
            for reason, count in record.get("uncut", {}).items():
                groups[normalised(reason)] += count
                if network not in networks[normalised(reason)]:
                    networks[normalised(reason)].append(network)
    rows = [
        (reason, str(count), str(len(networks[reason])), ", ".join(networks[reason][:6]))
        for reason, count in sorted(groups.items(), key=lambda item: -item[1])
    ]
    return table(("reason", "groups", "networks", "examples"), rows) if rows else "None."


def _row(name: str, record: Record) -> Sequence[str]:
    cuts, seconds = record["cuts"], record["seconds"]
    own, used = record.get("own_input"), record.get("input")
    shape = "" if used is None else " x ".join(map(str, used)) + (" *" if own is not None and own != used else "")
    steps = ", ".join(dict.fromkeys(failure["step"] for failure in record["failures"]))
    uncut = sum(record.get("uncut", {}).values())
    return (
        name,
        record["family"],
        shape,
        number(record, "macs", 1e9, ".2f"),
        number(record, "params", 1e6, ".1f"),
        f"{record['groups']} of {record['groups'] + uncut}" if "groups" in record else "",
        number(record, "blocks", 1, ".0f"),
        number(record, "least_share", 1, ".2f"),
        ", ".join(f"{cut['reached']:.2f}" for cut in cuts if "reached" in cut),
        largest(cuts, "difference"),
        largest(cuts, "parity"),
        *(number(seconds, step, 1, ".1f") for step in ("inspect", "cut", "export")),
        number(record, "peak_memory_mb", 1000, ".1f"),
        f"failed: {steps}" if steps else "passed",
    )


def number(values: Record, key: str, unit: float, form: str) -> str:
    """Return a value in a unit, or nothing where it is missing."""
    return format(values[key] / unit, form) if key in values else ""


def largest(cuts: Iterable[Record], key: str) -> str:
    """Return the largest value of the cuts, or nothing."""
    return format(max((cut[key] for cut in cuts if key in cut), default=float("nan")), ".0e").replace("nan", "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
