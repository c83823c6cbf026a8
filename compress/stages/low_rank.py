"""The low-rank stage: replace kernels by products of smaller ones, where that is cheaper.

Ranks come from one relative error that all layers share, given or solved from a budget; or, within a budget, from ALDS
or the energy-against-cost rule (`lowrank/allocations.py`). Batch-norm statistics are re-estimated on calibration images
afterwards.
"""

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from compress.catalog import closest
from compress.checkpoint.rebuild import example_input
from compress.config.schema.low_rank import LowRankConfig, TrpConfig
from compress.cost.macs import count_params, layer_macs
from compress.errors import BudgetUnreachable, ConfigValueError, InternalError, StageError
from compress.lowrank.allocations import allocate_ranks
from compress.lowrank.factorize import Moments
from compress.lowrank.layers import Positions, find_layers, layer_spectra
from compress.lowrank.ranks import LayerSpectra, Metric, RankChoice, choose_ranks, solve_relative_error
from compress.lowrank.surgery import factorized_copy
from compress.lowrank.trp import TrainedRank
from compress.model.artifacts import TorchModel
from compress.model.recipe import Factorize
from compress.progress import Progress, SilentProgress
from compress.pruning.ranking.elimination import layer_statistics
from compress.search.context import Record, StageContext
from compress.search.hooked_training import loss_and_quality, say_cut, train_with_hooks
from compress.search.latency_loop import meet_latency, rounds_record
from compress.search.parts import Part, weights_digest
from compress.search.rank_latency import rank_latency
from compress.search.repairs import apply_repairs, batch_norm_repair
from compress.search.validation import before_and_after, metric_of, validation_quality

STATE_FILE = "method.pt"
_LABELS: dict[Metric, str] = {"macs": "MACs", "params": "params"}


@dataclass(frozen=True)
class _Decision:
    """What the layers become.

    Attributes:
        choices: One for each layer that can be factorised.
        moments: Layer -> what it reads, where errors are of outputs.
        shared_error: The relative error that all layers share, where ranks follow from one.
        latency: What the report tells of the timing, where they follow from that.
    """

    choices: tuple[RankChoice, ...]
    moments: dict[str, Moments]
    shared_error: float | None
    latency: Record | None

    @property
    def edits(self) -> list[Factorize]:
        """What is done to the network."""
        return [Factorize(c.layer, c.scheme, c.ranks) for c in self.choices if c.scheme is not None]


