"""The search brackets the smallest passing budget in few runs, whatever passes."""

from types import SimpleNamespace

import pytest

from compress.engine import budget_search
from compress.engine.budget_search import SearchLimits, _Bracket, search_budget
from compress.errors import ConfigValueError


def _searched(limit: float, between=(0.1, 1.0), first: float = 0.5, runs: int = 7, within: float = 0.05) -> _Bracket:
    """Search where all budgets of at least `limit` pass; the budgets tried are in `tried`."""
    bracket = _Bracket(between, SearchLimits(between, runs, within), first)
    bracket.tried = []
    while (budget := bracket.next()) is not None:
        bracket.tried.append(budget)
        bracket.add(budget, budget >= limit)
        assert len(bracket.tried) <= runs
    return bracket


@pytest.mark.parametrize("limit", [0.11, 0.2, 0.333, 0.5, 0.51, 0.7, 0.9, 0.99])
def test_the_answer_is_within_five_percent_in_seven_runs(limit):
    bracket = _searched(limit)
    assert limit <= bracket.passing <= limit * 1.06
    assert bracket.tried[0] == 0.5
    assert bracket.failing is None or bracket.failing < limit


def test_all_pass():
    bracket = _searched(0.01)
    assert bracket.failing is None
    assert bracket.passing <= 0.11


def test_none_passes_and_the_largest_was_tried():
    bracket = _searched(2.0)
    assert bracket.passing is None
    assert bracket.tried[-1] == 1.0
    assert len(set(bracket.tried)) == len(bracket.tried)


def test_only_the_largest_passes():
    assert _searched(1.0).passing == 1.0


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_few_runs_end_with_the_largest_where_nothing_passed(runs):
    bracket = _searched(1.0, runs=runs)
    assert len(bracket.tried) == runs
    assert (bracket.passing == 1.0) == (runs > 1)


def test_no_budget_is_tried_twice_with_a_coarse_rounding():
    bracket = _searched(0.5, within=0.001, runs=30)
    assert len(set(bracket.tried)) == len(bracket.tried)


def test_a_range_is_needed_for_absolute_budgets_and_must_be_shares_otherwise():
    with pytest.raises(ConfigValueError, match="--between must be given for a target of latency_ms"):
        budget_search._checked_range(SearchLimits(), "latency_ms")
    with pytest.raises(ConfigValueError, match="shares of at most 1 for a target of macs, got 2"):
        budget_search._checked_range(SearchLimits((0.5, 2.0)), "macs")
    assert budget_search._checked_range(SearchLimits((1.0, 9.0)), "latency_ms") == (1.0, 9.0)


def test_a_budget_that_cannot_be_met_does_not_pass(monkeypatch, tmp_path):
    pipeline = SimpleNamespace(config=SimpleNamespace(name="x"))
    monkeypatch.setattr(budget_search, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(budget_search, "swept_target", lambda _: (1, "macs", 0.5))

    def run_at(_pipeline, budget, _runs_dir, _progress, _remote):
        result = budget_search.SweepRun(budget, f"x-{budget:g}", error=None if budget > 0.6 else "cannot be reached")
        passed = SimpleNamespace(verdict=SimpleNamespace(passed=True))
        return result, passed if budget > 0.6 else None

    monkeypatch.setattr(budget_search, "run_at", run_at)
    outcome = search_budget(tmp_path / "x.yaml", SearchLimits(), tmp_path)
    assert outcome.exit_code == 0
    assert 0.6 < outcome.best.budget <= 0.64
    assert outcome.failing <= 0.6
