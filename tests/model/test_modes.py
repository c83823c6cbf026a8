"""Forward hooks come off together, whatever happens while they are on."""

import pytest
import torch
from torch import nn

from compress.model.modes import hooked, running_paths


class Failing(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        raise ValueError("fails")


def count_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_hooks_run_in_order_and_are_removed_at_the_end():
    module, calls = nn.Sequential(nn.ReLU()), []
    first = (module[0], lambda *_: calls.append("before"))
    with hooked(
        before=[first], after=[(module[0], lambda *_: calls.append("after")), (module, lambda *_: torch.ones(2))]
    ):
        assert module(torch.zeros(2)).tolist() == [1, 1]
    assert calls == ["before", "after"]
    assert module(torch.zeros(2)).tolist() == [0, 0]
    assert count_hooks(module) == 0


class Scaled(nn.Module):
    def forward(self, values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return values * scale


def test_hooks_see_and_change_arguments_given_by_name():
    module, seen = Scaled(), []
    before = (module, lambda _part, values: seen.append(values))
    with hooked(before=[before], after=[(module, lambda _part, values, output: seen.append((*values, output)))]):
        assert module(2.0, scale=3.0) == 6.0
        assert module(values=2.0) == 2.0
    assert seen == [(2.0, 3.0), (2.0, 3.0, 6.0), (2.0,), (2.0, 2.0)]
    with hooked(before=[(module, lambda _part, values: tuple(2 * value for value in values))]):
        assert module(2.0, scale=3.0) == 24.0
    with hooked(before=[(module, lambda _part, values: 10 * values[0])]):
        assert module(2.0) == module(values=2.0) == 20.0
    with hooked(after=[(module, lambda *values: seen.append(values[1:]))], with_kwargs=True):
        module(2.0, scale=3.0)
    assert seen[-1] == ((2.0,), {"scale": 3.0}, 6.0)


def test_hooks_are_removed_where_the_network_fails_and_by_close():
    module, calls = nn.Sequential(Failing()), []
    with pytest.raises(ValueError, match="fails"), hooked(after=[(module, lambda *_: calls.append("skipped"))]):
        module(torch.zeros(2))
    hooks = hooked(after=[(module, lambda *_: calls.append("called"))], always_call=True)
    with pytest.raises(ValueError, match="fails"):
        module(torch.zeros(2))
    hooks.close()
    assert (calls, count_hooks(module)) == (["called"], 0)


def test_no_hook_is_left_where_one_of_them_cannot_be_registered():
    module = nn.ReLU()
    with pytest.raises(AttributeError, match="register_forward_hook"):
        hooked(before=[(module, print)], after=[(module, print), (None, print)])
    assert count_hooks(module) == 0


def test_hooks_may_ask_for_keyword_arguments():
    seen = []
    layer = nn.Bilinear(1, 1, 1)
    with hooked(before=[(layer, lambda _, inputs, named: seen.append((len(inputs), sorted(named))))], with_kwargs=True):
        layer(torch.ones(1), input2=torch.ones(1))
    assert seen == [(1, ["input2"])]


def test_running_paths_name_the_module_whose_code_runs_and_survive_a_failure():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.bad = nn.Sequential(nn.ReLU()), Failing()

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            seen.append(paths[-1])
            values = self.inner(values)
            with pytest.raises(ValueError, match="fails"):
                self.bad(values)
            seen.append(paths[-1])
            return values

    seen: list[str] = []
    module = Outer()
    note = (module.inner[0], lambda *_: seen.append(paths[-1]))
    with running_paths(module) as paths, hooked(before=[note]):
        module(torch.zeros(2))
    assert seen == ["", "inner.0", ""]
    assert (paths, count_hooks(module)) == ([""], 0)
