"""Factors multiply back to the kernel, surgery keeps what the layer computes, the stage keeps its target."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from fixtures import RecordingProgress
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.targets import RankTargetConfig
from compress.cost.macs import count_macs, count_params, layer_macs
from compress.data.batches import evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import BudgetUnreachable, NonFinite, StageError, UnsupportedLayer
from compress.lowrank.factorize import Moments, applicable_schemes, factorize, full_ranks, multiply, singular_values
from compress.lowrank.layers import find_layers, layer_spectra
from compress.lowrank.ranks import choose_ranks
from compress.lowrank.surgery import apply_factorize, factorize_layer, replace_structure
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Factorize, Recipe
from compress.progress import SilentProgress
from compress.search.context import StageContext
from compress.search.rank_inputs import measure_moments
from compress.stages.low_rank import LowRankStage

ALL_SCHEMES = ("nc", "vh", "tucker2", "svd")
GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
    {"kernel_size": (5, 2), "padding": (0, 3), "stride": (3, 1), "dilation": (1, 2)},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": (1, 3), "padding": (1, 1)},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _wrap(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer).double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("scheme", ["nc", "vh", "tucker2"])
def test_full_rank_chain_computes_what_the_convolution_did(scheme: str, geometry: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = _wrap(nn.Conv2d(5, 7, **geometry))
    shape = tuple(network[0].weight.shape)
    if scheme not in applicable_schemes(shape):
        pytest.skip("does not apply to this kernel")
    chain = apply_factorize(network, Factorize("0", scheme, full_ranks(shape, scheme)))
    image = _random((2, 5, 17, 19))
    assert (chain(image) - network(image)).abs().max() < 1e-10
    assert [name for name, _ in chain.named_children()] == ["0"]
    assert [name for name, _ in chain[0].named_children()] == ["0", "1", "2"][: len(chain[0])]


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (nn.Conv2d(6, 9, 1, stride=2), (2, 6, 11, 8)),
        (nn.Conv2d(6, 9, 1, padding=1, bias=False), (2, 6, 5, 5)),
        (nn.Linear(12, 5), (3, 12)),
        (nn.Linear(4, 10, bias=False), (3, 2, 4)),
    ],
)
def test_full_rank_svd_computes_what_the_layer_did(layer: nn.Module, image: tuple[int, ...]) -> None:
    network = _wrap(layer)
    ranks = full_ranks(tuple(network[0].weight.shape), "svd")
    chain = apply_factorize(network, Factorize("0", "svd", ranks))
    assert (chain(_random(image)) - network(_random(image))).abs().max() < 1e-10
    assert (chain[0][1].bias is None) == (layer.bias is None)


@pytest.mark.parametrize("scheme", ["nc", "vh"])
def test_relative_error_is_the_lost_energy(scheme: str) -> None:
    weight = _random((8, 6, 3, 3))
    (values,) = singular_values(weight, scheme)
    factors = factorize(weight, scheme, (4,))
    assert factors.relative_error == pytest.approx(np.sqrt((values[4:] ** 2).sum() / (values**2).sum()))
    missed = torch.linalg.vector_norm(weight - multiply(factors.weights, scheme)) / torch.linalg.vector_norm(weight)
    assert factors.relative_error == pytest.approx(float(missed))


def test_tucker_error_is_between_the_larger_tail_and_the_sum_of_tails() -> None:
    weight = _random((8, 6, 3, 3))
    inputs, outputs = singular_values(weight, "tucker2")
    tails = [float((values[4:] ** 2).sum() / (values**2).sum()) for values in (inputs, outputs)]
    error = factorize(weight, "tucker2", (4, 4)).relative_error ** 2
    assert max(tails) - 1e-12 <= error <= sum(tails) + 1e-12


def _read(kernel: tuple[int, ...]) -> tuple[Tensor, Moments]:
    """What a layer reads, (rows, n), some directions of it far stronger than others; and its moments."""
    size = math.prod(kernel)
    rows = _random((2000, size)) @ _random((size, size)) * torch.linspace(0.1, 2, size, dtype=torch.float64)
    return rows, Moments(rows.T @ rows / len(rows), kernel)


def _output_error(weight: Tensor, scheme: str, weights: tuple[Tensor, ...], rows: Tensor) -> float:
    missed = (multiply(weights, scheme) - weight).flatten(1)
    return float(torch.linalg.vector_norm(rows @ missed.T) / torch.linalg.vector_norm(rows @ weight.flatten(1).T))


@pytest.mark.parametrize(
    ("shape", "scheme", "ranks"),
    [
        ((16, 12, 3, 3), "nc", (8,)),
        ((16, 12, 3, 3), "vh", (8,)),
        ((16, 12, 3, 3), "tucker2", (8, 10)),
        ((16, 12, 5, 1), "tucker2", (3, 16)),
        ((16, 12, 1, 1), "svd", (8,)),
        ((16, 12), "svd", (8,)),
    ],
)
def test_with_moments_the_factors_keep_the_outputs_and_not_the_kernel(
    shape: tuple[int, ...], scheme: str, ranks: tuple[int, ...]
) -> None:
    weight, (rows, moments) = _random(shape), _read(shape[1:])
    by_kernel, by_outputs = factorize(weight, scheme, ranks), factorize(weight, scheme, ranks, moments)
    of_kernel, of_outputs = (_output_error(weight, scheme, one.weights, rows) for one in (by_kernel, by_outputs))
    assert by_outputs.relative_error == pytest.approx(of_outputs, rel=1e-3), "the error said is that of the outputs"
    assert of_outputs < 0.95 * of_kernel
    kernel_errors = [
        float(torch.linalg.vector_norm(multiply(one.weights, scheme) - weight)) for one in (by_kernel, by_outputs)
    ]
    assert kernel_errors[0] < kernel_errors[1], "which the kernel pays for"
    assert factorize(weight, scheme, full_ranks(shape, scheme), moments).relative_error < 1e-6


@pytest.mark.parametrize(("scheme", "exact"), [("nc", True), ("vh", False), ("tucker2", False)])
def test_spectra_with_moments_tell_the_error_of_the_outputs(scheme: str, exact: bool) -> None:
    weight, (_, moments) = _random((16, 12, 3, 3)), _read((12, 3, 3))
    for rank in (2, 5, 9):
        ranks = (rank, rank) if scheme == "tucker2" else (rank,)
        error = factorize(weight, scheme, ranks, moments).relative_error
        spectra = singular_values(weight, scheme, moments)
        told = math.sqrt(sum(float((values[rank:] ** 2).sum() / (values**2).sum()) for values in spectra))
        assert error == pytest.approx(told, rel=1e-3 if exact else 0.25)


def test_moments_of_nothing_but_zeros_are_no_reason_to_fail() -> None:
    weight, nothing = _random((8, 6, 3, 3)), Moments(torch.zeros(54, 54), (6, 3, 3))
    for scheme, ranks in (("nc", (4,)), ("vh", (4,)), ("tucker2", (4, 4))):
        same = zip(
            factorize(weight, scheme, ranks).weights, factorize(weight, scheme, ranks, nothing).weights, strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in same), "nothing is read: the kernel is all there is"


def test_factors_are_balanced() -> None:
    first, second = factorize(_random((8, 6, 3, 3)), "nc", (5,)).weights
    rows = torch.linalg.vector_norm(first.flatten(1), dim=1)
    assert torch.allclose(rows, torch.linalg.vector_norm(second.flatten(1), dim=0))
    for size in (1e-6, 1.0, 1e6):
        factors = factorize(_random((8, 6, 3, 3)) * size, "tucker2", (4, 5)).weights
        norms = torch.stack([torch.linalg.vector_norm(part) for part in factors])
        assert norms.max() / norms.min() < 3


def test_signs_do_not_depend_on_the_sign_of_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, true_svd = _random((6, 5, 3, 3)), torch.linalg.svd
    expected = [factorize(weight, scheme, full_ranks((6, 5, 3, 3), scheme)) for scheme in ("nc", "vh", "tucker2")]

    def flipped(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = true_svd(matrix, full_matrices=full_matrices)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for before, scheme in zip(expected, ("nc", "vh", "tucker2"), strict=True):
        after = factorize(weight, scheme, full_ranks((6, 5, 3, 3), scheme))
        assert all(torch.equal(a, b) for a, b in zip(before.weights, after.weights, strict=True))


@pytest.mark.parametrize("scheme", ["nc", "vh", "tucker2"])
def test_zero_kernel_has_zero_factors_and_no_error(scheme: str) -> None:
    ranks = (2, 2) if scheme == "tucker2" else (2,)
    factors = factorize(torch.zeros(4, 4, 3, 3), scheme, ranks)
    assert factors.relative_error == 0.0
    assert all(bool(torch.isfinite(part).all()) for part in factors.weights)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            Factorize("0", "svd", (2,)),
            r"Layer '0': A kernel of shape \(4, 3, 3, 3\) can be .* nc, vh, tucker2, got 'svd'",
        ),
        (Factorize("0", "nc", (5,)), r"Layer '0': Ranks of 'nc' .* must be from 1 to \(4,\), got \(5,\)"),
        (Factorize("0", "nc", (0,)), r"got \(0,\)"),
        (Factorize("0", "tucker2", (2,)), r"must be from 1 to \(3, 4\), got \(2,\)"),
        (Factorize("7", "nc", (2,)), "Layer '7' must exist"),
        (Factorize("1", "nc", (2,)), "Layer '1' cannot be factorised: it is a ReLU, not a Conv2d or Linear"),
        (Factorize("", "nc", (2,)), "got the network itself"),
    ],
)
def test_edit_that_does_not_fit_is_refused(edit: Factorize, match: str) -> None:
    with pytest.raises(UnsupportedLayer, match=match):
        replace_structure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), edit)


class _Odd(nn.Module):
    """Layers that must stay dense, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.read = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.reflecting(self.grouped(self.plain(x)))).mean((2, 3))
        x = nn.functional.linear(x, self.read.weight)
        x = self.hooked(self.tied_too(self.tied(self.alias(self.shared(x)))))
        return self.head(x)


