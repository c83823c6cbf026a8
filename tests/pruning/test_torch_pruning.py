"""torch-pruning's importances score our groups as its own, and an importance of the user's own is a criterion."""

import copy
import re
from importlib.metadata import version
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from fixtures import RecordingProgress, make_model
from smallrun import ROOT, World, make_world, statuses
from steady import profile_by_macs
from torch import nn
from torchvision import models

from compress.catalog import CRITERIA
from compress.config.load import parse_pipeline
from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig, UnlabelledSource
from compress.config.schema.prune import PruneConfig, TorchPruningConfig
from compress.config.schema.targets import TargetConfig
from compress.cost.macs import count_macs
from compress.data.from_config import Splits
from compress.engine.keys import build_steps
from compress.errors import CompressError, DataError, ModelError, NonFinite, UnsupportedLayer
from compress.pruning.criteria import torch_pruning as adapter
from compress.pruning.criteria.parameter_gradients import ParameterGradients, collect_parameter_gradients
from compress.pruning.graph import ChannelGraph
from compress.search.context import StageContext
from compress.search.teacher import LoadedTeacher
from compress.stages.prune import PruneStage

importance = torch_pruning.importance
EXAMPLE = torch.zeros(1, 3, 64, 64)
NETWORKS = {"resnet18": 12, "mobilenet_v2": 25, "densenet121": 120}  # channel groups
MEASURES = {
    adapter.TpMagnitude: lambda: importance.GroupMagnitudeImportance(normalizer=None),
    adapter.TpLamp: importance.LAMPImportance,
    adapter.TpBnScale: lambda: importance.BNScaleImportance(normalizer=None),
    adapter.TpFpgm: lambda: importance.FPGMImportance(normalizer=None),
    adapter.TpTaylor: lambda: importance.GroupTaylorImportance(normalizer=None),
    adapter.TpHessian: lambda: importance.GroupHessianImportance(normalizer=None),
}


def groups_of(module: nn.Module, example: torch.Tensor = nets.EXAMPLE):
    return ChannelGraph(module, example).groups


# -- the same scores as torch-pruning's own graph gives ---------------------------------------------------------------


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    """A network with random weights, each of our groups beside torch-pruning's of the same root, and three images."""
    torch.manual_seed(0)
    module = getattr(models, request.param)(num_classes=10).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    graph = torch_pruning.DependencyGraph().build_dependency(module, EXAMPLE, verbose=False)
    pairs = []
    for group in groups_of(module, EXAMPLE).values():
        root = module.get_submodule(group.name)
        cut = graph.get_pruner_of_module(root).prune_out_channels
        pairs.append((group, graph.get_pruning_group(root, cut, list(range(group.width)))))
    return request.param, module, pairs, torch.randn(3, 3, 64, 64), torch.tensor([1, 2, 3])


def set_gradients(module, kind, images, labels) -> None:
    """Put into `.grad` what torch-pruning's measure needs, as its users would."""
    module.zero_grad()
    if kind == "mean":
        F.cross_entropy(module(images), labels).backward()
    if kind == "squares":  # `accumulate_grad` would keep the last image only
        total = {}
        for image, label in zip(images, labels, strict=True):
            module.zero_grad()
            F.cross_entropy(module(image[None]), label[None]).backward()
            for one in module.parameters():
                total[one] = total.get(one, 0) + one.grad.square() / len(images)
        for one, value in total.items():
            one.grad = value


def test_scores_equal_those_of_torch_prunings_own_groups(network):
    name, module, pairs, images, labels = network
    stats = collect_parameter_gradients(module, zip(images.split(1), labels.split(1), strict=True))
    compared = {}
    for measure, theirs in MEASURES.items():
        set_gradients(module, measure.gradients, images, labels)
        ours, compared[measure.name] = measure(seed=0), 0
        for group, their_group in pairs:
            wanted = theirs()(their_group).float()
            got = ours.scores(group, stats)
            assert got.shape == wanted.shape == (group.width,)
            assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), (measure.name, group.name)
            assert float(wanted.max()) > float(wanted.min()) >= 0
            compared[measure.name] += 1
    assert compared == {measure.name: NETWORKS[name] for measure in MEASURES}


