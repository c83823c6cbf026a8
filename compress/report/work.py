"""What did the stages do? The sections on pruning, factorisation, training, export, times and what to know."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from compress.report.markup import (
    escape,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
    format_whole,
    render_details,
    render_facts,
    render_figure,
    render_section,
    render_split,
    render_table,
)
from compress.report.metric import format_metric, metric_of
from compress.report.plots import plot_layers, plot_prediction, plot_stairs, plot_training, plot_widths
from compress.tasks.base import Metric

Run = dict[str, Any]
FIGURES = {
    "reactivated": "channels that came back after they had been chosen to go",
    "left_ratio": "strength that what went had left before the cut",
    "multiplier": "price of the budget at the end",
    "channels_closed_ratio": "channel gates that closed by themselves",
    "blocks_closed_ratio": "block gates that closed",
}
_UNITS = {"latency_ms": "milliseconds a call", "size_mb": "size of the file (MB)"}


def render_stages(report: dict[str, Any]) -> str:
    """Return one section for each prune, slim, low_rank, finetune and export stage, in the order they ran."""
    runs = _runs(report)
    parts = []
    for index, run in enumerate(runs):
        render = RENDERERS.get(run.get("stage", ""))
        if render is not None and run.get("record"):
            parts.append(render(runs, index))
    return "".join(parts)


def _runs(report: dict[str, Any]) -> list[Run]:
    """Return the stages; after a slim stage those that it is made of, as if they had run by themselves."""
    runs: list[Run] = []
    for place, run in enumerate(report.get("stages") or [], start=1):
        runs.append({**run, "place": place})
        for step in (run.get("record") or {}).get("steps") or [] if run.get("stage") == "slim" else []:
            records = {"prune": step.get("prune"), "low_rank": step.get("low_rank"), "finetune": step.get("training")}
            runs += [{"stage": name, "record": record, "place": place} for name, record in records.items() if record]
        if run.get("stage") in ("prune", "low_rank") and (learned := (run.get("record") or {}).get("method")):
            runs.append({"stage": "finetune", "record": learned, "place": place})
    return runs


def render_times(report: dict[str, Any]) -> str:
    """Return what each stage took, and whether it ran at all."""
    runs: list[Run] = report.get("stages") or []
    rows = [
        (
            f"{number} <code>{escape(run.get('stage'))}</code>",
            escape(run.get("status")),
            escape(format_seconds(run.get("seconds"))),
        )
        for number, run in enumerate(runs, start=1)
    ]
    if not rows:
        return ""
    total = sum(run.get("seconds") or 0.0 for run in runs)
    rows.append(("total", "", escape(format_seconds(total))))
    return render_section("Stages", render_table(("stage", "in this run", "time"), rows, numeric=(2,)))


def render_environment(report: dict[str, Any]) -> str:
    """Return the machine and the library versions."""
    environment: dict[str, Any] = report.get("environment") or {}
    memory = environment.get("memory_bytes")
    facts = [
        *((name, environment.get(name)) for name in ("cpu", "cores")),
        ("memory", None if memory is None else format_bytes(memory)),
        *((name, environment.get(name)) for name in ("platform", "python")),
    ]
    known = {"cpu", "cores", "memory_bytes", "platform", "python", "versions"}
    facts += [(name, value) for name, value in environment.items() if name not in known]
    versions = (environment.get("versions") or {}).items()
    return render_section(
        "Environment", render_facts(facts), render_facts((name, value or "not installed") for name, value in versions)
    )


def render_notes(report: dict[str, Any]) -> str:
    """Return everything that fell short, was left out or could not be measured."""
    notes = "".join(f"<li>{note}</li>\n" for note in _list_notes(report))
    return render_section("Worth knowing", f'<ul class="notes">{notes}</ul>\n' if notes else "")


def _list_notes(report: dict[str, Any]) -> Iterator[str]:
    """Yield notes as HTML."""
    for run in _runs(report):
        record, where = run.get("record") or {}, f"Stage {run['place']} <code>{escape(run.get('stage'))}</code>: "
        if record.get("shortfall"):
            yield f"{where}{escape(record['shortfall'])}"
        for key, label, verb in (("excluded", "name", "left whole"), ("dense", "layer", "left dense")):
            for reason, layers in _group_by_reason(record.get(key) or [], label).items():
                names = ", ".join(f"<code>{escape(layer)}</code>" for layer in layers)
                yield f"{where}{verb}: {names} ({escape(reason)})."
        for warning in record.get("warnings") or []:
            yield f"{where}{escape(warning)}"
    for place in report.get("non_finite") or []:
        yield f"Not a finite number, written as null: <code>{escape(place)}</code>"


def _group_by_reason(entries: list[dict[str, Any]], name: str) -> dict[str, list[str]]:
    """Return the names that share each reason, in the order met: 18 groups with one reason are one note."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        reasons.setdefault(str(entry.get("reason") or "no reason given"), []).append(str(entry.get(name)))
    return reasons


