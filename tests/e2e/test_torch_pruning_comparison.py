"""The comparison with torch-pruning runs on a network with zero-padded shortcuts, goes on where it was, and is fair."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from smallrun import MIDDLE, Notes, World, make_world
from steady import _total_ms, profile_by_macs

ROOT = Path(__file__).parents[2]
FACTORY = ROOT / "models" / "cifar_resnet" / "model.py"
MODULES = ("made", "published_resnet56", "torch_pruning_cuts", "torch_pruning_steps", "torch_pruning_table")
BUDGET = 0.75


@pytest.fixture
def benchmark(monkeypatch):
    """The program, which lies outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("against_torch_pruning")
    for name in (*MODULES, "against_torch_pruning"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def padded_world(tmp_path_factory) -> World:
    """Small images, a ResNet-8 with zero-padded shortcuts, and a pipeline with a target of latency."""
    world = make_world(tmp_path_factory.mktemp("padded"))
    sys.path.insert(0, str(FACTORY.parent))
    try:
        torch.manual_seed(0)
        module = importlib.import_module("model").resnet(depth=8, num_classes=4)
    finally:
        sys.path.remove(str(FACTORY.parent))
        sys.modules.pop("model", None)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    save_file(module.state_dict(), world.folder / "resnet8.safetensors")
    return world


def _bench(benchmark, world: World, folder: Path, seed: int = 0):
    prune = {"stage": "prune", "target": {"latency": BUDGET}, "score_images": 32}
    finetune = {**MIDDLE[1], "steps": 4, "distillation": {"weight": 0.5, "temperature": 2.0, "features": 1.0}}
    values = world.values("resnet8", middle=(prune, finetune)) | {"deploy": {"threads": 1, "batch_size": 1}}
    values["stages"][0]["model"] = {"factory": f"{FACTORY}:resnet", "kwargs": {"depth": 8, "num_classes": 4}}
    return benchmark.Bench(world.load(values), folder, seed, Notes())


@pytest.fixture
def bench(benchmark, padded_world, tmp_path, monkeypatch):
    """One seed; files take as long as their MACs say."""
    profile_by_macs(monkeypatch)
    steps = sys.modules["torch_pruning_steps"]
    monkeypatch.setattr(steps, "measure_ratio", lambda path, other, *_: _total_ms(path) / _total_ms(other))
    return _bench(benchmark, padded_world, tmp_path / "comparison")


def _settings(benchmark):
    make = sys.modules["torch_pruning_cuts"].Setting
    return [
        make("magnitude", "local", None, streams=True),
        make("taylor", "global", 8, streams=False),
        make("taylor", "isomorphic", None, streams=True, steps=2),
        make("magnitude", "global", None, streams=True, sparse=True),
    ]


def test_the_whole_comparison_runs_and_goes_on_where_it_was(benchmark, bench, tmp_path, monkeypatch, capsys):
    document, table = tmp_path / "README.md", sys.modules["torch_pruning_table"]
    document.write_text("# x\n<!-- torch-pruning: begin -->\n<!-- torch-pruning: end -->\nrest\n", encoding="utf-8")
    cuts = tmp_path / "cuts.md"
    cuts.write_text("<!-- cuts: begin -->\n<!-- cuts: end -->\n", encoding="utf-8")
    monkeypatch.setattr(table, "SITTINGS", 2)
    monkeypatch.setattr(table, "ROUNDS", 2)
    monkeypatch.setattr(sys.modules["torch_pruning_steps"], "RATIOS", (0.5,))
    settings = _settings(benchmark)[2:3]  # each step exports a file; the other settings have tests of their own
    comparison = benchmark.Comparison([bench], settings)
    arguments = argparse.Namespace(picture=tmp_path / "picture.svg", write=document, write_cuts=cuts)
    benchmark.do(comparison, benchmark.PHASES, arguments)

    text = document.read_text(encoding="utf-8")
    assert text.endswith("rest\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| compress |")
    assert sum("our repair" in row for row in rows) == 1
    for setting in comparison.chosen():
        assert any(setting.name in row for row in rows)
    assert "<!-- made " in text
    assert all(setting.name in cuts.read_text(encoding="utf-8") for setting in settings)
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").startswith("<?xml")
    for setting in settings:
        assert bench.cut(setting)["share"] <= BUDGET * 1.03

    steps = sys.modules["torch_pruning_steps"]
    trained = []

    def train(model, config, ctx, state_file):
        trained.append(state_file)
        return real(model, config, ctx, state_file)

    real = steps.train
    monkeypatch.setattr(steps, "train", train)
    lost = comparison.best()
    bench.trained_path(lost, "repaired").with_suffix(".json").unlink()  # as if killed while it trained
    benchmark.do(comparison, ("cut", "train", "before", "table"), arguments)
    assert trained == [f"{lost.slug}-repaired.pt"]


def test_an_edit_is_torch_prunings_cut_for_every_ranking_and_where_it_is_not_that_is_found(
    benchmark, bench, monkeypatch
):
    module = sys.modules["torch_pruning_cuts"]
    cutter = module.Cutter(bench.base, bench.context.data.calibration)
    for ranking in ("local", "global", "isomorphic"):
        for streams in (False, True):
            removed = cutter.removed(module.Setting("magnitude", ranking, None, streams), 0.3)
            summed = {name for name in removed if cutter.groups[name].is_summed}
            assert removed
            assert bool(summed) == streams
    wrong = module.Cutter._as_removed

    def shifted(self, kept):
        removed = wrong(self, kept)
        name = next(iter(removed))
        other = next(index for index in range(self.groups[name].width) if index not in removed[name])
        return removed | {name: tuple(sorted((*removed[name][1:], other)))}

    monkeypatch.setattr(module.Cutter, "_as_removed", shifted)
    with pytest.raises(RuntimeError, match="is not torch-pruning's cut"):
        cutter.removed(module.Setting("magnitude", "local", None, True), 0.3)


def test_sparse_training_takes_its_share_of_the_same_epochs(benchmark, bench):
    setting = _settings(benchmark)[-1]
    assert setting.sparse
    assert bench.recipe_of(setting).steps == bench.recipe.steps // 2
    assert bench.recipe_of(_settings(benchmark)[0]) == bench.recipe
    before = bench.base.module.state_dict()
    after = bench.sparse(True).module.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    shortcuts = [name for name in before if "shortcut" in name]
    assert shortcuts
    assert all(torch.equal(before[name], after[name]) for name in shortcuts)


def test_group_norms_are_added_to_the_gradients(benchmark, bench):
    module = sys.modules["torch_pruning_cuts"]
    cutter = module.Cutter(bench.base, bench.context.data.calibration)
    twin = module.with_plain_shortcuts(bench.base.module)
    hooks = module.GroupNormHooks(cutter, twin, True)
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    hooks.on_gradients(0)
    weight = twin.get_submodule("layer1.0.conv1").weight
    assert (weight.grad * weight.detach()).sum() > 0  # towards zero


def test_choices_follow_validation_alone(benchmark, bench, monkeypatch):
    """Evaluation figures that say the contrary change nothing."""
    first, second = _settings(benchmark)[:2]
    steps, kind = sys.modules["torch_pruning_steps"], type(bench)
    monkeypatch.setattr(kind, "cut", lambda self, one: {"share": BUDGET})
    monkeypatch.setattr(kind, "validation", lambda self, one, start: 0.9 if one == second else 0.1)
    monkeypatch.setattr(kind, "before_training", lambda self, one, start: pytest.fail("evaluation was looked at"))
    chosen = steps.best_of_families(bench, [first, second])
    assert chosen[second] == ["global", "taylor"]
    assert chosen[first] == ["local", "magnitude"]
    monkeypatch.setattr(kind, "trained", lambda self, one, start: {"top1": one == first, "validation": one == second})
    assert benchmark.Comparison([bench], [first, second]).best() == second


def test_a_setting_out_of_the_budget_is_taken_only_where_no_other_of_its_family_is_within(
    benchmark, bench, monkeypatch
):
    first, second = _settings(benchmark)[0], sys.modules["torch_pruning_cuts"].Setting("taylor", "local")
    steps, kind = sys.modules["torch_pruning_steps"], type(bench)
    monkeypatch.setattr(kind, "cut", lambda self, one: {"share": 0.9 if one == second else BUDGET})
    monkeypatch.setattr(kind, "validation", lambda self, one, start: 0.9 if one == second else 0.1)
    chosen = steps.best_of_families(bench, [first, second])
    assert chosen == {first: ["local", "magnitude"], second: ["taylor"]}


def test_timing_finds_the_ratio_of_a_clock_whatever_the_order(benchmark, bench, monkeypatch):
    table = sys.modules["torch_pruning_table"]
    seconds, now = {"slow": 3.0, "fast": 1.0}, [0.0]

    class Session:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def bind(self, inputs):
            return lambda: now.__setitem__(0, now[0] + seconds[self.path.stem])

    class Here:
        batch_size = 1

        def open(self, path: Path) -> Session:
            return Session(path)

    monkeypatch.setattr(table, "latency_inputs", lambda *_: {})
    network = table.Network(Path("fast.onnx"), Path("slow.onnx"), 2.0, 0.5)
    timing = table.time_networks([network], None, Here(), sittings=3, clock=lambda: now[0])
    assert timing.speedups == {"fast.onnx": [3.0] * 3}
    assert timing.same_file == [1.0] * 3


def test_a_row_off_the_target_is_marked_and_one_not_timed_is_named(benchmark):
    table = sys.modules["torch_pruning_table"]
    rows = [table.Row(name, (table.Network(Path(name), Path("b"), 2.0, 0.9, 0.5),)) for name in ("near", "far", "new")]
    timing = table.Timing("2026-01-01", "0" * 12, "a machine", 0.1, {"near": [1.5], "far": [1.4]}, [1.0])
    text = table.main_table(rows, timing, 2 / 3)
    assert "| near | 2.00× fewer | 1.50× | 0.75 |" in text
    assert "| far | 2.00× fewer | 1.40× † | 0.70 |" in text
    assert "Not timed yet: new." in text
    busy = table.Timing("2026-01-01", "0" * 12, "a machine", 4.0, {"near": [1.5]}, [1.0])
    assert "beside other work" in table.main_table(rows[:1], busy, 2 / 3)
    assert "beside other work" not in text
