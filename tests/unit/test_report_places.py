"""The report's section on runtimes: there only where something is to be said."""

from compress.report.places import render_places


def report(**details):
    return {"details": details}


def test_nothing_is_said_where_everything_ran_where_it_should():
    fine = {"asked": "CPUExecutionProvider", "nodes": {"CPUExecutionProvider": 9}, "fell_back": []}
    assert render_places(report(providers=fine)) == ""
    assert render_places(report()) == ""
    assert render_places({}) == ""


def test_nodes_that_fell_back_are_listed_and_escaped():
    providers = {"asked": "GPU", "nodes": {"GPU": 7, "CPU": 2}, "fell_back": ["Shape <a>", "Gather b"]}
    page = render_places(report(providers=providers))
    assert "Shape &lt;a&gt;, Gather b" in page
    assert "7 on GPU, 2 on CPU" in page


def test_other_places_have_a_row_each_with_times_or_the_reason():
    timed = {"label": "CPU.2", "status": "pass", "p50_ms": 1.25, "shipping_p50_ms": 2.5, "max_abs": 1e-6}
    absent = {"label": "CUDA", "status": "skipped", "reason": "no <GPU> here"}
    page = render_places(report(also=[timed, absent]))
    assert page.count("<tr>") == 3
    assert "1.25" in page
    assert "no &lt;GPU&gt; here" in page
    assert render_places(report(also=[{}])).count("<tr>") == 2