def _render_load(runs: list[Run], index: int) -> str:
    rows = [
        (
            f"<code>{escape(tried.get('rewrite'))}</code>",
            escape(tried.get("places")),
            "not measured" if tried.get("speedup") is None else f"{tried['speedup']:.2f}×",
            "yes" if tried.get("is_kept") else "no",
        )
        for tried in runs[index]["record"].get("rewrites") or []
    ]
    unread = ", ".join(f"<code>{escape(path)}</code>" for path in runs[index]["record"].get("unread") or [])
    removed = (
        render_section(
            "Modules that no output reads",
            f"<p>Removed before anything was measured, with their weights: {unread}.</p>\n",
        )
        if unread
        else ""
    )
    narrow = runs[index]["record"].get("narrow") or {}
    if narrow:
        listed = render_table(
            ("channel group", "channels fewer"),
            [(f"<code>{escape(name)}</code>", escape(count)) for name, count in narrow.items()],
            numeric=(1,),
        )
        note = "<p>Read from the shapes of the weights. The narrow network is the baseline of all ratios.</p>\n"
        removed += render_section("Narrower than the factory's network", listed, note)
    if not rows:
        return removed
    table = render_table(("rewrite", "places", "speed-up of the untouched network", "kept"), rows, numeric=(1, 2))
    note = "<p>The baseline is rewritten as the slim model is: no speed-up reported elsewhere comes from this.</p>\n"
    return removed + render_section("Graph rewritten for the runtime", table, note)