def test_layers_that_cannot_be_replaced_are_named_with_a_reason() -> None:
    network = _Odd().eval()
    parts, output = list(network.modules()), network(nets.images())
    found, reasons = find_layers(network, nets.EXAMPLE)
    assert list(found) == ["plain", "reflecting", "head"]
    expected = {
        "grouped": "has groups=2",
        "normed": "weight that is computed",
        "read": "read from outside",
        "shared": "same module as 'alias'",
        "tied": "shares parameters with 'tied_too'",
        "tied_too": "shares parameters with 'tied'",
        "hooked": "has hooks",
        "unused": "not called",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items())
    assert list(network.modules()) == parts
    assert torch.equal(network(nets.images()), output)


@pytest.mark.parametrize("name", nets.NAMES)
def test_predicted_costs_are_what_is_counted_afterwards(name: str) -> None:
    network = nets.build(name)
    found, _ = find_layers(network, nets.EXAMPLE)
    for scheme in ALL_SCHEMES:
        for layer, places in found.items():
            spectra = layer_spectra(layer, network.get_submodule(layer), places, (scheme,))
            for option in spectra.schemes:
                ranks = tuple(max(1, len(values) // 2) for values in option.singular_values)
                slim = apply_factorize(network, Factorize(layer, scheme, ranks))
                saved = spectra.macs - option.macs.at(ranks)
                assert count_macs(network, nets.EXAMPLE) - count_macs(slim, nets.EXAMPLE) == saved
                assert count_params(network) - count_params(slim) == spectra.params - option.params.at(ranks)


class _Strided(nn.Module):
    """One layer called at two sizes, with everything that makes counting hard."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, (5, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


@pytest.mark.parametrize(("scheme", "ranks"), [("nc", (2,)), ("vh", (3,)), ("tucker2", (2, 1))])
def test_costs_are_exact_with_stride_and_reuse(scheme: str, ranks: tuple[int, ...]) -> None:
    network = _Strided()
    found, _ = find_layers(network, nets.EXAMPLE)
    (option,) = layer_spectra("conv", network.conv, found["conv"], (scheme,)).schemes
    slim = apply_factorize(network, Factorize("conv", scheme, ranks))
    assert count_macs(slim, nets.EXAMPLE) == option.macs.at(ranks)


def test_apply_leaves_the_input_alone_and_replay_rebuilds_it() -> None:
    network = nets.build("residual")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    edit = Factorize("body.1.conv2", "vh", (6,))
    slim = apply_factorize(network, edit)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.state_dict().keys() == before.keys()
    fresh = nets.build("residual", seed=3)
    replace_structure(fresh, edit)
    fresh.load_state_dict(slim.state_dict(), strict=True)
    assert torch.equal(fresh(nets.images()), slim(nets.images()))


def test_replaced_layers_keep_dtype_training_flag_and_frozen_weights() -> None:
    network = nn.Sequential(nn.Linear(6, 6)).to(torch.bfloat16).train()
    network[0].weight.requires_grad_(False)
    factorize_layer(network, Factorize("0", "svd", (2,)))
    assert network[0].training
    assert network[0][1].training
    assert {part.weight.dtype for part in network[0]} == {torch.bfloat16}
    assert [part.weight.requires_grad for part in network[0]] == [False, False]
    assert network[0][1].bias.requires_grad


def test_factorising_does_not_touch_the_random_state() -> None:
    state = torch.random.get_rng_state()
    factorize_layer(nn.Sequential(nets.build("chain")), Factorize("0.head", "svd", (2,)))
    replaced = torch.random.get_rng_state()
    assert torch.equal(state, replaced)


def test_weight_that_is_not_finite_is_named() -> None:
    network = nets.build("chain")
    network.head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="weight of layer 'head' must be finite"):
        factorize_layer(network, Factorize("head", "svd", (2,)))
    with pytest.raises(NonFinite, match="weight of layer 'head' must be finite"):
        layer_spectra("head", network.head, find_layers(network, nets.EXAMPLE)[0]["head"], ALL_SCHEMES)


class _Data:
    """Splits of random images."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        source = ArraySource(random.integers(0, 256, (96, 16, 16, 3), np.uint8), random.integers(0, 4, 96))
        preprocessing = Preprocessing(mean=(0.5,), std=(0.25,))
        self.calibration = Split("calibration", source, np.arange(48), preprocessing)
        self.validation = Split("validation", source, np.arange(48, 96), preprocessing)


def _artifact(module: nn.Module) -> TorchModel:
    figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), 0, {}, {})
    return TorchModel(
        module,
        FactorySpec("factory", "nets:chain"),
        Recipe(),
        Signature((TensorSpec("input", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),)),
        Preprocessing(),
        (),
        Baseline(figures, Path("baseline.onnx"), Path("baseline.safetensors")),
    )


