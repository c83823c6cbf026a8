"""Schema of `prune` and `slim`: budget, criterion, allocation, repair."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from compress.catalog import (
    CRITERIA,
    METHODS,
    WITH_ERRORS,
    WITHOUT_ERRORS,
)
from compress.config.schema.base import Count, Names, Positive, Reference, Section, registered, to_tuple
from compress.config.schema.low_rank import (
    SCHEMES,
    RankAllocation,
    Schemes,
    check_alds_schemes,
    fill_schemes,
)
from compress.config.schema.methods import (
    METHOD_SETTINGS,
    CsgdConfig,
    GatesMethodConfig,
    GrdaConfig,
    GregConfig,
    GsmConfig,
    IncRegConfig,
    RegrowConfig,
    TppConfig,
)
from compress.config.schema.repair import CLOSED_FORM, BlockRepair, Repairs, check_block_repair
from compress.config.schema.targets import TargetConfig
from compress.config.schema.training import TrainingConfig, check_training


def _to_order(value: object) -> object:
    return "shuffled" if value == "random" else value  # name before version 0.1


def _check_blocks(value: object) -> object:
    if value in ("auto", "joint") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("must be a whole number of at least 0, auto or joint")


class TorchPruningConfig(Section):
    """Importance class of your own, written for torch-pruning."""

    torch_pruning: Reference = Field(
        description='subclass of torch_pruning.importance.Importance: "path/to/file.py:Class"'
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    gradients: Literal["none", "mean", "squares"] | None = Field(
        None,
        description="content of .grad: nothing, gradient of the mean loss, or mean of the squared gradients of single "
        "images; by default mean or squares for subclasses of torch-pruning's Taylor or Hessian class",
    )
    comparable: bool = Field(
        False,
        description="true: scores of all groups have one scale; otherwise those of each group are divided by their "
        "mean",
    )


def _criterion_kind(value: object) -> str:
    return "section" if isinstance(value, dict | Section) else "name"


Criterion = Annotated[
    Annotated[str, registered(CRITERIA), Tag("name")] | Annotated[TorchPruningConfig, Tag("section")],
    Discriminator(_criterion_kind),
]


class GroupLimitsConfig(Section):
    """Limits on the widths of some channel groups, in place of those of the stage."""

    multiple_of: Count | None = Field(None, description="widths are multiples of this if the group is wide enough")
    min_width: Count | None = Field(None, description="smallest number of kept channels")
    max_removed_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="largest removed ratio")

    def _check_rules(self) -> None:
        if all(value is None for value in (self.multiple_of, self.min_width, self.max_removed_ratio)):
            raise ValueError("must hold at least one of max_removed_ratio, min_width, multiple_of")


class CutConfig(Section):
    """Settings that `prune` and `slim` share: choice of channels under a budget, and repair."""

    target: TargetConfig
    criterion: Criterion = Field(
        "reconstruction", description="ranking of channels: a name, or an importance class of your own"
    )
    order: Annotated[Literal["criterion", "shuffled"], BeforeValidator(_to_order)] = Field(
        "criterion",
        description="order of removal in a group; shuffled: random order at the same widths, as a sanity check",
    )
    damage: Literal["scores", "errors", "sensitivity"] = Field(
        "scores",
        description="damage of narrowing a group: measure of the criterion, relative error of its refitted readers, "
        "or loss measured at each width",
    )
    allocation: Literal["global", "uniform", "shared_error"] = Field(
        "global",
        description="global: least total damage; uniform: same removed ratio of each group; shared_error: same bound "
        "on the damage of each group",
    )
    multiple_of: Count = Field(8, description="widths are multiples of this if the group is wide enough")
    min_width: Count = Field(1, description="smallest number of kept channels of a group")
    max_removed_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="largest removed ratio of a group")
    residual: Literal["auto", "cut", "keep"] = Field(
        "auto",
        description="channels of the residual stream: pruned like all others, kept, or (auto) the amount with the "
        "best validation loss",
    )
    residual_factors: Annotated[tuple[Positive, ...], BeforeValidator(to_tuple), Field(min_length=1)] = Field(
        (1e4, 4.0, 1.0),
        description="factors on the damage of the residual stream that residual: auto tries",
    )
    whole_networks: Annotated[int, Field(ge=4, le=10_000)] | None = Field(
        None,
        description="number of pruned and repaired networks whose losses calibrate the damages; by default 0, or 24 "
        "with blocks: joint",
    )
    only: Names = Field((), description="layers whose channel groups alone are pruned; * matches any text; [] for all")
    exclude: Names = Field((), description="layers whose channel groups are not pruned; * matches any text")
    limits: dict[str, GroupLimitsConfig] = Field(
        default_factory=dict,
        description='layer or pattern -> limits of its channel group, such as {"layer4.*": {min_width: 64}}; the last '
        "pattern that matches has precedence",
    )
    score_images: Count = Field(512, description="number of calibration images for criteria")
    images_per_gradient: Count = Field(
        8,
        description="batch size of one gradient in taylor scores; derivatives are averaged over it before they are "
        "squared",
    )
    refit_images: Count = Field(512, description="number of calibration images for the least-squares repair")
    repair: Repairs = Field(
        CLOSED_FORM,
        description="repairs after pruning, each kept only if it lowers the validation loss; scaling applies to "
        "criteria with factors for kept channels; [] for none; blocks alone stands for all, with block reconstruction "
        "as the last",
    )
    block_repair: BlockRepair = None

    def _check_rules(self) -> None:
        check_block_repair(self.repair, self.block_repair)
        if self.whole_networks is not None and self.allocation != "global":
            raise ValueError("allocation must be global where whole_networks is given")
        has_scores_alone = isinstance(self.criterion, TorchPruningConfig) or self.criterion in WITHOUT_ERRORS
        if self.damage == "errors" and has_scores_alone:
            named = self.criterion if isinstance(self.criterion, str) else "an importance of your own"
            raise ValueError(
                f"damage must be scores or sensitivity with {named}, which has no errors "
                f"({', '.join(WITH_ERRORS[:-1])} and {WITH_ERRORS[-1]} have)"
            )


class PruneConfig(CutConfig):
    """Remove channels and residual blocks down to a budget, then repair without training."""

    stage: Literal["prune"]
    blocks: Annotated[int | Literal["auto", "joint"], BeforeValidator(_check_blocks)] = Field(
        0,
        description="number of residual blocks to remove first, by least damage; auto: the best number, or the choice "
        "of the method; joint: blocks and widths in one problem",
    )
    merge: bool = Field(
        False,
        description="true: blocks may also be merged into one convolution, residual or not; blocks counts both",
    )
    method: Annotated[str, registered(METHODS)] | None = Field(
        None, description="training-time method that chooses the channels; by default scores choose them at once"
    )
    training: TrainingConfig | None = Field(None, description="training with that method")
    gsm: GsmConfig | None = Field(None, description="settings of that method")
    gates: GatesMethodConfig | None = Field(None, description="settings of that method")
    greg: GregConfig | None = Field(None, description="settings of that method")
    increg: IncRegConfig | None = Field(None, description="settings of that method")
    csgd: CsgdConfig | None = Field(None, description="settings of that method")
    grda: GrdaConfig | None = Field(None, description="settings of that method")
    regrow: RegrowConfig | None = Field(None, description="settings of that method")
    tpp: TppConfig | None = Field(None, description="settings of that method")

    @model_validator(mode="before")
    @classmethod
    def _resolve_residual(cls, values: Any) -> Any:
        """Set `residual` to cut for a method, which ranks the residual stream like all other groups."""
        if isinstance(values, dict) and values.get("method") is not None and "residual" not in values:
            return {**values, "residual": "cut"}
        return values

    @property
    def method_settings(self) -> Section | None:
        """Section of the method; None if it is left out, and for methods of plug-ins."""
        return getattr(self, self.method) if self.method in METHOD_SETTINGS else None

    @property
    def trials(self) -> int:
        """Number of networks that are pruned, repaired and evaluated before the choice."""
        return self.whole_networks or (JOINT_NETWORKS if self.blocks == "joint" else 0)

    @property
    def method_training(self) -> TrainingConfig | None:
        """Training with the method, with the momentum of the method if it sets one."""
        momentum = getattr(self.method_settings, "momentum", None)
        if self.training is None or momentum is None:
            return self.training
        return self.training.model_copy(update={"momentum": momentum})

    def _check_rules(self) -> None:
        super()._check_rules()
        check_training(self.method, self.training)
        if self.merge and self.blocks in (0, "joint"):
            raise ValueError(f"blocks must be auto or a number of blocks where merge is true, got {self.blocks}")
        if self.merge and self.method is not None:
            raise ValueError("merge must be false where a method decides")
        if self.method is not None and self.blocks == "joint":
            raise ValueError("blocks must not be joint where a method decides by scores of its own")
        if self.method is not None and self.whole_networks is not None:
            raise ValueError("whole_networks must be left out where a method decides by scores of its own")
        if self.blocks == "joint" and self.allocation != "global":
            raise ValueError("allocation must be global where blocks is joint")
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and self.method != name:
                raise ValueError(f"{name} must be left out unless it is the method")
        for name in ("criterion", "order", "damage"):
            if self.method is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} must be left out where a method decides by scores of its own")
        if self.method is not None and self.residual == "auto":
            raise ValueError("residual must be cut or keep where a method decides: auto compares networks cut at once")
        if self.method not in (None, "gates") and self.blocks == "auto":
            raise ValueError("blocks must be a number unless the method is gates, which alone decides about blocks")
        if self.training is not None and self.training.optimizer != "sgd":
            raise ValueError("training.optimizer must be sgd where a method decides: decays are sized for it")


JOINT_NETWORKS = 24


class SlimConfig(CutConfig):
    """Remove channels and residual blocks and factorise layers under one budget, in one or several steps."""

    stage: Literal["slim"]
    moves: Annotated[tuple[Literal["channels", "blocks", "merges", "ranks"], ...], BeforeValidator(to_tuple)] = Field(
        ("channels", "blocks", "ranks"),
        description="permitted edits; channels is required; merges lets blocks be merged into one convolution",
    )
    rank_allocation: RankAllocation = "shared_error"
    schemes: Schemes = SCHEMES
    steps: Count = Field(1, description="number of steps towards the target")
    between: TrainingConfig | None = Field(None, description="training between two steps")

    @model_validator(mode="before")
    @classmethod
    def _resolve_schemes(cls, values: Any) -> Any:
        return fill_schemes(values, "rank_allocation")

    def _check_rules(self) -> None:
        super()._check_rules()
        check_alds_schemes(self.rank_allocation, self.schemes)
        if "merges" in self.moves and "blocks" not in self.moves:
            raise ValueError("moves must hold blocks where they hold merges")
        if "channels" not in self.moves:
            raise ValueError("moves must hold channels; for ranks alone there is the stage low_rank")
        given = list(self.target.given())
        if "ranks" in self.moves and (len(given) > 1 or "size_mb" in given):
            raise ValueError("target must hold latency, latency_ms, macs or params alone while moves hold ranks")
        if self.steps > 1 and not set(given) <= {"latency", "macs", "params"}:
            raise ValueError("target must be in shares (latency, macs, params) while steps is above 1")
        if self.steps > 1 and self.between is None:
            raise ValueError("steps must be 1 without between, which says how to train from step to step")
        if self.steps == 1 and self.between is not None:
            raise ValueError("between must be left out while steps is 1")
