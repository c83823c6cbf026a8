"""Schema of budgets: `target` of `prune`, `low_rank` and `slim`."""

from pydantic import Field

from compress.config.schema.base import KeptRatio, Section


class RankTargetConfig(Section):
    """What must not be exceeded: a share kept of the baseline, or milliseconds. Exactly one."""

    latency: KeptRatio | None = Field(None, description="kept share of the baseline's latency, where `deploy` says")
    latency_ms: float | None = Field(None, gt=0, description="milliseconds a call, where `deploy` says")
    macs: KeptRatio | None = Field(None, description="kept share of the baseline's MACs")
    params: KeptRatio | None = Field(None, description="kept share of the baseline's params")

    def _check_rules(self) -> None:
        if len(self.given()) != 1:
            raise ValueError(f"must hold exactly one of {', '.join(type(self).model_fields)}")

    def given(self) -> dict[str, float]:
        """Return the quantities that are limited, in a fixed order."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def needs_latency(self) -> bool:
        """Whether latencies have to be known to meet it."""
        return self.latency is not None or self.latency_ms is not None


class TargetConfig(RankTargetConfig):
    """What must not be exceeded: shares are of the baseline. At least one; all that are given hold."""

    size_mb: float | None = Field(None, gt=0, description="size of the ONNX file, in 10^6 bytes")

    def _check_rules(self) -> None:
        if not self.given():
            raise ValueError(f"must hold at least one of {', '.join(type(self).model_fields)}")