def _run(module: nn.Module, folder: Path, **config: object) -> tuple[TorchModel, dict[str, object], list[str]]:
    progress = RecordingProgress()
    ctx = StageContext(folder, 0, _Data(), progress)  # type: ignore[arg-type]
    stage = LowRankStage(LowRankConfig(stage="low_rank", **config))  # type: ignore[arg-type]
    artifact, record = stage.run(_artifact(module), ctx)
    return artifact, record, progress.notes


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("kept", [0.4, 0.7])
def test_stage_never_exceeds_its_target(tmp_path: Path, metric: str, kept: float) -> None:
    network = nets.build("residual")
    target = RankTargetConfig(**{metric: kept})
    slim, record, notes = _run(network, tmp_path, target=target, multiple_of=1)
    counted = {"macs": count_macs(slim.module, nets.EXAMPLE), "params": count_params(slim.module)}
    baseline = vars(record)[f"{metric}_before"]
    assert kept - 0.05 <= counted[metric] / baseline <= kept
    assert {name: vars(record)[f"{name}_after"] for name in counted} == counted
    assert sum(layer_macs(network, nets.EXAMPLE).values()) == record.macs_before
    assert any(f"target {kept:.3f}" in note for note in notes)


def test_stage_result_is_rebuilt_from_its_recipe(tmp_path: Path) -> None:
    network = nets.build("linear_head")
    slim, record, _ = _run(network, tmp_path, relative_error=0.6, multiple_of=1)
    fresh = nets.build("linear_head", seed=5)
    for edit in slim.recipe.edits:
        replace_structure(fresh, edit)
    fresh.load_state_dict(slim.module.state_dict(), strict=True)
    assert torch.equal(fresh(nets.images()), slim.module(nets.images()))
    assert [entry.layer for entry in record.layers] == [edit.layer for edit in slim.recipe.edits]
    assert all(0 < entry.relative_error <= 0.6 + 1e-6 for entry in record.layers)
    assert all(entry.macs_after < entry.macs_before for entry in record.layers)
    assert not any(part.training for part in slim.module.modules())


