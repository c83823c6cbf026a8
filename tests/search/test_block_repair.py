"""Block reconstruction within a stage: which images it sees, what it is a part of, when it is rolled back."""

import copy
from dataclasses import replace

import nets
import pytest
import torch
from exported import exported
from fixtures import make_saved_model, make_splits
from torch import fx

from compress.checkpoint.rebuild import apply_edits
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.prune import SlimConfig
from compress.config.schema.repair import BlockRepairConfig
from compress.config.schema.targets import RankTargetConfig, TargetConfig
from compress.data.batches import evaluation_batches
from compress.model.recipe import Recipe, RemoveChannels
from compress.model.stage_records import RepairedBlock
from compress.onnx_import.importer import build_imported
from compress.progress import SilentProgress
from compress.pruning.trial import find_cuttable
from compress.search import block_repair
from compress.search.context import StageContext
from compress.search.teacher import BaselineTeacher
from compress.stages.low_rank import LowRankStage
from compress.stages.slim import SlimStage
from compress.training.evaluate import image_losses

QUICK = BlockRepairConfig(images=48, steps=30, batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def ctx(data, tmp_path):
    return StageContext(tmp_path, 0, data, SilentProgress())


def _halved(model):
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    edit = RemoveChannels({one.name: tuple(range(one.width // 2)) for one in groups.values()})
    slim = apply_edits(copy.deepcopy(model.module), Recipe((edit,)), nets.EXAMPLE).eval()
    return replace(model, module=slim, recipe=model.recipe.then(edit))


@pytest.mark.parametrize("name", ["residual", "chain"])
def test_validation_loss_is_recorded_and_no_worse(ctx, name):
    before = make_saved_model(name, ctx.folder)
    after = _halved(before)
    start = float(image_losses(after.module, ctx.data.validation).mean())
    (record,) = block_repair.repair_blocks(before, after, ["blocks"], QUICK, ctx)
    assert record.loss_before == start
    end = float(image_losses(after.module, ctx.data.validation).mean())
    assert end == (record.loss_after if record.is_kept else start)
    assert not any(one.requires_grad is False for one in after.module.parameters())


def test_nothing_is_done_unless_it_is_asked_for(ctx):
    before = make_saved_model("residual", ctx.folder)
    after = _halved(before)
    state = copy.deepcopy(after.module.state_dict())
    assert block_repair.repair_blocks(before, after, ["least_squares", "batch_norm"], None, ctx) == []
    assert all(torch.equal(values, state[key]) for key, values in after.module.state_dict().items())


def test_blocks_that_raise_the_validation_loss_are_rolled_back(ctx, monkeypatch):
    before = make_saved_model("residual", ctx.folder)
    after = _halved(before)
    state = copy.deepcopy(after.module.state_dict())

    def ruin(module, *_):
        with torch.no_grad():
            for one in module.parameters():
                one.mul_(30)
        return [RepairedBlock("all", 1.0, 0.5, True)]

    monkeypatch.setattr(block_repair, "_reconstruct", ruin)
    (record,) = block_repair.repair_blocks(before, after, ["blocks"], QUICK, ctx)
    assert not record.is_kept
    assert all(torch.equal(values, state[key]) for key, values in after.module.state_dict().items())


def test_images_come_from_calibration_then_from_train_and_never_from_validation(ctx):
    found = torch.cat(block_repair._images(40, ctx))
    assert len(found) == 40
    of = {
        name: {images.numpy().tobytes() for batch, _ in evaluation_batches(split, 16, "nothing") for images in batch}
        for name, split in (("calibration", ctx.data.calibration), ("train", ctx.data.train))
    }
    seen = [image.numpy().tobytes() for image in found]
    assert sum(one in of["calibration"] for one in seen) == 32
    assert sum(one in of["train"] for one in seen) == 8
    assert torch.equal(found, torch.cat(block_repair._images(40, ctx)))


def test_fewer_images_are_used_where_memory_is_short(ctx, monkeypatch):
    before = make_saved_model("residual", ctx.folder)
    counts = []
    images = block_repair._images
    monkeypatch.setattr(block_repair, "_MEMORY", 5 * 4 * 4 * 16 * 16 * 16)
    monkeypatch.setattr(block_repair, "_images", lambda count, ctx: counts.append(count) or images(count, ctx))
    block_repair.repair_blocks(before, _halved(before), ["blocks"], QUICK, ctx)
    assert 2 <= counts[0] < QUICK.images


def test_low_rank_repairs_blocks(ctx):
    settings = {"target": RankTargetConfig(macs=0.5), "multiple_of": 1, "repair": "blocks", "block_repair": QUICK}
    slim, record = LowRankStage(LowRankConfig(stage="low_rank", **settings)).run(
        make_saved_model("residual", ctx.folder), ctx
    )
    assert [one.repair for one in record.repairs] == ["batch_norm", "blocks"]
    assert any(block.error_after < block.error_before for block in record.repairs[-1].blocks)
    replayed = apply_edits(nets.build("residual", seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)


def test_slim_repairs_blocks_of_the_network_it_keeps_alone(ctx, monkeypatch):
    calls = []
    repair = block_repair.repair_blocks
    monkeypatch.setattr("compress.stages.slim.repair_blocks", lambda *args: calls.append(args) or repair(*args))
    config = SlimConfig(
        stage="slim", target=TargetConfig(macs=0.5), multiple_of=1, moves=("channels", "ranks"), score_images=16,
        repair="blocks", block_repair=QUICK,
    )  # fmt: skip
    model = make_saved_model("residual", ctx.folder)
    slim, record = SlimStage(config).run(model, replace(ctx, teacher=BaselineTeacher(model)))
    assert len(calls) == 1
    (step,) = record.steps
    records = [one for part in (step.prune, step.low_rank) if part is not None for one in part.repairs]
    assert [one.repair for one in records].count("blocks") == 1
    replayed = apply_edits(nets.build("residual", seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)


def test_a_network_read_from_a_file_is_repaired_by_segments_of_its_graph(ctx):
    module = build_imported(exported("residual"))
    assert isinstance(module, fx.GraphModule)
    before = make_saved_model("residual", ctx.folder, module)
    after = _halved(before)
    (record,) = block_repair.repair_blocks(before, after, ["blocks"], QUICK, ctx)
    assert len(record.blocks) >= 2
    assert any(block.is_kept for block in record.blocks)
    assert all(" to " in block.name for block in record.blocks)
