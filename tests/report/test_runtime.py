"""The report's section on other places: there only where the file was opened in some."""

from compress.report.runtime import render_places


def report(**details):
    return {"details": details}


def test_nothing_is_said_where_the_file_was_opened_nowhere_else():
    assert render_places(report()) == ""
    assert render_places(report(also=[])) == ""
    assert render_places({}) == ""


def test_other_places_have_a_row_each_with_times_or_the_reason():
    timed = {"label": "CPU.2", "status": "pass", "p50_ms": 1.25, "shipping_p50_ms": 2.5, "max_abs": 1e-6}
    absent = {"label": "CUDA", "status": "skipped", "reason": "no <GPU> here"}
    page = render_places(report(also=[timed, absent]))
    assert page.count("<tr>") == 3
    assert "1.25" in page
    assert "no &lt;GPU&gt; here" in page
    assert render_places(report(also=[{}])).count("<tr>") == 2