def test_stage_leaves_its_input_alone_and_reestimates_batch_norm(tmp_path: Path) -> None:
    network = nets.build("chain")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    slim, record, _ = _run(network, tmp_path, relative_error=0.7, multiple_of=1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    moved = slim.module.state_dict()["body.2.1.running_mean"]
    (tried,) = record.repairs
    assert tried.repair == "batch_norm"
    assert torch.equal(moved, before["body.2.1.running_mean"]) != tried.is_kept
    assert 0 <= record.validation_after <= 1


def test_stage_counts_the_target_from_the_baseline(tmp_path: Path) -> None:
    artifact = _artifact(nets.build("residual"))
    figures = dataclasses.replace(artifact.baseline.metrics, macs=2 * artifact.baseline.metrics.macs)
    artifact = dataclasses.replace(artifact, baseline=dataclasses.replace(artifact.baseline, metrics=figures))
    stage = LowRankStage(LowRankConfig(stage="low_rank", target=RankTargetConfig(macs=0.3), multiple_of=1))
    _, record = stage.run(artifact, StageContext(tmp_path, 0, _Data(), SilentProgress()))  # type: ignore[arg-type]
    assert 0.25 * figures.macs < record.macs_after <= 0.3 * figures.macs
    with pytest.raises(StageError, match=r"at 0\.500 of baseline MACs already, the target is 0\.600"):
        LowRankStage(LowRankConfig(stage="low_rank", target=RankTargetConfig(macs=0.6))).run(
            artifact,
            StageContext(tmp_path, 0, _Data(), SilentProgress()),  # type: ignore[arg-type]
        )


def test_excluded_layers_stay_dense_and_are_listed(tmp_path: Path) -> None:
    slim, record, _ = _run(
        nets.build("residual"), tmp_path, relative_error=0.9, multiple_of=1, exclude=("body.1.*", "head")
    )
    dense = {entry.layer: entry.reason for entry in record.dense}
    assert dense["body.1.conv1"] == "is excluded by 'body.1.*'"
    assert dense["head"] == "is excluded by 'head'"
    assert isinstance(slim.module.body[1].conv1, nn.Conv2d)
    assert isinstance(slim.module.body[2].conv1, nn.Sequential)


def test_exclude_pattern_without_a_match_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"pattern 'haed' must match .*\nHint: did you mean 'head'\?"):
        _run(nets.build("chain"), tmp_path, relative_error=0.9, exclude=("haed",))