def test_torch_prunings_own_accumulation_keeps_the_last_image_only():
    """The fault that `tp_hessian` does not pass on; when this fails, the page on it is out of date."""
    module = nets.build("chain")
    theirs = importance.GroupHessianImportance()
    for image, label in zip(nets.images(3).split(1), torch.tensor([[0], [1], [2]]), strict=True):
        module.zero_grad()
        F.cross_entropy(module(image), label).backward()
        theirs.accumulate_grad(module)
    last = {one: one.grad.square() for one in module.parameters()}
    assert all(torch.equal(theirs._accu_grad[one], last[one]) for one in module.parameters())


# -- groups -----------------------------------------------------------------------------------------------------------


def test_items_are_the_layers_in_our_numbering_and_the_root_comes_first():
    for name in nets.NAMES:
        module = nets.build(name)
        for group in groups_of(module).values():
            built = adapter.build_group(group)
            assert built[0].idxs == built[0].root_idxs == list(range(group.width))
            assert isinstance(built[0].dep.layer, (nn.Conv2d, nn.Linear))
            members = {(id(member.module), member.axis) for member in group.members}
            assert len(built) == len(members)
            by_name = {(member.layer, member.axis): member for member in group.members}
            for item in built:
                assert type(item.idxs) is type(item.root_idxs) is list
                side = "in" if "_in_" in item.dep.handler.__name__ else "out"
                member = by_name[item.dep.target._name, side]
                assert (item.idxs, item.root_idxs) == (member.slots.tolist(), member.channels.tolist())
                assert item.dep.layer is not member.module


def test_a_flattened_channel_has_all_its_columns_and_a_depthwise_layer_is_no_convolution():
    group = groups_of(nets.build("linear_head"))["features.0.0"]
    (linear,) = (item for item in adapter.build_group(group) if isinstance(item.dep.layer, nn.Linear))
    assert linear.root_idxs == [channel for channel in range(8) for _ in range(16)]
    group = groups_of(nets.build("depthwise"))["body.0.0"]
    handlers = [item.dep.handler for item in adapter.build_group(group)]
    assert torch_pruning.prune_depthwise_conv_out_channels in handlers


def test_magnitude_of_one_channel_by_hand():
    module = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1, bias=False)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        module[1].weight.copy_(torch.tensor([1.0, 5.0]))
        module[2].weight.copy_(torch.tensor([[1.0, 4.0], [2.0, 0.0], [0.0, 1.0]]).view(3, 2, 1, 1))
    group = groups_of(module, torch.zeros(1, 1, 4, 4))["0"]
    scores = adapter.TpMagnitude().scores(group, None)
    assert scores.tolist() == pytest.approx([(4 + 1 + 5) / 3, (9 + 25 + 17) / 3])
    assert adapter.TpBnScale().scores(group, None).tolist() == [1.0, 5.0]
    total = (10 + 51) / 3
    assert adapter.TpLamp().scores(group, None).tolist() == pytest.approx([10 / 3 / total, 1.0])
    gradients = {"0.weight": torch.full((2, 1, 1, 1), -2.0), "2.weight": torch.ones(3, 2, 1, 1),
                 "1.weight": torch.full((2,), 7.0)}  # fmt: skip
    stats = ParameterGradients(gradients, gradients)
    assert adapter.TpTaylor().scores(group, stats).tolist() == pytest.approx([(4 + 3) / 2, (6 + 5) / 2])
    squares = ParameterGradients({}, {name: value.abs() for name, value in gradients.items()})
    wanted = [(4 * 2 + 7 + 5) / 3, (9 * 2 + 25 * 7 + 17) / 3]
    assert adapter.TpHessian().scores(group, squares).tolist() == pytest.approx(wanted)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_fpgm_names_the_layer_that_reads_through_groups():
    groups = groups_of(nets.build("grouped"))
    criterion = adapter.TpFpgm()
    with pytest.raises(UnsupportedLayer, match=r"group 'body\.0\.0': 'body\.1\.0' reads it through 4 groups") as caught:
        criterion.scores(groups["body.0.0"], None)
    assert "'body.0.0' to exclude" in str(caught.value.hint)
    assert len(criterion.scores(groups["body.2.0"], None)) == 16
    with pytest.raises(RuntimeError, match="repeat"):
        adapter.score_group(importance.FPGMImportance(), groups["body.0.0"], None, 0)


