"""A Pareto search asks Optuna for trials, stops early, marks what failed, and resumes after a kill."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from smallrun import Notes, World, make_world

pytest.importorskip("optuna", reason="optuna is not installed")

from compress.engine import pareto_search, sweep
from compress.engine.early_stop import find_hopeless, list_stops
from compress.engine.jobs import Failure, Job, JobResult, RunJob
from compress.engine.pareto_search import ParetoOutcome, search_pareto
from compress.engine.search_space import Choice, Space, parse_choices
from compress.errors import ArtifactError, ConfigError
from compress.report.build import StageRun
from compress.report.model import Report, read_report

Answer = Callable[[float, str], Failure | None]


def report_of(budget: float, criterion: str) -> Report:
    """Return the report of a network that is better by one criterion, and fails its gates at small budgets."""
    quality = 0.9 - 0.2 * (1 - budget) ** 2 - (0.05 if criterion == "l1" else 0.0)
    passed = budget > 0.3
    checks = [{"name": "top1", "status": "pass" if passed else "fail"}]
    return read_report(
        {
            "name": "x",
            "verdict": {"passed": passed, "outcome": "passed" if passed else "failed", "checks": checks},
            "baseline": {"macs": 1000, "quality": {"top1": 0.92}},
            "slim": {"macs": round(1000 * budget), "quality": {"top1": quality}},
            "details": {"latency": {"ratio": {"value": budget}}},
            "config": {"stages": [{"stage": "verify", "gates": {"max_drop": {"top1": 0.1}}}]},
        }
    )


class Simulated:
    """An executor whose runs have the reports of `report_of`."""

    capacity, words = 1, "simulated"

    def __init__(self, answer: Answer, most: int = 1000) -> None:
        self.answer, self.most = answer, most
        self.jobs: list[RunJob] = []

    def submit(self, job: Job) -> "Future[JobResult]":
        assert isinstance(job, RunJob)
        assert job.is_judged
        if len(self.jobs) == self.most:
            raise KeyboardInterrupt
        self.jobs.append(job)
        target, criterion = settings_of(job)
        future: Future[JobResult] = Future()
        future.set_result(JobResult(self.answer(target, criterion)))
        return future


def settings_of(job: RunJob) -> tuple[float, str]:
    prune = job.pipeline().resolved["stages"][1]
    return prune["target"]["macs"], prune["criterion"]


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ParetoOutcome]:
    """Return a search over budget and criterion whose runs are simulated."""
    world = World(tmp_path)
    path = world.write(world.values())
    known: dict[str, Report] = {}

    def read_run(_: Path, name: str) -> Report:
        return known[name]

    def search(executor: Simulated, trials: int, storage: str | None = None, progress: Notes | None = None) -> Any:
        submit = executor.submit

        def remembered(job: Job) -> "Future[JobResult]":
            future = submit(job)
            known[job.name] = report_of(*settings_of(job))
            return future

        executor.submit = remembered
        space = Space((0.1, 1.0), parse_choices(["stages.prune.criterion=[taylor, l1]"]), (), storage)
        return search_pareto(path, space, trials, world.runs, progress=progress, executor=executor)

    monkeypatch.setattr(sweep, "read_run", read_run)
    monkeypatch.setattr(pareto_search, "read_run", read_run)
    monkeypatch.setattr(pareto_search, "compare", lambda *_: None)
    monkeypatch.setattr(pareto_search, "load_verdict", lambda *_: None)
    return search


def passes(budget: float, criterion: str) -> None:
    return None


def test_the_front_has_what_passes_and_nothing_betters(searched: Callable[..., ParetoOutcome], tmp_path: Path) -> None:
    executor = Simulated(passes)
    outcome = searched(executor, 16)
    assert outcome.exit_code == 0
    assert len(executor.jobs) <= 16
    assert len({job.name for job in executor.jobs}) == len(executor.jobs), "no network is made twice"
    assert settings_of(executor.jobs[0])[0] == 0.6, "the budget of the file is tried first"
    assert {settings_of(job)[1] for job in executor.jobs} == {"taylor", "l1"}
    budgets = [run.budget for run in outcome.front]
    assert budgets == sorted(budgets)
    assert min(budgets) > 0.3, "smaller ones fail their gates"
    found = json.loads((outcome.folder / "search.json").read_text(encoding="utf-8"))
    assert found["best"] == outcome.front[0].run == found["front"][0]
    assert found["gate"] == pytest.approx(0.82)
    assert set(found["runs"][0]["settings"]) == {"stages.prune.criterion"}
    page = (outcome.folder / "search.html").read_text(encoding="utf-8")
    assert ">gate<" in page
    assert "stages.prune.criterion" in page
    assert "front" in page
    assert outcome.tried.columns[:3] == ("budget", "stages.prune.criterion", "verdict")


def test_failed_and_stopped_trials_are_marked_and_the_search_goes_on(searched: Callable[..., ParetoOutcome]) -> None:
    def answer(budget: float, criterion: str) -> Failure | None:
        if criterion == "l1":
            return Failure("failed", "The disk was full.", None, 4)
        return Failure("stopped", "It drops too much.", exit_code=0) if budget < 0.5 else None

    outcome = searched(Simulated(answer), 14)
    states = {run.state for run in outcome.tried.runs}
    assert states == {"done", "failed", "stopped"}
    page = (outcome.folder / "search.html").read_text(encoding="utf-8")
    assert "failed: The disk was full." in page
    assert "stopped: It drops too much." in page


def test_no_passing_network_is_exit_code_1(searched: Callable[..., ParetoOutcome]) -> None:
    outcome = searched(Simulated(lambda *_: Failure("not met", "cannot be reached")), 3)
    assert outcome.exit_code == 1
    assert outcome.front == ()
    assert [run.word for run in outcome.tried.runs] == ["not met"] * 3


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_a_killed_search_resumes_and_repeats_nothing(
    searched: Callable[..., ParetoOutcome], tmp_path: Path, storage: str | None
) -> None:
    place = None if storage is None else f"sqlite:///{tmp_path}/trials.db"
    first = Simulated(passes, most=4)
    with pytest.raises(KeyboardInterrupt):
        searched(first, 8, place)
    second = Simulated(passes)
    outcome = searched(second, 8, place)
    assert len(first.jobs) == 4
    assert len(second.jobs) == 4, "the four that are left, with the one that was under way"
    assert len(outcome.tried.runs) == 8
    third = Simulated(passes)
    assert searched(third, 8, place).tried.runs == outcome.tried.runs
    assert third.jobs == []
    assert len(searched(Simulated(passes), 10, place).tried.runs) == 10, "more trials go on from there"


def test_a_storage_that_cannot_be_used_is_named_without_its_password(searched: Callable[..., ParetoOutcome]) -> None:
    with pytest.raises(ArtifactError, match=r"storage of trials 'sqlite:////no/such/folder/x\.db' cannot be used"):
        searched(Simulated(passes), 2, "sqlite:////no/such/folder/x.db")
    with pytest.raises(ArtifactError, match=r"'nosuchdb://\*\*\*@host/x' cannot be used"):
        searched(Simulated(passes), 2, "nosuchdb://me:secret@host/x")


def test_choices_of_the_command_line() -> None:
    choices = parse_choices(
        ["stages.slim.moves=[[channels], [channels, blocks]]", "a.b=0.01..0.1", "stages.finetune.epochs=1..4"]
    )
    assert choices[0].values == ('["channels"]', '["channels", "blocks"]')
    assert choices[1] == Choice("a.b", (), (0.01, 0.1), False)
    assert choices[2].ends == ("1", "4")


@pytest.mark.parametrize("text", ["a", "a=", "a=3", "a=[1]", "=[1, 2]", "a=[1, 2", "a=1..1", "a=2..1", "a=1..e"])
def test_a_wrong_choice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--vary must"):
        parse_choices([text])


def test_a_setting_is_varied_once() -> None:
    with pytest.raises(ConfigError, match=r"--vary a\.b must be given once, got 2 times\."):
        parse_choices(["a.b=[1, 2]", "a.b=1..2"])


def test_a_wrong_value_is_refused_before_any_trial(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = world.write(world.values())
    space = Space(None, parse_choices(["stages.prune.criterion=[taylor, tailor]"]))
    with pytest.raises(ConfigError, match="criterion must be one of"):
        search_pareto(path, space, 3, world.runs)
    assert not world.runs.exists()


def test_precision_is_a_choice_between_pipeline_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    path, other = world.write(world.values()), world.values() | {"name": "chain-int8"}
    other["stages"].insert(-1, {"stage": "quantize", "images": 32})
    also = world.write(other)
    plan = pareto_search._Plan(path, Space(also=(also,)), (), None)
    assert set(plan.distributions) == {"budget", "pipeline"}
    budget, settings = plan.read({"budget": 0.43211, "pipeline": also.name})
    assert (budget, settings) == (0.432, {"pipeline": "chain-int8.yaml"})
    pipeline = plan.pipeline(budget, settings)
    assert pipeline.config.quantize is not None
    assert pipeline.config.name.startswith("chain-int8-0.432-")
    other["stages"][1]["target"] = {"params": 0.5}
    also = world.write(other)
    with pytest.raises(ConfigError, match=r"must have a target of macs as '.*' has, got a target of params"):
        pareto_search._Plan(path, Space(also=(also,)), (), None)


def stage(name: str, **record: Any) -> StageRun:
    return StageRun(name, "ran", 1.0, record)


def test_a_run_that_cannot_pass_is_stopped(tmp_path: Path) -> None:
    world = World(tmp_path)
    values = world.values()
    values["stages"][-1]["gates"] = {"max_drop": {"top1": 0.1}, "max_macs": 500}
    pipeline = world.load(values)
    assert list_stops(pipeline) == [2, 3]
    load = stage("load", macs=1000)
    cut = {"validation_top1_before": 0.9, "validation_top1_after": 0.3, "macs_before": 1000}
    small, large = stage("prune", **cut, macs_after=400), stage("prune", **cut, macs_after=600)
    assert find_hopeless(pipeline, [load, large]) == "600 macs exceed the gate of 500"
    assert find_hopeless(pipeline, [load, small]) is None, "training may restore the accuracy"
    trained = stage("finetune", validation_top1_before=0.3, validation_top1_after=0.4)
    reason = find_hopeless(pipeline, [load, small, trained])
    assert reason is not None
    assert reason.startswith("top-1 drops by 50.00 percentage points on 32 validation images, the gate is 10")
    close = stage("finetune", validation_top1_before=0.3, validation_top1_after=0.75)
    assert find_hopeless(pipeline, [load, small, close]) is None, "15 points on 32 images are no proof"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("pareto") / "world")


def test_a_search_on_the_command_line(world: World) -> None:
    varied = "stages.finetune.learning_rate=[0.02, 0.01]"
    arguments = ["--pareto", "--trials", "2", "--between", "0.5,0.9", "--vary", varied]
    file, junit = world.folder / "v.json", world.folder / "v.xml"
    done = world.call("search", world.values(), *arguments, "--json", str(file), "--junit", str(junit))
    assert done.exit_code == 0, done.stderr + done.stdout
    assert "2 trials of chain, one after the other." in done.stdout
    assert "Pareto front: chain-" in done.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["verdict"]["passed"] is True
    assert "<testsuite" in junit.read_text(encoding="utf-8")
    assert (world.runs / "chain-pareto" / "trials.journal").is_file()
    found = json.loads((world.runs / "chain-pareto" / "search.json").read_text(encoding="utf-8"))
    assert [run["state"] for run in found["runs"] if not run["passed"]] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "3"], "--trials needs --pareto, it is not given."),
        (["--vary", "a=[1,2]"], "--vary needs --pareto, it is not given."),
        (["--pareto", "--vary", "a"], "--vary must be a key with a list of values or a range, got 'a'."),
    ],
)
def test_wrong_options_are_refused(world: World, arguments: list[str], message: str) -> None:
    done = world.call("search", world.values(), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
