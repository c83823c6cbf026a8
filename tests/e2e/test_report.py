"""Reports of runs that really ran: images of the worst classes, the data's digests, and two runs side by side."""

import json

from smallrun import World, call


def test_two_budgets_are_compared(world: World) -> None:
    other = world.values() | {"name": "other"}
    world.run(other, "stages.prune.target.macs=0.9")
    first, second = (str(world.runs / name) for name in ("chain", "other"))
    done = call("report", first, second, "-o", str(world.folder / "page.html"))
    assert done.exit_code == 0, done.stderr
    assert "different images" not in done.stderr
    assert "digests" not in done.stderr
    page = (world.folder / "page.html").read_text(encoding="utf-8")
    assert "stages.<wbr>prune.<wbr>target.<wbr>macs" in page
    assert page.count("<svg") >= 1

    reports = [
        json.loads((world.runs / name / "report.json").read_text(encoding="utf-8")) for name in ("chain", "other")
    ]
    assert len({report["provenance"]["data"]["evaluation"] for report in reports}) == 1
    assert reports[0]["provenance"]["data"]["evaluation"] != reports[0]["provenance"]["data"]["train"]
    for report in reports:
        wrong = report["details"]["quality"]["worst_images"]
        assert len(wrong) <= 32
        assert all(one["label"] != one["predicted"] and one["index"] < 64 for one in wrong)


def test_a_page_is_written_anew_from_what_was_measured(world: World) -> None:
    page = world.runs / "chain" / "report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert call("report", str(world.runs / "chain")).exit_code == 0
    assert page.read_text(encoding="utf-8") == before


def test_a_run_that_is_not_finished_is_refused(world: World) -> None:
    (world.runs / "chain" / "report.json").unlink()
    done = call("report", str(world.runs / "chain"))
    assert done.exit_code == 4
    assert "has no report.json yet: it is unfinished." in done.stderr