def test_a_group_without_batch_norms_has_no_scale():
    group = groups_of(nets.build("linear_head"))["fc1"]
    with pytest.raises(UnsupportedLayer, match=r"no layer that holds all 24 channels of group 'fc1'"):
        adapter.TpBnScale().scores(group, None)


def test_grouped_transposed_convolutions_are_refused():
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.Conv2d(8, 4, 1)).eval()
    group = groups_of(module)["1"]
    for measure in (adapter.TpMagnitude, adapter.TpFpgm, adapter.TpLamp):
        with pytest.raises(UnsupportedLayer, match="transposed convolutions with groups, such as '1'"):
            measure().scores(group, None)
    assert len(adapter.TpRandom().scores(group, None)) == 8


def test_random_is_seeded_by_seed_and_group_and_leaves_the_generator():
    groups = groups_of(nets.build("chain"))
    first, second = (adapter.TpRandom(seed=3).scores(groups["body.1.0"], None) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, adapter.TpRandom(seed=4).scores(groups["body.1.0"], None))
    assert not torch.equal(first, adapter.TpRandom(seed=3).scores(groups["body.2.0"], None))
    state = torch.get_rng_state()
    adapter.TpRandom().scores(groups["body.1.0"], None)
    assert torch.equal(state, torch.get_rng_state())


# -- an importance of the user's own ----------------------------------------------------------------------------------

