"""slim: TorchModel -> TorchModel with fewer channels, fewer blocks and factorised layers, under one budget.

    channels (and blocks)   alone, down to the budget
    ranks                   for a third, two thirds, all of the way; channels for the rest
    -> each network is cut, repaired, and timed if the target is a latency; the least validation loss wins

Estimates of damage of channels and of ranks have no common scale, so complete networks are compared. With
several steps the budget is approached in equal ratios, with some training in between.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from compress.checkpoint.layout import load_torch_model, save_torch_model
from compress.checkpoint.rebuild import example_input
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.prune import CutConfig, PruneConfig, SlimConfig
from compress.config.schema.repair import without_blocks
from compress.config.schema.targets import RankTargetConfig, TargetConfig
from compress.cost.macs import count_macs, count_params
from compress.cost.table_file import TableFile
from compress.errors import AlreadyWithin, ArtifactError, BudgetUnreachable, StageError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import LowRankRecord, PruneRecord, SlimRecord, SlimStep, SlimTrial
from compress.search.block_removal import Remembered, shorten
from compress.search.block_repair import repair_blocks
from compress.search.context import StageContext
from compress.search.training import train
from compress.search.validation import metric_of, validation_quality
from compress.stages.low_rank import LowRankStage
from compress.stages.prune import PruneStage
from compress.storage.digest import add_digest, digest_file, read_record
from compress.training.evaluate import evaluate_loss

RANK_SHARES = (1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class Slimmed:
    """A network within the budget.

    Attributes:
        model: The network.
        cut: Record of `prune`; None if only ranks were chosen.
        factorised: Record of `low_rank`; None if no ranks were chosen.
        loss: Loss on the validation split.
    """

    model: TorchModel
    cut: PruneRecord | None
    factorised: LowRankRecord | None
    loss: float


class SlimStage:
    """Stage that tries ways to share the budget between channels, blocks and ranks, and keeps the best.

    With several steps, it approaches the budget step by step.
    """

    def __init__(self, config: SlimConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, SlimRecord]:
        """Return the slim network; a killed run resumes after the last finished step.

        Raises:
            BudgetUnreachable: No way to share the budget meets it.
            As `PruneStage.run`.
        """
        example = example_input(artifact.signature)
        before = validation_quality(artifact.module, ctx)
        model, steps = artifact, []
        for number in range(1, self.config.steps + 1):
            if self.config.steps > 1:
                ctx.progress.note(f"step {number} of {self.config.steps}")
            model, step = self._step(model, number, ctx)
            steps.append(step)
        record = SlimRecord(
            metric=metric_of(ctx.data.validation),
            target=self.config.target.given(),
            moves=tuple(self.config.moves),
            steps=tuple(steps),
            macs_before=count_macs(artifact.module, example),
            macs_after=count_macs(model.module, example),
            params_before=count_params(artifact.module),
            params_after=count_params(model.module),
            validation_before=before,
            validation_after=validation_quality(model.module, ctx),
        )
        return model, record

    def profile(self, artifact: TorchModel, ctx: StageContext) -> TableFile:
        """Return the timed variants that a choice of channels would use, without choosing any.

        Raises:
            As `PruneStage.profile`.
        """
        return PruneStage(self._cut_config(1.0)).profile(artifact, ctx)

    def _step(self, model: TorchModel, number: int, ctx: StageContext) -> tuple[TorchModel, SlimStep]:
        """Slim once and train, or read the results of a killed run."""
        is_last = number == self.config.steps
        files = ctx.folder / f"step{number}_files"  # measurements of one network do not hold for the next
        files.mkdir(exist_ok=True)
        cut = _Saved(ctx.folder / f"step{number}", model)
        found = cut.read()
        if found is None:
            try:
                found = self._slim(model, number / self.config.steps, is_last, replace(ctx, folder=files))
            except AlreadyWithin as error:  # an earlier step or stage has met the budget
                if is_last and number == 1:
                    raise
                ctx.progress.note(f"step {number}: nothing to do. {error.message}")
                return model, SlimStep()
            if not is_last:
                cut.write(*found)
        if is_last or self.config.between is None:
            return found
        trained = _Saved(ctx.folder / f"step{number}_trained", model)
        after = trained.read()
        if after is None:
            slim, step = found
            with ctx.joint(number):
                slim, training = train(slim, self.config.between, ctx, f"step{number}.pt", reverts=False)
            after = slim, replace(step, training=training)
            trained.write(*after)
        return after

    def train(self, artifact: TorchModel, number: int, ctx: StageContext) -> None:
        """Train the network of a step along with the process that runs the stage.

        Args:
            artifact: Input of the stage.
            number: Number of the step, from 1; its network is in the stage's folder.
            ctx: Context of the stage.

        Raises:
            ArtifactError: The folder has no network of this step.
        """
        found = _Saved(ctx.folder / f"step{number}", artifact).read()
        if found is None or self.config.between is None:
            raise ArtifactError(
                f"All processes must read the network of step {number} in '{ctx.folder}', this one finds none.",
                hint="Keep the run folder on a file system that all machines see alike.",
            )
        train(found[0], self.config.between, ctx, f"step{number}.pt", reverts=False)

    def _slim(
        self, model: TorchModel, progress_made: float, is_last: bool, ctx: StageContext
    ) -> tuple[TorchModel, SlimStep]:
        """Return the best network within the budget of a step, and its record; `progress_made` as in `_with_share`."""
        trials: list[SlimTrial] = []
        found: list[Slimmed] = []
        unreachable: list[StageError] = []
        has_ranks = is_last and "ranks" in self.config.moves
        config = self.config
        images, refit_images, merges = config.score_images, config.refit_images, "merges" in config.moves
        networks = Remembered(shorten(model, images, config.repair, ctx, refit_images, merges=merges))
        for share in (0.0, *(RANK_SHARES if has_ranks else ())):
            try:
                one = self._with_share(model, networks, progress_made, share, found[0].cut if found else None, ctx)
            except StageError as error:
                may_ranks_help = isinstance(error, BudgetUnreachable) and not isinstance(error, AlreadyWithin)
                if share == 0 and not (has_ranks and may_ranks_help):
                    raise
                trials.append(SlimTrial(share=share, loss=None, reason=error.message))
                unreachable.append(error)
                continue
            found.append(one)
            trials.append(SlimTrial(share=share, loss=one.loss))
            if has_ranks:
                ctx.progress.note(f"ranks for {share:.0%} of the way: validation loss {one.loss:.4f} within the budget")
        if not found:
            raise unreachable[0]
        best = min(found, key=lambda one: math.inf if math.isnan(one.loss) else one.loss)
        repairs = repair_blocks(model, best.model, self.config.repair, self.config.block_repair, ctx)
        cut, factorised = best.cut, best.factorised
        if factorised is not None:
            factorised = replace(factorised, repairs=(*factorised.repairs, *repairs))
        elif cut is not None:
            cut = replace(cut, repairs=(*cut.repairs, *repairs))
        return best.model, SlimStep(trials=tuple(trials), prune=cut, low_rank=factorised)

    def _with_share(
        self,
        model: TorchModel,
        networks: Remembered,
        progress_made: float,
        share: float,
        alone: PruneRecord | None,
        ctx: StageContext,
    ) -> Slimmed:
        """Meet the budget with ranks for a share of the way, and channels and blocks for the rest.

        Args:
            model: The network.
            networks: The network with fewer and fewer blocks, as `shorten` yields it.
            progress_made: Part of the way to the target, in (0, 1]: the budget is the target to this power.
            share: Part of the way to the budget that ranks take, in [0, 1].
            alone: Record of channels and blocks alone, with the number of blocks to remove; None to search for it.
            ctx: Splits, parts and listener of the stage.

        Raises:
            BudgetUnreachable: The budget cannot be met with this share.
            StageError: No layer can be factorised.
        """
        cut: PruneRecord | None = None
        factorised: LowRankRecord | None = None
        if share < 1:
            config_of_cut = self._cut_config(progress_made * (1 - share), alone)
            model, cut = PruneStage(config_of_cut).run(model, ctx, networks)
        if share > 0:
            target = RankTargetConfig(**self._target(progress_made))
            config = LowRankConfig(
                stage="low_rank",
                target=target,
                allocation=self.config.rank_allocation,
                schemes=self.config.schemes,
                multiple_of=self.config.multiple_of,
            )
            model, factorised = LowRankStage(config).run(model, ctx)
        loss = evaluate_loss(model.module, ctx.data.validation, progress=ctx.progress)
        return Slimmed(model, cut, factorised, loss)

    def _cut_config(self, way: float, alone: PruneRecord | None = None) -> PruneConfig:
        """Return the settings of `prune` for a budget part of the way to the target; arguments as in `_target`."""
        shared = {name: getattr(self.config, name) for name in CutConfig.model_fields}
        shared |= {"repair": without_blocks(self.config.repair), "block_repair": None}
        blocks: int | Literal["auto"] = 0
        if "blocks" in self.config.moves:
            blocks = "auto" if alone is None else len(alone.removed_blocks) + len(alone.merged_blocks)
        target = TargetConfig(**self._target(way, alone))
        has_merges = "merges" in self.config.moves and blocks != 0
        return PruneConfig(stage="prune", **shared | {"target": target, "blocks": blocks, "merge": has_merges})

    def _target(self, way: float, alone: PruneRecord | None = None) -> dict[str, float]:
        """Return the budget part of the way from the baseline to the target: the target's share to the power `way`.

        A target in milliseconds needs the baseline's latency, from the record `alone` of channels and blocks.
        """
        given = self.config.target.given()
        if way == 1:
            return given
        if "latency_ms" in given:
            if alone is None or alone.latency is None:
                raise BudgetUnreachable("The baseline's milliseconds are not known: channels alone led nowhere.")
            given = {"latency": min(given["latency_ms"] / alone.latency.reference_ms, 1.0)}
        return {name: value**way for name, value in given.items()}


class _Saved:
    """Result of one part of a step, in a folder that is complete or absent after a kill.

    Args:
        folder: The folder, perhaps not created yet.
        like: Any model of the pipeline, for its factory.
    """

    def __init__(self, folder: Path, like: TorchModel) -> None:
        self.folder, self.factory = folder, like.factory

    def read(self) -> tuple[TorchModel, SlimStep] | None:
        """Return the result; None if it is missing or damaged."""
        try:
            values = read_record(self.folder / "record.json")
            if self._digests(self.folder) != values["files"]:
                return None
            step = SlimStep.from_dict(values["record"])
            return load_torch_model(self.folder, self.factory), step
        except (ArtifactError, KeyError):
            return None

    def write(self, model: TorchModel, step: SlimStep) -> None:
        part = self.folder.with_suffix(".part")
        for folder in (part, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
        save_torch_model(model, part)
        text = json.dumps(add_digest({"record": step.to_dict(), "files": self._digests(part)}))
        (part / "record.json").write_text(text, encoding="utf-8")
        part.rename(self.folder)

    @staticmethod
    def _digests(folder: Path) -> dict[str, str]:
        return {file.name: digest_file(file) for file in sorted(folder.iterdir()) if file.name != "record.json"}