def _render_prune(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    groups = record.get("groups") or []
    facts = [
        ("criterion", record.get("criterion")),
        *_list_targets(record),
        *_list_timing(record.get("latency") or {}),
        ("MACs", _change(record, "macs", format_count)),
        ("parameters", _change(record, "params", format_count)),
        (f"validation {metric_of(record).words}, before and after this stage", _change_of_quality(record)),
        *_list_isometry(record, {"before": "before", "after_cut": "after the cut", "after_repair": "after the repair"}),
        *_list_method(record.get("method") or {}),
    ]
    blocks = ", ".join(f"<code>{escape(block)}</code>" for block in record.get("removed_blocks") or [])
    rows = [
        (
            f"<code>{escape(group.get('name'))}</code>",
            escape(group.get("width_before")),
            escape(group.get("width_after")),
            escape(_damage(group)),
        )
        for group in groups
    ]
    head = "rise of the loss, measured" if record.get("damage") == "sensitivity" else "estimated damage"
    table = render_table(("channel group", "before", "after", head), rows, numeric=(1, 2, 3))
    return render_section(
        _title("Pruning: widths of the channel groups", runs, index),
        render_split(render_facts(facts), render_figure(plot_widths(f"widths-{index}", groups))),
        f"<p>Residual blocks removed: {blocks}.</p>\n" if blocks else "",
        render_details("widths as a table", table) if rows else "",
        _render_trials(record),
        _render_timing(record.get("latency") or {}, index),
    )


def _list_method(learned: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a training-time method did."""
    if not learned:
        return
    yield "method that decided while the network trained", learned.get("name")
    metric = metric_of(learned)
    for unit in ("loss", metric.name):
        form = format_number if unit == "loss" else partial(format_metric, metric)
        figures = [learned.get(f"{unit}_{when}_cut") for when in ("before", "after")]
        if all(figure is not None for figure in figures):
            label = f"validation {unit if unit == 'loss' else metric.words}"
            yield f"{label}, trained network before and after the cut", " → ".join(map(form, figures))
    for name, value in (learned.get("figures") or {}).items():
        label = FIGURES.get(name, name)
        yield label, format_share(value) if name.endswith("_ratio") else format_number(value)


def _damage(group: dict[str, Any]) -> str | None:
    """Return what narrowing a group does, with its standard error where it was measured."""
    damage, error = format_number(group.get("damage")), group.get("damage_error")
    return damage if error is None else f"{damage} ± {format_number(error)}"


def _render_trials(record: dict[str, Any]) -> str:
    """Return the numbers of blocks and the repairs that were tried."""
    parts = []
    if trials := record.get("block_trials"):
        rows = [
            (escape(trial.get("blocks")), escape(trial.get("reason") or format_number(trial.get("loss"))))
            for trial in trials
        ]
        parts.append(render_table(("blocks removed", "validation loss within the budget"), rows, numeric=(0,)))
    if networks := (record.get("whole_networks") or {}).get("tried"):
        parts.append(_render_networks(networks))
    if repairs := record.get("repairs"):
        tries = [
            (
                escape(tried.get("repair")),
                escape(_change(tried, "loss", format_number)),
                "yes" if tried.get("is_kept") else "no",
            )
            for tried in repairs
        ]
        parts.append(render_table(("repair", "validation loss", "kept"), tries, numeric=(1,)))
    return "".join(parts)


def _render_networks(networks: list[dict[str, Any]]) -> str:
    """Return the whole networks that damages were learned from."""
    rows = [
        (
            escape(network.get("source")),
            escape(network.get("blocks")),
            escape(format_number(network.get("loss"))),
            escape(format_number(network.get("predicted_loss"))),
        )
        for network in networks
    ]
    head = ("whole network, chosen by", "blocks removed", "validation loss after a quick repair", "predicted")
    return render_details("whole networks that were tried", render_table(head, rows, numeric=(1, 2, 3)))


def _render_timing(latency: dict[str, Any], index: int) -> str:
    """Return the pictures of a budget in milliseconds."""
    reference = latency.get("reference_ms") or 0.0
    rounds = [(r["predicted"] * reference, r["measured"] * reference) for r in latency.get("rounds") or []]
    pictures = (
        (
            plot_stairs(f"stairs-{index}", latency.get("stairs") or []),
            "What the network takes at each width of one group, the others as chosen; by the table.",
        ),
        (
            plot_prediction(f"prediction-{index}", latency.get("variants") or [], rounds),
            "What the table says and what was measured.",
        ),
        (plot_layers(f"layers-{index}", latency.get("layers") or []), "What each layer takes, by the table."),
    )
    return "".join(render_figure(svg, caption) for svg, caption in pictures if svg)


def _list_targets(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what was asked and reached of each target."""
    asked = record.get("asked") or dict.fromkeys(record.get("target") or {}, record.get("asked_ratio"))
    reached = record.get("reached") or dict.fromkeys(asked, record.get("reached_ratio"))
    for name, value in asked.items():
        is_share = name not in _UNITS
        label = f"share of {name} kept".replace("macs", "MACs") if is_share else _UNITS[name]
        show = _share if is_share else format_number
        yield f"{label}, asked", show(value)
        yield f"{label}, reached", show(reached.get(name))


def _list_timing(latency: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is known of the latency that widths were chosen by."""
    if not latency:
        return
    yield "baseline's latency in the table (ms)", format_number(latency.get("reference_ms"))
    yield "share of it by the table", _share(latency.get("predicted_ratio"))
    yield "share of it, whole networks timed in turn", _share(latency.get("measured_ratio")) or "not timed here"
    rounds = latency.get("rounds") or []
    beside = [one["baseline_ms"] for one in rounds if one.get("baseline_ms") is not None]
    if beside:
        yield "baseline's latency when choices were timed (ms)", format_number(statistics.median(beside))
    yield "networks timed until the budget was met", len(rounds)
    yield "table's median error on its variants", _share(latency.get("table_error"))
    yield "scatter of single calls", _share(latency.get("scatter"))


def _render_slim(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    facts = [
        ("moves", ", ".join(record.get("moves") or [])),
        ("MACs", _change(record, "macs", format_count)),
        ("parameters", _change(record, "params", format_count)),
        (f"validation {metric_of(record).words}", _change_of_quality(record)),
    ]
    rows = [
        (
            escape(number),
            escape(format_share(trial.get("share"))),
            escape(trial.get("reason") or format_number(trial.get("loss"))),
        )
        for number, step in enumerate(record.get("steps") or [], start=1)
        for trial in step.get("trials") or []
    ]
    head = ("step", "of the way by ranks", "validation loss within the budget")
    return render_section(
        _title("Slimming: channels, blocks and ranks under one budget", runs, index),
        render_facts(facts),
        render_table(head, rows, numeric=(0, 1)),
        "<p>The least validation loss was kept; the sections that follow say how it came about.</p>\n",
    )


def _render_low_rank(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    rows = [
        (
            f"<code>{escape(layer.get('layer'))}</code>",
            escape(layer.get("scheme")),
            escape(" × ".join(str(rank) for rank in layer.get("ranks") or [])),
            escape(format_number(layer.get("relative_error"))),
            escape(_change(layer, "macs", format_count)),
        )
        for layer in record.get("layers") or []
    ]
    head = ("layer", "scheme", "rank", "relative error", "MACs")
    table = render_table(head, rows, numeric=(2, 3, 4)) if rows else "<p>No layer was factorised.</p>\n"
    dense = len(record.get("dense") or [])
    facts = [
        ("MACs", _change(record, "macs", format_count)),
        ("layers factorised", len(rows)),
        ("layers left dense", dense or None),
        ("allocation of ranks", record.get("allocation")),
        ("largest error bound (operator norm)", format_number(record.get("largest_bound"))),
        *_list_method(record.get("method") or {}),
        *_list_timing(record.get("latency") or {}),
    ]
    return render_section(
        _title("Low-rank factorisation", runs, index), render_facts(facts), table, _render_trials(record)
    )


def _say_chosen(chosen: int | None, count: int) -> Any:
    """Return which epoch's weights were kept; 0 is none, because training made the network worse."""
    if chosen == 0:
        return "none: training made the network worse"
    return f"{chosen} of {count}" if chosen is not None and count else chosen


def _render_finetune(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    epochs, chosen = record.get("epochs") or [], record.get("chosen_epoch")
    before = (runs[index - 1] if index else {}).get("record") or {}
    metric = metric_of(record)
    key, words = f"validation_{metric.name}", f"validation {metric.words}"
    start = record.get(f"{key}_before", before.get(f"{key}_after"))
    reached = {epoch.get("epoch"): epoch.get(key) for epoch in epochs}.get(chosen)
    rates = [epoch["learning_rate"] for epoch in epochs if epoch.get("learning_rate") is not None]
    peak = record.get("peak_learning_rate")
    facts = [
        ("chosen epoch", _say_chosen(chosen, len(epochs))),
        (f"{words} before training", None if start is None else format_metric(metric, start)),
        (f"{words} of the chosen epoch", None if reached is None else format_metric(metric, reached)),
        (f"{words} of the average of the last steps", _say_average(record)),
        ("peak learning rate", None if peak is None else format_number(peak)),
        (
            "learning rates tried",
            ", ".join(_say_probe(one, metric) for one in record.get("probed_learning_rates") or []) or None,
        ),
        ("final learning rate", format_number(rates[-1]) if rates else None),
        *_list_rewinding(record),
        *_list_isometry(record, {"baseline": "baseline", "before": "before training", "after": "after training"}),
        ("batch size", record.get("batch_size")),
        ("steps", format_whole(record.get("steps"))),
    ]
    rows = [
        (
            escape(epoch.get("epoch")) + (" (chosen)" if epoch.get("epoch") == chosen else ""),
            escape(format_number(epoch.get("loss"))),
            escape(format_metric(metric, epoch.get(key))),
            escape(format_number(epoch.get("learning_rate"))),
            escape(format_number(epoch.get("images_per_second"))),
        )
        for epoch in epochs
    ]
    head = ("epoch", "loss", words, "learning rate at its end", "images/s")
    return render_section(
        _title("Training", runs, index),
        render_split(render_facts(facts), render_figure(plot_training(f"training-{index}", epochs, chosen, metric))),
        render_details("epochs as a table", render_table(head, rows, numeric=(1, 2, 3, 4))) if rows else "",
    )


def _list_rewinding(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the start of a training that did not start from the weights at hand, or not at the fine-tuning's rates."""
    epoch = record.get("rewind_epoch")
    if record.get("weights") not in (None, "inherited"):
        is_known = record["weights"] == "rewound" and epoch is not None
        yield "weights at the start", f"rewound to epoch {epoch:g}" if is_known else record["weights"]
    if record.get("rewind_schedule") is not None:
        is_tail = record["rewind_schedule"] == "tail" and epoch is not None
        yield "learning-rate schedule", f"tail from epoch {epoch:g}" if is_tail else "whole"


def _list_isometry(record: dict[str, Any], labels: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the mean singular value of the input-output Jacobian at some points of a stage."""
    isometry = record.get("isometry") or {}
    known = {name: isometry[name] for name in labels if isometry.get(name) is not None}
    if known:
        label = f"mean singular value of the Jacobian, {', '.join(labels[name] for name in known)}"
        yield label, " → ".join(map(format_number, known.values()))
    elif isometry.get("skipped"):
        yield "mean singular value of the Jacobian", f"not measured: {isometry['skipped']}"


def _say_average(record: dict[str, Any]) -> str | None:
    metric = metric_of(record)
    reached = record.get(f"averaged_{metric.name}")
    if reached is None:
        return None
    return f"{format_metric(metric, reached)}, {'taken' if record.get('is_averaged') else 'not taken'}"


def _say_probe(probe: dict[str, Any], metric: Metric) -> str:
    reached = probe.get(f"validation_{metric.name}")
    said = "diverged" if reached is None else format_metric(metric, reached)
    return f"{format_number(probe.get('learning_rate'))}: {said}"


def _change_of_quality(record: dict[str, Any]) -> str | None:
    """Return what a stage did to the figure that decides, on validation."""
    metric = metric_of(record)
    return _change(record, f"validation_{metric.name}", partial(format_metric, metric))


def _render_export(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    size, simplified = record.get("size_bytes"), record.get("simplified")
    facts = [
        ("opset", record.get("opset")),
        ("size", None if size is None else format_bytes(size)),
        ("nodes", _change(record, "nodes", format_count)),
        ("simplified", None if simplified is None else "yes" if simplified else "no"),
        ("files", ", ".join(str(file) for file in record.get("files") or []) or None),
    ]
    return render_section(_title("Export", runs, index), render_facts(facts))


def _render_quantize(runs: list[Run], index: int) -> str:
    record = runs[index]["record"]
    per_channel = record.get("per_channel")
    facts = [
        ("layers in INT8", record.get("layers")),
        ("layers in float", ", ".join(map(str, record.get("float_layers") or [])) or None),
        ("ranges", record.get("method")),
        ("calibration images", format_whole(record.get("images"))),
        ("a scale for each channel", None if per_channel is None else "yes" if per_channel else "no"),
        ("weights", _bits(record)),
        ("activations", record.get("activation_type")),
        ("same class as the float file, calibration images", _share(record.get("agreement"))),
        ("size", _change(record, "size_bytes", format_bytes)),
    ]
    return render_section(_title("Quantisation to INT8", runs, index), render_facts(facts))


def _bits(record: dict[str, Any]) -> str | None:
    kind = record.get("weight_type")
    return f"{kind}, 7 bits" if kind and record.get("reduce_range") else kind


def _title(text: str, runs: list[Run], index: int) -> str:
    """Return `text`, with the place in the pipeline where a stage occurs more than once."""
    repeated = sum(run.get("stage") == runs[index]["stage"] for run in runs) > 1
    return f"{text} (stage {index + 1} of {len(runs)})" if repeated else text


def _share(value: float | None) -> str | None:
    return None if value is None else format_share(value)


def _change(record: dict[str, Any], key: str, form: Any) -> str | None:
    before, after = record.get(f"{key}_before"), record.get(f"{key}_after")
    return None if before is None and after is None else f"{form(before)} → {form(after)}"


RENDERERS = {
    "load": _render_load,
    "prune": _render_prune,
    "slim": _render_slim,
    "low_rank": _render_low_rank,
    "finetune": _render_finetune,
    "export": _render_export,
    "quantize": _render_quantize,
}