class LowRankStage:
    """Factorise convolutions and linear layers.

    Args:
        config: Checked section of the pipeline file.
    """

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config
        self.metric: Metric = "params" if config.target is not None and config.target.params is not None else "macs"

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, Record]:
        """Return the factorised network and what was done to each layer.

        Raises:
            BudgetUnreachable: The target cannot be met; says the best reachable.
            StageError: Nothing would be factorised, or an exclude pattern matches no layer.
            NonFinite: A weight is not finite.
        """
        example = example_input(artifact.signature)
        found, reasons = find_layers(artifact.module, example)
        found, reasons = self._exclude(found, reasons)
        macs_before, params_before = layer_macs(artifact.module, example), count_params(artifact.module)
        total = sum(macs_before.values()) if self.metric == "macs" else params_before
        decision, learned = self._decided(artifact, found, total, ctx), None
        if self.config.method is not None:
            artifact, decision, learned = self._train(artifact, decision, found, total, ctx)
        choices = decision.choices
        before = validation_quality(artifact.module, ctx)
        edits = decision.edits
        with ctx.progress.task("factorise", 1) as task:
            slim, errors = factorized_copy(artifact.module, edits, decision.moments)
            task.advance()
        slim.eval()
        if learned is not None:
            layer, error = max(errors.items(), key=lambda item: item[1])
            cause = f"Kernels were up to {error:.1%} away from their rank ('{layer}'); more steps, or more trp.strength"
            learned |= {"cause": f"{cause}, would help.", **loss_and_quality(slim, "after_cut", ctx)}
            say_cut(learned, metric_of(ctx.data.validation), ctx.progress)
        repairs = self._repaired(slim, ctx)
        after = validation_quality(slim, ctx)
        macs_after = layer_macs(slim, example)
        record: Record = {
            "layers": _layer_records(choices, errors, macs_before, macs_after),
            "dense": self._dense_records(choices, reasons, macs_before),
            "macs_before": sum(macs_before.values()),
            "macs_after": sum(macs_after.values()),
            "params_before": params_before,
            "params_after": count_params(slim),
            **before_and_after(ctx, before, after),
            "shared_relative_error": decision.shared_error,
            "allocation": self.config.allocation,
            "largest_bound": self._largest_bound(choices),
            "repairs": repairs,
            "latency": decision.latency,
            "method": learned,
        }
        metric = metric_of(ctx.data.validation)
        said = f"{metric.words} {metric.show(before)} -> {metric.show(after)}"
        self._state_result(artifact, record, said, ctx.progress)
        return replace(artifact, module=slim, recipe=artifact.recipe.then(*edits)), record

    def _decided(self, artifact: TorchModel, found: dict[str, Positions], total: int, ctx: StageContext) -> "_Decision":
        """Return what `_decide` does, or what an interrupted run has chosen and timed."""

        def decide() -> Part:
            made = self._decide(artifact, found, total, ctx)
            kernels = {name: one.kernel for name, one in made.moments.items()}
            record = [[asdict(choice) for choice in made.choices], kernels, made.shared_error, made.latency]
            return Part(record, {name: one.matrix for name, one in made.moments.items()})

        settings = self.config.model_dump(mode="json")
        part = ctx.parts.keep({"part": "ranks", "of": weights_digest(artifact.module), "settings": settings}, decide)
        choices, kernels, shared_error, latency = part.record
        return _Decision(
            tuple(RankChoice(**values | {"ranks": tuple(values["ranks"])}) for values in choices),
            {name: Moments(part.tensors[name], tuple(kernel)) for name, kernel in kernels.items()},
            shared_error,
            latency,
        )

    def _repaired(self, slim: nn.Module, ctx: StageContext) -> list[Record]:
        """Repair a factorised network in place, or give it the state that an interrupted run has repaired it to."""

        def repair() -> Part:
            return Part(apply_repairs(slim, [batch_norm_repair(ctx)], ctx), slim.state_dict())

        part = ctx.parts.keep({"part": "low_rank", "of": weights_digest(slim)}, repair)
        slim.load_state_dict(part.tensors)
        repairs: list[Record] = part.record
        return repairs

    def _decide(self, artifact: TorchModel, found: dict[str, Positions], total: int, ctx: StageContext) -> "_Decision":
        """Choose what each layer becomes by its weights, within the target.

        Args:
            artifact: The network.
            found: Its layers that can be factorised.
            total: What it costs, in the unit of the target.
            ctx: Surroundings.
        """
        moments = self._measure_moments(artifact.module, found, ctx)
        spectra = self._measure_spectra(artifact.module, found, moments, ctx.progress)
        if self.config.target is not None and self.config.target.needs_latency:
            choices, latency = self._meet_latency(artifact, spectra, moments, ctx)
            return _Decision(choices, moments, None, latency)
        if self.config.allocation != "shared_error":
            return _Decision(self._allocate(artifact, spectra, total), moments, None, None)
        shared_error = self._shared_error(artifact, spectra, total)
        choices = choose_ranks(spectra, shared_error, self.config.multiple_of, self.metric)
        self._check_any(choices, spectra, shared_error)
        return _Decision(choices, moments, shared_error, None)

    def _train(
        self, artifact: TorchModel, first: "_Decision", found: dict[str, Positions], total: int, ctx: StageContext
    ) -> tuple[TorchModel, "_Decision", Record]:
        """Train the network towards low rank; return it, what its layers become, and what the report tells.

        Ranks that a latency decides are those of before the training; others follow the weights.
        """
        training, options = self.config.training, self.config.trp or TrpConfig()
        if training is None:
            raise InternalError("A pipeline with a method but no training passed validation.")
        trained = replace(artifact, module=copy.deepcopy(artifact.module))
        quiet = replace(ctx, progress=SilentProgress())

        def decide() -> _Decision:
            return first if first.latency is not None else self._decide(trained, found, total, quiet)

        hooks = TrainedRank(trained.module, lambda: decide().edits, options.interval, options.strength)
        record = train_with_hooks(trained.module, artifact, training, hooks, ctx.folder / STATE_FILE, ctx)
        return trained, decide(), {"name": hooks.name, "figures": {}, **record}

    def _exclude(
        self, found: dict[str, Positions], reasons: dict[str, str]
    ) -> tuple[dict[str, Positions], dict[str, str]]:
        reasons, excluded = dict(reasons), set()
        names = [*found, *reasons]
        for pattern in self.config.exclude:
            matches = [name for name in names if fnmatchcase(name, pattern)]
            if not matches:
                raise StageError(
                    f"exclude pattern '{pattern}' must match a convolution or linear layer, it matches none of "
                    f"{len(names)}.",
                    hint=closest(pattern, names) or f"layers are named {', '.join(names[:5])}.",
                )
            excluded.update(matches)
            reasons.update((name, f"is excluded by '{pattern}'") for name in matches)
        return {name: places for name, places in found.items() if name not in excluded}, reasons

    def _measure_moments(self, module: nn.Module, found: Container[str], ctx: StageContext) -> dict[str, Moments]:
        """Return what layers read on calibration images, for those whose error is to be that of their outputs."""
        if self.config.error_of == "kernels":
            return {}
        names = [name for name, _ in module.named_modules() if name in found]
        split = ctx.data.calibration.first(self.config.score_images)
        moments: dict[str, Moments] = {}
        for stats in layer_statistics(module, names, split, ctx.progress):
            for name, one in stats.items():
                weight = module.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                inputs = weight[0].numel()
                moments[name] = Moments(one.gram[:inputs, :inputs], tuple(weight.shape[1:]))
        return moments

    def _measure_spectra(
        self, module: nn.Module, found: dict[str, Positions], moments: Mapping[str, Moments], progress: Progress
    ) -> list[LayerSpectra]:
        spectra = []
        with progress.task("singular values", max(1, len(found))) as task:
            for name, places in found.items():
                layer = module.get_submodule(name)
                with_norms = self.config.allocation == "alds"
                spectra.append(layer_spectra(name, layer, places, self.config.schemes, moments.get(name), with_norms))
                task.advance(1)
        return spectra

    def _meet_latency(
        self,
        artifact: TorchModel,
        spectra: Sequence[LayerSpectra],
        moments: Mapping[str, Moments],
        ctx: StageContext,
    ) -> tuple[tuple[RankChoice, ...], Record]:
        """Choose by measured latency, and time the choice until the target is met."""
        target = self.config.target
        assert target is not None
        if ctx.deploy is None:
            raise InternalError("A pipeline with a latency target passed validation without a deploy section.")
        if ctx.deploy.accept_foreign_table:
            raise ConfigValueError(
                "low_rank must measure on this machine to meet a latency target; a table of another one does not know "
                "factorised layers.",
                hint="Use a target of macs or params there.",
            )
        multiple_of, allocation = self.config.multiple_of, self.config.allocation
        in_ms = target.latency_ms is not None
        model = rank_latency(artifact, spectra, moments, multiple_of, ctx.deploy, ctx, allocation)
        model = replace(model, in_ms=in_ms)
        asked = target.latency if target.latency is not None else (target.latency_ms or 0.0) / model.reference_ms
        selection, timed = meet_latency(
            lambda correction: model.select(asked * correction * model.reference_ms), model, asked, ctx.progress, in_ms
        )
        choices = model.chosen(selection.widths)
        ratio = next(choice.ratio for choice in reversed(timed) if choice.widths == selection.widths)
        if not any(choice.scheme for choice in choices):
            raise BudgetUnreachable(
                f"The target must be below what the network takes: it takes {ratio:.3f} of the baseline's "
                f"latency already, the target is {asked:.3f}; there is nothing to factorise.",
                hint="Lower the target, or leave the stage out.",
            )
        free = {choice.layer: choice for choice in choices}
        dense = {s.layer: RankChoice(s.layer, None, (), 0.0, s.macs, s.params) for s in spectra}
        record = {
            "asked_ratio": asked,
            "reference_ms": model.reference_ms,
            "predicted_ratio": model.predict_ratio(selection.widths),
            "measured_ratio": ratio,
            "rounds": rounds_record(timed),
            "is_optimal": selection.is_optimal,
        }
        return tuple((dense | free).values()), record

    def _shared_error(self, artifact: TorchModel, spectra: Sequence[LayerSpectra], total: int) -> float:
        if self.config.relative_error is not None:
            return self.config.relative_error
        fixed, limit, baseline = self._budget(artifact, spectra, total)
        return solve_relative_error(spectra, fixed, limit, self.config.multiple_of, self.metric, baseline)

    def _allocate(self, artifact: TorchModel, spectra: Sequence[LayerSpectra], total: int) -> tuple[RankChoice, ...]:
        """Choose ranks by ALDS or the energy rule within a budget of MACs or params."""
        rule = self.config.allocation
        if rule == "shared_error":
            raise InternalError("Ranks by one shared error are solved by that error.")
        fixed, limit, baseline = self._budget(artifact, spectra, total)
        return allocate_ranks(spectra, rule, fixed, limit, self.config.multiple_of, self.metric, baseline)

    def _largest_bound(self, choices: Sequence[RankChoice]) -> float | None:
        """Return the largest bound of an operator norm, which ALDS minimises; None for other allocations."""
        return (
            max((choice.error_bound for choice in choices), default=None) if self.config.allocation == "alds" else None
        )

    def _budget(self, artifact: TorchModel, spectra: Sequence[LayerSpectra], total: int) -> tuple[int, float, int]:
        """Return the cost of the layers that cannot be factorised, the limit of the total and the baseline's cost.

        Raises:
            BudgetUnreachable: The network is within the limit already.
        """
        kept, baseline = self._target(artifact)
        if total <= kept * baseline:
            raise BudgetUnreachable(
                f"The target must be below what the network has: it is at {total / baseline:.3f} of baseline "
                f"{_LABELS[self.metric]} already, the target is {kept:.3f}; there is nothing to factorise.",
                hint="Lower the target, or leave the stage out.",
            )
        factorable = sum(layer.macs if self.metric == "macs" else layer.params for layer in spectra)
        return total - factorable, kept * baseline, baseline

    def _target(self, artifact: TorchModel) -> tuple[float, int]:
        """Return the kept ratio asked for and the baseline's cost that it is relative to."""
        target, figures = self.config.target, artifact.baseline.figures
        assert target is not None
        if target.macs is not None:
            return target.macs, figures.macs
        assert target.params is not None
        return target.params, figures.params

    def _check_any(self, choices: Sequence[RankChoice], spectra: Sequence[LayerSpectra], shared_error: float) -> None:
        if any(choice.scheme is not None for choice in choices):
            return
        dense = sum(choice.cost(self.metric) for choice in choices)
        smallest = [choice.scheme for choice in choose_ranks(spectra, 1.0, self.config.multiple_of, self.metric)]
        if not any(smallest):
            hint = "Lower multiple_of, allow more schemes, exclude fewer layers, or leave the stage out."
        else:
            error = solve_relative_error(spectra, 0, dense - 1, self.config.multiple_of, self.metric)
            hint = f"The first layer gets cheaper at relative_error {error:.3f}; or lower multiple_of."
        raise StageError(
            f"At least one of {len(choices)} layers must get cheaper, at a shared relative error of "
            f"{shared_error:.3f} none does.",
            hint=hint,
        )

    def _dense_records(
        self, choices: Sequence[RankChoice], reasons: dict[str, str], macs: dict[str, int]
    ) -> list[dict[str, str]]:
        reason = f"has no scheme with fewer {_LABELS[self.metric]} at this error"
        if self.config.allocation != "shared_error":
            reason = f"need not be factorised for the budget, or has no scheme with fewer {_LABELS[self.metric]}"
        if self.config.target is not None and self.config.target.needs_latency:
            reason = "need not be factorised for the budget, or has no factorisation that is faster"
        costly = {choice.layer: reason for choice in choices if not choice.scheme}
        reasons = {**reasons, **costly}
        return [{"layer": name, "reason": reasons[name]} for name in macs if name in reasons]

    def _state_result(self, artifact: TorchModel, record: Record, quality: str, progress: Progress) -> None:
        if self.config.target is not None and not self.config.target.needs_latency:
            kept, baseline = self._target(artifact)
            reached = record[f"{self.metric}_after"]
            if reached > kept * baseline:
                raise InternalError(f"Factorisation ended at {reached} {self.metric}, above {kept} of {baseline}.")
            progress.note(f"target {kept:.3f} of baseline {_LABELS[self.metric]}: reached {reached / baseline:.3f}")
        progress.note(
            f"{len(record['layers'])} layers factorised, {len(record['dense'])} stay dense; MACs "
            f"{record['macs_before']:,} -> {record['macs_after']:,}, validation {quality} before fine-tuning"
        )


def _layer_records(
    choices: Sequence[RankChoice], errors: dict[str, float], before: dict[str, int], after: dict[str, int]
) -> list[dict[str, Any]]:
    return [
        {
            "layer": choice.layer,
            "scheme": choice.scheme,
            "ranks": list(choice.ranks),
            "relative_error": errors[choice.layer],
            "macs_before": before[choice.layer],
            "macs_after": sum(macs for name, macs in after.items() if name.startswith(f"{choice.layer}.")),
        }
        for choice in choices
        if choice.scheme is not None
    ]