def test_unreachable_target_says_the_best_and_what_limits_it(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetUnreachable, match=r"Target 0\.01 of baseline MACs .* the best is 0\.\d\d, limited by .*multiple_of=8"
    ):
        _run(nets.build("residual"), tmp_path, target=RankTargetConfig(macs=0.01))


def test_an_error_too_small_for_any_layer_is_an_error_with_the_first_that_works(tmp_path: Path) -> None:
    network = nets.build("residual")
    with pytest.raises(StageError, match=r"shared relative error of 0\.010 none does") as caught:
        _run(network, tmp_path, relative_error=0.01)
    assert caught.value.hint is not None
    first = float(caught.value.hint.split("relative_error ")[1].split(";")[0])
    _, record, _ = _run(network, tmp_path, relative_error=first + 0.001)
    assert len(record.layers) >= 1


def test_nothing_cheaper_at_any_error_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"At least one of 6 layers(.|\n)*Lower multiple_of"):
        _run(nets.build("residual"), tmp_path, relative_error=0.9, schemes=("svd",), multiple_of=4)


def test_every_layer_is_listed_once(tmp_path: Path) -> None:
    network = nets.build("grouped")
    _, record, _ = _run(network, tmp_path, relative_error=0.5, multiple_of=8)
    listed = [entry.layer for entry in (*record.layers, *record.dense)]
    assert sorted(listed) == sorted(layer_macs(network, nets.EXAMPLE))


