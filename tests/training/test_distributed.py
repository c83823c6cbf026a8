"""Two processes that train together end as one process does, at the same batches."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import team_run
import torch
from torch.distributed import HashStore

from compress.errors import DataError
from compress.progress import SilentProgress
from compress.training import distributed
from compress.training import loop as loop_module
from compress.training.distributed import Ranks, _agreed_name, current_ranks, from_rank_0, leave, on_rank_0
from compress.training.distributed import together as joined
from compress.training.loop import fit

SIZE = 2


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What a ranks of two has written."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, team_run.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(SIZE), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(SIZE)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return folder


def _weights(folder: Path, kind: str, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{kind}-{rank}.weights", weights_only=True)


@pytest.mark.parametrize("kind", team_run.KINDS)
def test_all_processes_end_with_the_same_weights_and_figures(together, kind):
    first, second = (_weights(together, kind, rank) for rank in range(SIZE))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    figures = [json.loads((together / f"{rank}.json").read_text())[kind] for rank in range(SIZE)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("kind", [kind for kind in team_run.KINDS if kind != "norm"])
def test_two_processes_end_as_one_does(together, kind):
    module, losses, top1 = team_run.train("plain" if kind == "compiled" else kind)
    got, figures = _weights(together, kind, 0), json.loads((together / "0.json").read_text())[kind]
    for name, value in module.state_dict().items():
        assert torch.allclose(got[name], value, atol=2e-5), name
    assert figures[0] == pytest.approx(losses, rel=1e-4)
    assert figures[1] == top1
    untrained = team_run.network(kind).state_dict()
    first = next(iter(got))
    assert not torch.allclose(got[first], untrained[first], atol=1e-2)


@pytest.mark.parametrize("kind", ["unused", "unused accumulated"])
def test_parameters_without_gradient_stay_unchanged(together, kind):
    got, untrained = _weights(together, kind, 0), team_run.network(kind).state_dict()
    for name, value in got.items():
        assert torch.equal(value, untrained[name]) == name.startswith(("none.", "unread.")), name


def test_one_process_goes_on_from_where_two_were(together, tmp_path):
    state = tmp_path / "left.pt"
    shutil.copyfile(together / "left.pt", state)
    notes = []
    listener = SilentProgress()
    listener.note = notes.append
    module, losses, _ = team_run.train("plain", state, listener)
    assert "Training goes on after epoch 1 of 3." in notes
    undisturbed, wanted, _ = team_run.train("plain")
    assert losses == pytest.approx(wanted, rel=1e-4)
    for name, value in undisturbed.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, atol=2e-5), name


def test_batch_norm_sees_its_part_of_a_batch_and_statistics_are_averaged(together):
    module, losses, _ = team_run.train("norm")
    got, figures = _weights(together, "norm", 0), json.loads((together / "0.json").read_text())["norm"]
    assert figures[0] == pytest.approx(losses, rel=0.1)
    assert torch.allclose(got["1.running_mean"], module.state_dict()["1.running_mean"], atol=0.1)


def test_sums_and_flags_are_of_all(together):
    for rank in range(SIZE):
        figures = json.loads((together / f"{rank}.json").read_text())
        assert figures["sums"] == [2.0, 1.0]
        assert figures["any"] == [True, False]
        assert figures["gate"] == 1.5
        assert figures["told"] == "wörd"
        assert figures["apart"] == 1  # outside of `together` each is on its own


def test_votes_are_taken_every_20_steps_and_after_each_epoch(together):
    figures = json.loads((together / "0.json").read_text())
    assert figures["votes of plain"] == 3
    assert figures["votes of late"] == 10 + 2  # of 50 steps


def test_gradients_are_averaged_once_a_step(together):
    figures = json.loads((together / "0.json").read_text())
    assert figures["kept of plain"] == 0
    assert figures["kept of accumulated"] == 3 * 2  # the first batch of each of two steps an epoch


def test_nothing_of_a_wrapper_is_left_after_a_training(together):
    for rank in range(SIZE):
        assert json.loads((together / f"{rank}.json").read_text())["wrappers"] == [len(team_run.KINDS), 0]


def test_rank_0_works_alone_and_shares_its_result(together):
    first, second = (json.loads((together / f"{rank}.json").read_text()) for rank in range(SIZE))
    assert (first["alone"], second["alone"]) == ([1, 0], None)
    assert first["shared"] == second["shared"] == {"rank": 0}
    assert ("stayed" in first, "stayed" in second) == (True, False)  # the other one has left its part


def test_one_process_shares_and_leaves_without_effect():
    with joined():
        leave()
        assert from_rank_0(lambda: (1, 2)) == (1, 2)
        assert on_rank_0(lambda: 3) == 3


def test_trainings_time_out_after_30_minutes_and_waiting_does_not(monkeypatch):
    timeouts = {}
    monkeypatch.setattr(distributed, "rendezvous", lambda _method: iter([(HashStore(), 0, 1)]))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *_, timeout, **__: timeouts.update(training=timeout)
    )
    monkeypatch.setattr(
        distributed.dist,
        "new_group",
        lambda timeout, **_: timeouts.update(waiting=timeout) or distributed.dist.ProcessGroup(0, 1),
    )
    assert distributed.open_group() == Ranks(0, 1)
    distributed.close_group(is_done=True)
    assert timeouts == {"training": timedelta(minutes=30), "waiting": timedelta(days=30)}


def test_a_process_that_does_not_answer_is_told_from_one_that_has_ended():
    late = distributed.rank_lost(RuntimeError("Timed out waiting 1800000ms for recv operation to complete"))
    assert "another one has not answered for 30 minutes: Timed out waiting" in late.message
    gone = distributed.rank_lost(RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"))
    assert gone.message.endswith("another one has ended: Connection closed by peer [127.0.0.1]:1")


def test_a_failure_reaches_rank_0_which_prints_it(monkeypatch):
    monkeypatch.setattr(distributed, "_PRINT_S", 0)
    messages = distributed.Messages(HashStore())
    with ThreadPoolExecutor(1) as threads:
        printed = threads.submit(messages.report_failure, 2, "No disk.", "Buy one.")
        assert messages.hear_failure() == (2, "No disk.", "Buy one.")
        messages.take_over()
        assert printed.result() is True


def test_a_failure_that_nobody_hears_is_printed_by_its_own_process(monkeypatch):
    monkeypatch.setattr(distributed, "_ANSWER_S", 0.1)
    messages = distributed.Messages(HashStore())
    assert messages.hear_failure() is None
    assert messages.is_taken_over() is False
    assert messages.report_failure(1, "No disk.", None) is False


def test_a_process_that_is_left_alone_in_a_step_says_so(together):
    message = json.loads((together / "0.json").read_text())["left alone"]
    assert message.startswith("All processes must stay until the run is done, another one has ended: ")


def test_processes_agree_on_a_name_whatever_others_have_left():
    store = HashStore()
    for key, value in (("asks/1", "gone"), ("answer/gone", "old"), ("old/knows/1", ""), ("asks/2", "gone")):
        store.set(key, value)
    with ThreadPoolExecutor(3) as threads:
        names = list(threads.map(lambda rank: _agreed_name(store, rank, 3), range(3)))
    assert len(set(names)) == 1
    assert names[0] != "old"


def test_one_process_writes_the_state_and_none_is_left(together):
    assert [path.name for path in together.glob("*.pt")] == ["left.pt"]  # of a training that did not end


def test_a_process_of_its_own_is_a_team_of_one():
    ranks = current_ranks()
    assert ranks == Ranks(0, 1)
    values = [torch.tensor([1.0, 2.0])]
    ranks.average(values)
    assert values[0].tolist() == [1.0, 2.0]
    assert ranks.total([3.0]) == [3.0]
    assert (ranks.any(True), ranks.any(False)) == (True, False)


def test_batches_that_cannot_be_parted_are_refused(monkeypatch):
    monkeypatch.setattr(loop_module, "current_ranks", lambda: Ranks(0, 3))
    with pytest.raises(DataError, match=r"batch_size must be divisible by the number of processes \(3\)"):
        fit(team_run.network("plain"), team_run.splits(), team_run.SETTINGS)