MINE = '''
import torch
import torch_pruning as tp


class Mean(tp.importance.Importance):
    """Mean of |weight| of the root, times a factor."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, group):
        dep, idxs = group[0]
        return self.factor * dep.target.module.weight[idxs].abs().flatten(1).mean(1)


class Taylor(tp.importance.TaylorImportance):
    pass


class Hessian(tp.importance.HessianImportance):
    pass


class Reads(tp.importance.Importance):
    def __call__(self, group):
        return group[0].dep.layer.weight.grad.abs().flatten(1).sum(1)


class Changes(Mean):
    def __call__(self, group):
        group[0].dep.layer.weight.data.zero_()
        return super().__call__(group) + 1


class Draws(tp.importance.Importance):
    def __call__(self, group):
        return torch.rand(len(group[0].idxs))


class Fails(tp.importance.Importance):
    def __call__(self, group):
        raise ValueError("no idea")


class Short(Mean):
    def __call__(self, group):
        return super().__call__(group)[1:]


class Nothing(tp.importance.Importance):
    def __call__(self, group):
        return None


class Array(Mean):
    def __call__(self, group):
        return super().__call__(group).numpy()


class NotANumber(Mean):
    def __call__(self, group):
        return super().__call__(group) * float("nan")


class Below(Mean):
    def __call__(self, group):
        return -super().__call__(group)


class Alien:
    def __call__(self, group):
        return None


class Stillborn(Mean):
    def __init__(self):
        raise KeyError("weights")
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return str(path)


def test_an_importance_of_the_users_own_scores_copies(mine):
    module = nets.build("chain")
    before = copy.deepcopy(module.state_dict())
    group = groups_of(module)["body.1.0"]
    criterion = adapter.OwnImportance(f"{mine}:Mean", {"factor": 2.0})
    assert (criterion.name, criterion.evidence, criterion.comparable) == ("mine.py:Mean", "weights", False)
    wanted = 2 * module.get_submodule("body.1.0").weight.detach().abs().flatten(1).mean(1)
    assert torch.equal(criterion.scores(group, None), wanted)
    adapter.OwnImportance(f"{mine}:Changes", {}).scores(group, None)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    drawn = [adapter.OwnImportance(f"{mine}:Draws", {}, seed=5).scores(group, None) for _ in range(2)]
    assert torch.equal(*drawn)


def test_negative_scores_keep_their_order(mine):
    group = groups_of(nets.build("chain"))["body.1.0"]
    up, down = (adapter.OwnImportance(f"{mine}:{name}", {}).scores(group, None) for name in ("Mean", "Below"))
    assert float(down.min()) == 0
    assert torch.equal(up.argsort(), down.argsort(descending=True))
    raw = adapter.OwnImportance(f"{mine}:Below", {}, comparable=True).scores(group, None)
    assert torch.equal(raw, -up)


def test_gradients_follow_the_class_or_the_setting(mine):
    module = nets.build("chain")
    stats = collect_parameter_gradients(module, zip(nets.images(4).split(1), torch.arange(4).split(1), strict=True))
    group = groups_of(module)["body.1.0"]
    kinds = {name: adapter.OwnImportance(f"{mine}:{name}", {}) for name in ("Taylor", "Hessian", "Reads")}
    assert {name: one.gradients for name, one in kinds.items()} == {
        "Taylor": "mean", "Hessian": "squares", "Reads": "none"
    }  # fmt: skip
    taylor = adapter.OwnImportance(f"{mine}:Taylor", {"normalizer": None}).scores(group, stats)
    assert torch.equal(taylor, adapter.TpTaylor().scores(group, stats))
    hessian = adapter.OwnImportance(f"{mine}:Hessian", {"normalizer": None}).scores(group, stats)
    assert torch.equal(hessian, adapter.TpHessian().scores(group, stats))
    for kind, values in (("mean", stats.mean), ("squares", stats.squares)):
        got = adapter.OwnImportance(f"{mine}:Reads", {}, kind).scores(group, stats)
        assert torch.equal(got, values["body.1.0.weight"].abs().flatten(1).sum(1))
    with pytest.raises(ModelError, match=r"NoneType.*\(mine\.py:\d+\)") as caught:
        kinds["Reads"].scores(group, None)
    assert "gradients: mean (or squares)" in str(caught.value.hint)


def test_a_keyword_that_an_importance_does_not_take_is_met_with_those_that_it_takes(mine):
    with pytest.raises(ModelError, match="must open, got TypeError") as caught:
        adapter.OwnImportance(f"{mine}:Mean", {"faktor": 2.0})
    assert caught.value.hint == "kwargs of Mean: factor."


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "Fails",
            r"Importance 'mine\.py:Fails' must score group 'body\.1\.0', got ValueError: no idea \(mine\.py:\d+\)",
        ),
        ("Short", r"one score for each of the 16 channels of group 'body\.1\.0', got a tensor of shape \(15,\)"),
        ("Nothing", r"one score for each of the 16 channels of group 'body\.1\.0', got None"),
        ("Array", r"one score for each of the 16 channels of group 'body\.1\.0', got ndarray"),
        ("Alien", r"'mine\.py:Alien' must be a torch_pruning\.importance\.Importance, got Alien"),
        ("Stillborn", r"Importance 'mine\.py:Stillborn' must open, got KeyError: 'weights' \(mine\.py:\d+\)"),
        ("Absent", r"must have a callable 'Absent', it has none"),
    ],
)
def test_what_is_wrong_with_an_importance_is_shown(mine, name, match):
    group = groups_of(nets.build("chain"))["body.1.0"]
    with pytest.raises(ModelError, match=match) as caught:
        adapter.OwnImportance(f"{mine}:{name}", {}).scores(group, None)
    assert caught.value.exit_code == 3


def test_the_page_names_every_measure_and_setting():
    text = (ROOT / "docs" / "methods" / "torch-pruning.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(tp_\w+)` \|.* `(\w+Importance)` \|", text, re.MULTILINE)
    assert sorted(name for name, _ in named) == [name for name in CRITERIA if name.startswith("tp_")]
    assert len(named) == 7
    assert all(hasattr(importance, kind) for _, kind in named)
    settings = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text.partition("| key | default |")[2], re.MULTILINE))
    assert set(settings) == set(TorchPruningConfig.model_fields)
    assert settings["comparable"] == str(TorchPruningConfig.model_fields["comparable"].default).lower()
    index = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    assert all(name in index for name, _ in named)


# -- in a pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    np.savez(path, x=images, y=np.arange(64) % 4)
    return path


def _splits(source) -> Splits:
    preprocessing = PreprocessingConfig(mean=(0.5,), std=(0.25,))
    return Splits(
        DataConfig(train=source, evaluation=source, calibration=32, validation=16, preprocessing=preprocessing)
    )


def _prune(tmp_path, splits, criterion, **settings):
    config = PruneConfig(stage="prune", target=TargetConfig(macs=0.6), criterion=criterion, score_images=8, repair=(),
                         multiple_of=1, residual="cut", **settings)  # fmt: skip
    return PruneStage(config).run(
        make_model("residual", tmp_path), StageContext(tmp_path, 0, splits, RecordingProgress())
    )


@pytest.mark.parametrize("name", ["tp_magnitude", "tp_fpgm", "tp_lamp", "tp_taylor", "tp_hessian", "tp_bn_scale",
                                  "tp_random"])  # fmt: skip
def test_every_measure_meets_a_budget_in_macs(tmp_path, pictures, name):
    slim, record = _prune(tmp_path, _splits(ArraysSource(arrays=str(pictures))), name)
    assert record.criterion == name
    assert 0.5 < count_macs(slim.module, nets.EXAMPLE) / count_macs(nets.build("residual"), nets.EXAMPLE) <= 0.6


def test_scores_that_are_no_numbers_are_refused(tmp_path, pictures, mine):
    own = TorchPruningConfig(torch_pruning=f"{mine}:NotANumber")
    with pytest.raises(NonFinite, match=r"criterion 'mine\.py:NotANumber' gives NaN or infinity in group"):
        _prune(tmp_path, _splits(ArraysSource(arrays=str(pictures))), own)


def test_gradients_without_labels_are_refused_at_the_baseline(tmp_path, pictures, mine):
    splits = _splits(UnlabelledSource(unlabelled=str(pictures)))
    splits.teacher = LoadedTeacher(nets.build("residual"))
    for criterion in ("tp_taylor", "tp_hessian", TorchPruningConfig(torch_pruning=f"{mine}:Taylor")):
        with pytest.raises(DataError, match=r"no labels, and the loss is the distance to the baseline") as caught:
            _prune(tmp_path, splits, criterion)
        assert "tp_magnitude" in str(caught.value.hint)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("own") / "world")
    (made.folder / "mine.py").write_text(MINE, encoding="utf-8")
    return made


def _values(world: World, own: dict, target: dict) -> dict:
    prune = {"stage": "prune", "target": target, "multiple_of": 2, "score_images": 16, "criterion": own}
    values = world.values(middle=(prune,))
    if "latency" in target:
        values |= {"name": "by_latency", "deploy": {"threads": 1, "batch_size": 64}}
    return values


def _record(outcome) -> dict:
    return next(stage["record"] for stage in outcome.report["stages"] if stage["stage"] == "prune")


def test_an_importance_of_the_users_own_runs_a_pipeline_under_both_budgets(world, monkeypatch):
    own = {"torch_pruning": "mine.py:Taylor", "kwargs": {"multivariable": True}}
    values = _values(world, own, {"macs": 0.6})
    outcome = world.run(values)
    record = _record(outcome)
    assert outcome.verdict.passed
    assert record["criterion"] == "mine.py:Taylor"
    assert record["macs_after"] <= 0.6 * record["macs_before"]
    assert statuses(world.run(values))[1] == "prune unchanged"

    profile_by_macs(monkeypatch)
    record = _record(world.run(_values(world, {"torch_pruning": "mine.py:Mean"}, {"latency": 0.7})))
    assert record["latency"]["measured_ratio"] <= 0.7 * 1.03
    assert record["macs_after"] < record["macs_before"]


def test_the_code_of_an_importance_is_part_of_the_key_and_its_folder_is_not(world):
    def prune_of(own) -> dict:
        steps = build_steps(world.load(_values(world, own, {"macs": 0.6})))
        return next(step.fixed for step in steps if step.entry.name == "prune")

    own = {"torch_pruning": "mine.py:Mean"}
    before = prune_of(own)
    assert before["libraries"]["torch-pruning"] == version("torch-pruning")
    assert prune_of("tp_lamp")["libraries"] == before["libraries"]
    assert "torch-pruning" not in prune_of("l1")["libraries"]
    assert "torch-pruning" not in prune_of("l1")["libraries"]
    assert str(world.folder) not in str(before["config"])
    assert prune_of({**own, "kwargs": {"factor": 2.0}}) != before
    file = world.folder / "mine.py"
    file.write_text(MINE + "# longer\n", encoding="utf-8")
    assert prune_of(own)["config"]["criterion"] != before["config"]["criterion"]
    file.write_text(MINE, encoding="utf-8")
    assert prune_of(own) == before


def test_an_importance_that_raises_ends_the_run_as_other_code_of_users(world):
    done = world.call("run", _values(world, {"torch_pruning": "mine.py:Fails"}, {"macs": 0.6}), "--quiet")
    assert done.exit_code == 3
    assert re.search(r"got ValueError: no idea \(mine\.py:\d+\)", done.stderr)


@pytest.mark.parametrize(
    ("reference", "code", "message"),
    [
        ("nowhere.py:Mean", 4, r"Importance file '.*nowhere\.py' does not exist\."),
        ("mine.py:Meen", 3, r"stages\[1\]\.criterion\.torch_pruning: .* callable 'Meen', it has none\.\n.*'Mean'\?"),
    ],
)
def test_an_importance_that_cannot_be_imported_is_refused_before_anything_runs(world, reference, code, message):
    values = {**_values(world, {"torch_pruning": reference}, {"macs": 0.6}), "seed": 3}
    done = world.call("run", values)
    assert done.exit_code == code
    assert re.search(message, done.stderr)
    assert "load: done" not in done.stdout + done.stderr
    if code == 4:
        assert world.call("plan", values).exit_code == code


@pytest.mark.parametrize(
    ("criterion", "match"),
    [
        ("tp_magnitud", r"did you mean 'tp_magnitude'\?"),
        (3, r"criterion must be text, got 3"),
        ({}, r"criterion\.torch_pruning is missing"),
        ({"torch_pruning": "mine.py"}, r"criterion\.torch_pruning must be pkg\.module:Class or path/to/file\.py:Class"),
        ({"torch_pruning": "mine.py:A", "gradient": "mean"}, r"did you mean 'gradients'\?"),
        ({"torch_pruning": "mine.py:A", "gradients": "yes"}, r"gradients must be one of none, mean, squares"),
        ({"torch_pruning": "mine.py:A", "kwargs": 3}, r"kwargs must be a mapping of keys to values, got 3"),
    ],
)
def test_a_wrong_section_is_told_with_its_key(world, criterion, match):
    with pytest.raises(CompressError, match=match) as caught:
        world.load(_values(world, criterion, {"macs": 0.6}))
    assert caught.value.exit_code == 2


def test_a_path_is_relative_to_the_pipeline_file(world):
    pipeline = world.load(_values(world, {"torch_pruning": "mine.py:Mean"}, {"macs": 0.6}))
    assert pipeline.config.stages[1].criterion.torch_pruning == f"{world.folder / 'mine.py'}:Mean"
    again = parse_pipeline(pipeline.to_yaml(), world.folder / "elsewhere.yaml")
    assert again.config == pipeline.config