def test_choice_respects_both_costs() -> None:
    network = nn.Sequential(nn.Conv2d(4, 32, 3, stride=4, padding=1))
    found, _ = find_layers(network, torch.zeros(1, 4, 32, 32))
    spectra = layer_spectra("0", network[0], found["0"], ALL_SCHEMES)
    (choice,) = choose_ranks([spectra], 0.99, 1, "params")
    assert choice.macs <= spectra.macs
    assert choice.params < spectra.params


def test_the_stage_looks_at_what_layers_read_on_calibration_images(tmp_path: Path) -> None:
    network = nets.build("residual")
    config = LowRankConfig(stage="low_rank", relative_error=0.5, error_of="outputs", score_images=1)
    ctx = StageContext(tmp_path, 0, _Data(), SilentProgress())  # type: ignore[arg-type]
    found, _ = find_layers(network, nets.EXAMPLE)
    moments = measure_moments(network, found, config, ctx)  # of one image every place is looked at
    assert moments.keys() == found.keys()
    images = torch.cat([batch for batch, _ in evaluation_batches(_Data().calibration.first(1), 1)])
    read: list[Tensor] = []
    layer = network.get_submodule("body.1.conv1")
    assert isinstance(layer, nn.Conv2d)
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    patches = nn.functional.unfold(read[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    rows = patches.transpose(1, 2).flatten(0, 1)
    expected = rows.T @ rows / len(rows)
    got = moments["body.1.conv1"]
    assert got.kernel == tuple(layer.weight.shape[1:])
    assert (got.matrix - expected).abs().max() < 1e-3 * expected.abs().max()
    by_kernels = LowRankConfig(stage="low_rank", relative_error=0.5)
    assert measure_moments(network, found, by_kernels, ctx) == {}


def test_the_error_told_is_that_of_outputs_unless_kernels_are_asked_for(tmp_path: Path) -> None:
    shared: dict[str, object] = {"target": RankTargetConfig(macs=0.5), "multiple_of": 1, "allocation": "shared_error"}
    for folder in ("outputs", "kernels"):
        (tmp_path / folder).mkdir()
    (slim, outputs, _), (_, kernels, _) = (
        _run(nets.build("residual"), tmp_path / error_of, error_of=error_of, **shared)
        for error_of in ("outputs", "kernels")
    )
    assert outputs.layers != kernels.layers
    assert outputs.shared_relative_error < kernels.shared_relative_error  # type: ignore[operator]
    assert count_macs(slim.module, nets.EXAMPLE) == outputs.macs_after
