"""The search brackets the smallest passing budget in few runs, whatever passes."""

from collections import namedtuple
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from compress.engine import budget_search, sweep
from compress.engine.budget_search import SearchLimits, _Bracket, search_budget
from compress.engine.jobs import Failure, JobResult
from compress.errors import ArtifactError, ConfigValueError
from compress.report.model import read_report

Job = namedtuple("Job", "name budget")


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
        budget_search.checked_range(None, "latency_ms")
    with pytest.raises(ConfigValueError, match="shares of at most 1 for a target of macs, got 2"):
        budget_search.checked_range((0.5, 2.0), "macs")
    assert budget_search.checked_range((1.0, 9.0), "latency_ms") == (1.0, 9.0)


def test_several_budgets_at_a_time_bracket_the_answer():
    bracket = _Bracket((0.1, 1.0), SearchLimits((0.1, 1.0), 12), 0.5)
    tried = []
    while budgets := bracket.next_several(3):
        assert len(budgets) <= 3
        tried += budgets
        for budget in budgets:
            bracket.add(budget, budget >= 0.37)
    assert len(tried) == len(set(tried)) <= 12
    assert 0.37 <= bracket.passing <= 0.37 * 1.06
    assert bracket.failing < 0.37
    assert _Bracket((0.1, 1.0), SearchLimits((0.1, 1.0), 1), 0.5).next_several(3) == [0.5]


def test_a_failure_above_the_smallest_passing_budget_is_not_the_answer():
    bracket = _Bracket((0.1, 1.0), SearchLimits(), 0.5)
    for budget, passes in ((0.5, False), (0.3, True), (0.2, False)):
        bracket.add(budget, passes)
    assert (bracket.passing, bracket.failing) == (0.3, 0.2)


class Answers:
    """An executor whose jobs are answered by a function of their budgets."""

    capacity, words = 1, "at once"

    def __init__(self, answer):
        self.answer = answer

    def submit(self, job):
        future = Future()
        future.set_result(JobResult(self.answer(job)))
        return future


@pytest.fixture
def searched(monkeypatch, tmp_path):
    """Return the search of a pipeline whose runs pass, with failures by budget."""
    pipeline = SimpleNamespace(config=SimpleNamespace(name="x"))
    monkeypatch.setattr(budget_search, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(budget_search, "swept_target", lambda _: (1, "macs", 0.5))
    monkeypatch.setattr(budget_search, "at_budget_job", lambda _, budget, *__: Job(f"x-{budget:g}", budget))
    monkeypatch.setattr(sweep, "read_run", lambda *_: read_report({"verdict": {"passed": True, "checks": []}}))

    def search(answer):
        executor = Answers(lambda job: answer(job.budget))
        return search_budget(tmp_path / "x.yaml", SearchLimits(), tmp_path, executor=executor)

    return search


def test_a_budget_that_cannot_be_met_does_not_pass(searched):
    outcome = searched(lambda budget: None if budget > 0.6 else Failure("not met", "cannot be reached"))
    assert outcome.exit_code == 0
    assert 0.6 < outcome.best.budget <= 0.64
    assert outcome.failing <= 0.6


def test_a_run_that_fails_says_nothing_about_its_budget(searched):
    with pytest.raises(ArtifactError, match="no disk") as caught:
        searched(lambda _: Failure("failed", "no disk", "make room", 4))
    assert caught.value.hint == "make room"
