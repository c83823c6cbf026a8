"""Weights of another type are converted where that is sound and refused by name where it is not."""

from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError, NonFinite
from compress.networks.weights import load_strict, read_weights
from compress.search.validation import chance_warning
from compress.tasks.regression import Regression

State = dict[str, Tensor]


def _state(change: Callable[[Tensor], Tensor] = lambda value: value) -> State:
    return {n: change(v) if v.is_floating_point() else v for n, v in nets.build("chain").state_dict().items()}


def _load(state: State) -> tuple[nn.Module, list[str]]:
    module = nets.build("chain", seed=1)
    return module, [one.text for one in load_strict(module, state, "'w'")]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int64, "int64 instead of float32"),
        (torch.int8, "int8 instead of float32"),
        (torch.bool, "bool instead of float32"),
        (torch.complex64, "complex64 instead of float32"),
        (torch.float8_e4m3fn, "float8_e4m3fn instead of float32"),
        (torch.float8_e5m2, "float8_e5m2 instead of float32"),
    ],
)
def test_weights_that_are_no_floats_are_refused_by_name(dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ArtifactError, match=rf"the network's types, got body\.0\.0\.weight {said}"):
        _load(_state(lambda value: value.to(dtype)))


def test_one_odd_weight_among_many_is_enough() -> None:
    state = _state()
    state["head.bias"] = state["head.bias"].to(torch.int32)
    with pytest.raises(ArtifactError, match=r"got head\.bias int32 instead of float32\."):
        _load(state)


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    torch.save(_state(lambda value: value.to("meta")), tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"body\.0\.0\.weight on the meta device, without values"):
        _load(read_weights(tmp_path / "w.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_become_floats_without_a_change(dtype: torch.dtype) -> None:
    state = _state(lambda value: value.to(dtype))
    module, said = _load(state)
    assert said == [f"'w': 17 tensors (body.0.0.weight ...) converted from {str(dtype)[6:]} to float32; "
                    "every value is the same."]  # fmt: skip
    assert all(
        torch.equal(module.state_dict()[name], value.to(module.state_dict()[name].dtype))
        for name, value in state.items()
    )


def test_doubles_are_rounded_and_that_is_told() -> None:
    _, said = _load(_state(lambda value: value.double() / 3))
    assert len(said) == 1
    assert "(body.0.0.weight ...) rounded from float64 to float32, by up to" in said[0]
    assert "every value is the same" in _load(_state(lambda value: value.double()))[1][0]


def test_doubles_beyond_float32_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"body\.0\.0\.weight float64 instead of float32 with values beyond its"):
        _load(_state(lambda value: value.double() * 1e300))
    with pytest.raises(NonFinite, match="must be finite"):
        _load(_state(lambda value: value.double() / 0))


def test_buffers_are_converted_where_no_value_changes() -> None:
    state = _state()
    state["body.0.1.num_batches_tracked"] = torch.tensor(2.5)  # an averaged counter
    state["body.0.1.running_mean"] = torch.zeros(8, dtype=torch.int64)
    assert _load(state)[1] == ["'w': 1 tensor (body.0.1.running_mean) converted from int64 to float32; "
                               "every value is the same."]  # fmt: skip
    state["body.0.1.running_mean"] = torch.full((8,), 2**24 + 1)
    with pytest.raises(ArtifactError, match=r"running_mean int64 instead of float32"):
        _load(state)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "ema.", "model._orig_mod.", "ema_model.module."])
def test_a_prefix_is_found_beside_what_is_left_over(tmp_path: Path, prefix: str) -> None:
    module, state = nets.build("chain"), {prefix + name: value for name, value in _state().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    load_strict(module, read_weights(tmp_path / "w.pt", module.state_dict()), "'w'")
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(4)}}, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"exactly; unexpected: criterion\.weight\.\nHint: All weights of the netw"):
        load_strict(module, read_weights(tmp_path / "w.pt", module.state_dict()), "'w'")


@pytest.mark.parametrize(
    "keys", [("state_dict_ema",), ("model_ema", "module"), ("ema", "shadow"), ("ema_model", "state_dict")]
)
def test_averages_are_taken_out_of_nested_checkpoints(tmp_path: Path, keys: tuple[str, ...]) -> None:
    nested: object = {f"module.{name}": value for name, value in _state().items()}
    for key in reversed(keys):
        nested = {key: nested}
    torch.save({"state_dict": _state(torch.zeros_like), **nested}, tmp_path / "w.pt")  # type: ignore[dict-item]
    module = nets.build("chain", seed=1)
    load_strict(module, read_weights(tmp_path / "w.pt", module.state_dict()), "'w'")
    assert torch.equal(module.state_dict()["head.weight"], _state()["head.weight"])


def test_two_networks_in_one_state_dict_are_never_chosen_between_in_silence() -> None:
    module = nets.build("chain")
    state = {f"{prefix}.{name}": value for prefix in ("teacher", "student") for name, value in _state().items()}
    from compress.networks.weights import fit_prefix

    with pytest.raises(ArtifactError, match="unexpected: student"):
        load_strict(module, fit_prefix(state, module.state_dict()), "'w'")


def _split(labels: np.ndarray) -> Split:
    return Split(
        "evaluation",
        ArraySource(np.zeros((len(labels), 4, 4, 1), np.uint8), labels),
        np.arange(len(labels)),
        Preprocessing(),
    )


def test_a_baseline_at_chance_level_is_warned_about() -> None:
    labels = np.arange(100) % 4
    said = chance_warning(0.27, _split(labels))
    assert said is not None
    assert said.startswith("The baseline is at chance level: 27 of 100 evaluation images are right, and 25 would be")
    assert chance_warning(0.40, _split(labels)) is None
    assert chance_warning(0.80, _split(np.arange(100) // 80)) is not None  # 80 of 100 images are of one class
    assert chance_warning(1.0, _split(np.zeros(10, np.int64))) is None  # one class says nothing
    assert (
        chance_warning(0.0, Split("evaluation", _split(labels).source, labels, Preprocessing(), Regression())) is None
    )
