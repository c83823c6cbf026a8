"""Choice of the ranks of a network's layers: by one shared error, by ALDS or the energy rule, or by latency."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from compress.config.schema.low_rank import LowRankConfig
from compress.errors import BudgetUnreachable, ConfigValueError, InternalError, StageError
from compress.lowrank.allocations import allocate_ranks
from compress.lowrank.factorize import Moments
from compress.lowrank.layers import Positions
from compress.lowrank.ranks import LayerSpectra, Metric, RankChoice, choose_ranks, solve_relative_error
from compress.model.artifacts import ModelMetrics, TorchModel
from compress.model.recipe import Factorize
from compress.model.stage_records import RankLatencyRecord
from compress.model.tensors import weights_digest
from compress.search.context import StageContext
from compress.search.latency_loop import meet_latency, rounds_record
from compress.search.parts import Part
from compress.search.rank_inputs import measure_moments, measure_spectra
from compress.search.rank_latency import rank_latency

LABELS: dict[Metric, str] = {"macs": "MACs", "params": "params"}


@dataclass(frozen=True)
class RankDecision:
    """Schemes and ranks of a network's layers.

    Attributes:
        choices: Scheme and ranks of each layer that can be factorised.
        moments: Layer -> second moments of its inputs; empty where errors are of kernels.
        shared_error: Relative error that all layers share; None if ranks are chosen by another rule.
        latency: Record of the timing for a latency target, else None.
    """

    choices: tuple[RankChoice, ...]
    moments: dict[str, Moments]
    shared_error: float | None
    latency: RankLatencyRecord | None

    @property
    def edits(self) -> list[Factorize]:
        """Edits of the layers that are factorised."""
        return [Factorize(c.layer, c.scheme, c.ranks) for c in self.choices if c.scheme is not None]

    def to_part(self) -> Part:
        """Return the decision as a part of the stage."""
        kernels = {name: one.kernel for name, one in self.moments.items()}
        latency = self.latency and self.latency.to_dict()
        record = [[asdict(choice) for choice in self.choices], kernels, self.shared_error, latency]
        return Part(record, {name: one.matrix for name, one in self.moments.items()})

    @classmethod
    def from_part(cls, part: Part) -> "RankDecision":
        """Return the decision that a part holds."""
        choices, kernels, shared_error, latency = part.record
        return cls(
            tuple(RankChoice(**values | {"ranks": tuple(values["ranks"])}) for values in choices),
            {name: Moments(part.tensors[name], tuple(kernel)) for name, kernel in kernels.items()},
            shared_error,
            latency and RankLatencyRecord.from_dict(latency),
        )


@dataclass(frozen=True)
class RankChooser:
    """Chooser of ranks within the target.

    Attributes:
        config: Settings of the low-rank stage.
        found: Layers that can be factorised.
        total: Cost of the network, in the unit of the target.
        ctx: Splits, parts and listener of the stage.
    """

    config: LowRankConfig
    found: Mapping[str, Positions]
    total: int
    ctx: StageContext

    def decide_once(self, artifact: TorchModel) -> RankDecision:
        """Return the stored decision of an interrupted run, or make it with `decide`."""
        settings = self.config.model_dump(mode="json")
        key = {"part": "ranks", "of": weights_digest(artifact.module), "settings": settings}
        return RankDecision.from_part(self.ctx.parts.keep(key, lambda: self.decide(artifact).to_part()))

    def decide(self, artifact: TorchModel) -> RankDecision:
        """Choose the scheme and ranks of each layer by its weights.

        Raises:
            BudgetUnreachable: The target cannot be met, or the network is within it already.
            StageError: No layer gets cheaper at the given relative error.
        """
        config = self.config
        moments = measure_moments(artifact.module, self.found, config, self.ctx)
        spectra = measure_spectra(artifact.module, self.found, moments, config, self.ctx.progress)
        if config.target is not None and config.target.needs_latency:
            choices, latency = self._meet_latency(artifact, spectra, moments)
            return RankDecision(choices, moments, None, latency)
        if config.allocation != "shared_error":
            return RankDecision(self._allocate(artifact, spectra), moments, None, None)
        shared_error = self._shared_error(artifact, spectra)
        metric = rank_metric(config)
        choices = choose_ranks(spectra, shared_error, config.multiple_of, metric)
        _require_any(choices, spectra, shared_error, config.multiple_of, metric)
        return RankDecision(choices, moments, shared_error, None)

    def _meet_latency(
        self, artifact: TorchModel, spectra: Sequence[LayerSpectra], moments: Mapping[str, Moments]
    ) -> tuple[tuple[RankChoice, ...], RankLatencyRecord]:
        """Choose by measured latency, and time the choice until the target is met."""
        target, ctx, config = self.config.target, self.ctx, self.config
        assert target is not None
        if ctx.deploy is None:
            raise InternalError("A pipeline with a latency target passed validation without a deploy section.")
        if ctx.deploy.accept_foreign_table:
            raise ConfigValueError(
                "low_rank must measure on this machine to meet a latency target; a table of another one does not know "
                "factorised layers.",
                hint="Use a target of macs or params there.",
            )
        in_ms = target.latency_ms is not None
        model = rank_latency(artifact, spectra, moments, config.multiple_of, ctx.deploy, ctx, config.allocation)
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
        record = RankLatencyRecord(
            asked_ratio=asked,
            reference_ms=model.reference_ms,
            predicted_ratio=model.predict_ratio(selection.widths),
            measured_ratio=ratio,
            rounds=rounds_record(timed),
            is_optimal=selection.is_optimal,
        )
        return tuple((dense | free).values()), record

    def _shared_error(self, artifact: TorchModel, spectra: Sequence[LayerSpectra]) -> float:
        if self.config.relative_error is not None:
            return self.config.relative_error
        fixed, limit, baseline = self._budget(artifact, spectra)
        metric = rank_metric(self.config)
        return solve_relative_error(spectra, fixed, limit, self.config.multiple_of, metric, baseline)

    def _allocate(self, artifact: TorchModel, spectra: Sequence[LayerSpectra]) -> tuple[RankChoice, ...]:
        """Choose ranks by ALDS or the energy rule within a budget of MACs or params."""
        rule = self.config.allocation
        if rule == "shared_error":
            raise InternalError("Ranks by one shared error are solved by that error.")
        fixed, limit, baseline = self._budget(artifact, spectra)
        metric = rank_metric(self.config)
        return allocate_ranks(spectra, rule, fixed, limit, self.config.multiple_of, metric, baseline)

    def _budget(self, artifact: TorchModel, spectra: Sequence[LayerSpectra]) -> tuple[int, float, int]:
        """Return the cost of the layers that cannot be factorised, the limit of the total and the baseline's cost.

        Raises:
            BudgetUnreachable: The network is within the limit already.
        """
        metric = rank_metric(self.config)
        kept, baseline = rank_target(self.config, artifact.baseline.metrics)
        if self.total <= kept * baseline:
            raise BudgetUnreachable(
                f"The target must be below what the network has: it is at {self.total / baseline:.3f} of baseline "
                f"{LABELS[metric]} already, the target is {kept:.3f}; there is nothing to factorise.",
                hint="Lower the target, or leave the stage out.",
            )
        factorable = sum(layer.macs if metric == "macs" else layer.params for layer in spectra)
        return self.total - factorable, kept * baseline, baseline


def rank_metric(config: LowRankConfig) -> Metric:
    """Return the unit of the target: "params" for a target of params, else "macs"."""
    return "params" if config.target is not None and config.target.params is not None else "macs"


def rank_target(config: LowRankConfig, baseline: ModelMetrics) -> tuple[float, int]:
    """Return the target, as a share of the baseline's cost, and that cost."""
    target = config.target
    assert target is not None
    if target.macs is not None:
        return target.macs, baseline.macs
    assert target.params is not None
    return target.params, baseline.params


def _require_any(
    choices: Sequence[RankChoice],
    spectra: Sequence[LayerSpectra],
    shared_error: float,
    multiple_of: int,
    metric: Metric,
) -> None:
    """Raise StageError if no layer gets cheaper."""
    if any(choice.scheme is not None for choice in choices):
        return
    dense = sum(choice.cost(metric) for choice in choices)
    smallest = [choice.scheme for choice in choose_ranks(spectra, 1.0, multiple_of, metric)]
    if not any(smallest):
        hint = "Lower multiple_of, allow more schemes, exclude fewer layers, or leave the stage out."
    else:
        error = solve_relative_error(spectra, 0, dense - 1, multiple_of, metric)
        hint = f"The first layer gets cheaper at relative_error {error:.3f}; or lower multiple_of."
    raise StageError(
        f"At least one of {len(choices)} layers must get cheaper, at a shared relative error of "
        f"{shared_error:.3f} none does.",
        hint=hint,
    )
