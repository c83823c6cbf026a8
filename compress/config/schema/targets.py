"""Schema of budgets: `target` of `prune`, `low_rank` and `slim`."""

from pydantic import Field

from compress.config.schema.base import KeptRatio, Section


class RankTargetConfig(Section):
    """Budget of one quantity: kept ratio of the baseline, or milliseconds."""

    latency: KeptRatio | None = Field(
        None, description="kept ratio of the baseline's latency, measured as `deploy` says"
    )
    latency_ms: float | None = Field(None, gt=0, description="milliseconds per call, measured as `deploy` says")
    macs: KeptRatio | None = Field(None, description="kept ratio of the baseline's MACs")
    params: KeptRatio | None = Field(None, description="kept ratio of the baseline's params")

    def _check_rules(self) -> None:
        if len(self.given()) != 1:
            raise ValueError(f"must hold exactly one of {', '.join(type(self).model_fields)}")

    def given(self) -> dict[str, float]:
        """Return the limited quantities and their limits, in a fixed order."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def needs_latency(self) -> bool:
        """True if the budget limits latency."""
        return self.latency is not None or self.latency_ms is not None


class TargetConfig(RankTargetConfig):
    """Budget of one or several quantities, all of which must be met."""

    size_mb: float | None = Field(None, gt=0, description="size of the ONNX file, in 10^6 bytes")

    def _check_rules(self) -> None:
        if not self.given():
            raise ValueError(f"must hold at least one of {', '.join(type(self).model_fields)}")
