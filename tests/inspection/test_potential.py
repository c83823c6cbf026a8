"""How much can go depends on the images: the prune potential of a sweep."""

import pytest

from compress.report.model import read_report
from compress.report.sweep import describe_potential, potential_rows, prune_potential


def with_robustness(macs, **drops):
    """Return a report of a run with so many MACs of 100 that loses so much on each distribution."""
    standings = [
        {"name": name.replace("_", " "), "changes": {"drop.top1": {"value": drop}}} for name, drop in drops.items()
    ]
    details = {"robustness": {"distributions": standings}}
    verdict = {"checks": []}
    return read_report({"verdict": verdict, "baseline": {"macs": 100}, "slim": {"macs": macs}, "details": details})


def test_the_prune_potential_is_the_most_that_could_go_without_a_loss():
    reports = [
        with_robustness(80, nominal=-0.01, jpeg_3=0.001, noise=0.02),
        with_robustness(60, nominal=0.005, jpeg_3=0.004, noise=0.03),
        with_robustness(40, nominal=0.004, jpeg_3=0.009, noise=0.09),
    ]
    found = prune_potential(reports)
    assert found.distributions == {"nominal": pytest.approx(0.6), "jpeg 3": pytest.approx(0.4), "noise": 0.0}
    assert (found.nominal, found.average) == (pytest.approx(0.6), pytest.approx(0.2))
    assert (found.minimum, found.worst, found.delta) == (0.0, "noise", 0.005)
    assert prune_potential(reports, 0.02).distributions["noise"] == pytest.approx(0.2)
    assert [row[0] for row in potential_rows(found)] == ["noise", "jpeg 3", "nominal"]
    assert describe_potential(found) == (
        "Prune potential at a drop of 0.5 percentage points: 60.00 % of the MACs on unchanged images, 20.00 % on "
        "average over noise and corruptions, 0.00 % on noise."
    )


def test_without_noise_or_a_baseline_there_is_no_prune_potential():
    assert prune_potential([]) is None
    assert prune_potential([with_robustness(80, nominal=0.0)]) is None
    assert prune_potential([with_robustness(80, nominal=0.0, noise=None)]) is None
