"""A table fitted to complete variants: staircases, standard errors, noise, outliers, and costs for the knapsack."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from compress.allocation.costs import Axis
from compress.cost.fitted_table import FittedTable, fit_table
from compress.cost.latency_table import BEFORE, Sample, latency_cost
from compress.cost.variants import Site
from compress.errors import InternalError

GROUPS = {"a": 32, "b": 32, "c": 64, "d": 64}
LEVELS = {name: tuple(range(width // 8, width + 1, width // 8)) for name, width in GROUPS.items()}
INPUTS = {"conv0": (None, "a", 16), "conv1": ("a", "b", 16), "conv2": ("b", "c", 8), "conv3": ("c", "d", 8),
          "head": ("d", None, 1)}  # fmt: skip


def _site(layer: str) -> Site:
    before, after, side = INPUTS[layer]
    out, inp = GROUPS.get(after or "", 10), GROUPS.get(before or "", 3)
    kernel = 1 if layer == "head" else 9
    work = out * inp * kernel * side**2, inp * side**2, out * side**2
    kind = "Gemm" if layer == "head" else f"Conv kernel_shape=3x3 input={side}x{side}"
    return Site(layer, kind, (out, inp), False, work)


SITES = tuple(map(_site, INPUTS))
AXES = {
    layer: (
        Axis(GROUPS.get(after or "", 10), {after: 1} if after else {}),
        Axis(GROUPS.get(before or "", 3), {before: 1} if before else {}),
    )
    for layer, (before, after, _) in INPUTS.items()
}
Truth = Callable[[Site, int, int], float]


def smooth(site: Site, out: int, inp: int) -> float:
    """A line along both sizes."""
    return 0.002 + site.work[0] / math.prod(site.sizes) * out * inp * 2e-7


def stairs(site: Site, out: int, inp: int) -> float:
    """Steps of eight outputs."""
    return smooth(site, math.ceil(out / 8) * 8, inp)


def uneven(site: Site, out: int, inp: int) -> float:
    """Steps, and one number of outputs that is slow in all layers of a kind."""
    return stairs(site, out, inp) * (1.5 if out == 28 else 1.0)


def sizes_at(widths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {
        layer: (widths.get(after or "", 10), widths.get(before or "", 3))
        for layer, (before, after, _) in INPUTS.items()
    }


def sample(widths: Mapping[str, int], truth: Truth, noise: float = 0.0) -> Sample:
    sizes = sizes_at(widths)
    total = 0.05 + sum(truth(site, *sizes[site.layer]) for site in SITES)
    return Sample(sizes, {}, {BEFORE: 0.01}, total * (1 + noise))


def widths_at_random(random: np.random.Generator) -> dict[str, int]:
    scale = random.uniform()
    places = np.clip(scale + random.normal(0, 0.3, len(LEVELS)), 0, 1)
    return {
        name: levels[round(place * (len(levels) - 1))]
        for (name, levels), place in zip(LEVELS.items(), places, strict=True)
    }


def fitted(truth: Truth, count: int = 48, noise: float = 0.0) -> FittedTable:
    random = np.random.default_rng(0)
    found = [sample(GROUPS, truth), sample({name: levels[0] for name, levels in LEVELS.items()}, truth)]
    found += [sample(widths_at_random(random), truth, noise * random.normal()) for _ in range(count - 2)]
    return fit_table(SITES, found)


def errors(table: FittedTable, truth: Truth) -> np.ndarray:
    random = np.random.default_rng(1)
    tried = [sample({name: int(random.choice(one)) for name, one in LEVELS.items()}, truth) for _ in range(20)]
    return np.asarray([abs(table.network_ms(SITES, one.sizes) / one.total_ms - 1) for one in tried])


@pytest.mark.parametrize(("truth", "within"), [(smooth, 0.001), (stairs, 0.003), (uneven, 0.03)])
def test_networks_that_were_not_timed_are_predicted(truth: Truth, within: float) -> None:
    table = fitted(truth)
    assert np.median(errors(table, truth)) < within
    assert table.error < within


def test_steps_are_kept() -> None:
    table = fitted(stairs)
    kind = SITES[1].kind
    low, same, high = (table.site_ms(kind, out, 32) for out in (17, 24, 25))
    assert same / low == pytest.approx(1, abs=0.05)
    assert high / same == pytest.approx(4 / 3, abs=0.1)


def test_a_slow_width_of_a_kind_is_found() -> None:
    table = fitted(uneven, count=96)
    kind = SITES[0].kind
    assert table.site_ms(kind, 28, 32) > 1.15 * table.site_ms(kind, 32, 32)


def test_noise_is_estimated_and_averaged_out() -> None:
    table = fitted(stairs, count=80, noise=0.02)
    assert 0.006 <= table.noise <= 0.025
    assert np.median(errors(table, stairs)) < 0.015


def test_one_variant_that_was_disturbed_does_not_spoil_the_others() -> None:
    clean = fitted(stairs)
    spoilt = list(clean.samples)
    spoilt[7] = replace(spoilt[7], total_ms=3 * spoilt[7].total_ms)
    assert np.median(errors(fit_table(SITES, spoilt), stairs)) < 0.03


def test_standard_errors_fall_with_more_variants_and_hold_at_new_networks() -> None:
    few, many = fitted(uneven, count=16, noise=0.005), fitted(uneven, count=96, noise=0.005)
    random = np.random.default_rng(2)
    networks = [widths_at_random(random) for _ in range(40)]
    stated = [float(np.median(table.errors(list(map(sizes_at, networks))))) for table in (few, many)]
    assert stated[1] < stated[0]
    assert many.entry_error < 0.1
    assert all(error >= 0 for error in many.entry_errors_ms.values())
    found = [abs(many.network_ms(SITES, one.sizes) / one.total_ms - 1) for one in (sample(w, uneven) for w in networks)]
    assert np.median(found) < 3 * stated[1]


def test_the_network_to_time_next_is_the_least_known_one() -> None:
    random = np.random.default_rng(0)
    found = [sample({**widths_at_random(random), "d": 64}, stairs) for _ in range(30)]
    table = fit_table(SITES, found)
    known, unknown = sizes_at({**GROUPS, "c": 32}), sizes_at({**GROUPS, "d": 8})
    assert table.errors([unknown])[0] > table.errors([known])[0]
    assert table.least_known([known, unknown, known], 2)[0] == 1
    assert len(set(table.least_known([known, unknown, known], 3))) == 3


def test_costs_of_the_knapsack_are_the_predictions() -> None:
    table = fitted(uneven)
    cost = latency_cost(table, SITES, AXES, LEVELS)
    random = np.random.default_rng(3)
    for _ in range(5):
        options = {name: int(random.integers(len(levels))) for name, levels in LEVELS.items()}
        widths = {name: LEVELS[name][option] for name, option in options.items()}
        assert cost.at(options) == pytest.approx(table.network_ms(SITES, sizes_at(widths)))


def test_sites_that_are_removed_take_their_share_of_the_fixed_part_along() -> None:
    table = fitted(smooth)
    assert table.fixed_ms(5) == pytest.approx(5 * table.share_ms) == table.offset_ms
    assert table.network_ms(SITES[:3], {}) < table.network_ms(SITES, {})


def test_times_are_above_zero_also_far_from_what_was_timed() -> None:
    table = fitted(uneven, count=8, noise=0.05)
    outs, inps = np.meshgrid(np.arange(1, 80), np.arange(1, 80))
    assert all((table.sites_ms(site.kind, outs, inps) > 0).all() for site in SITES)
    assert table.sites_ms(SITES[0].kind, outs, inps).shape == outs.shape


def test_kinds_that_were_not_timed_are_no_part_of_the_table() -> None:
    table = fitted(smooth, count=8)
    assert table.covers(SITES[:2])
    assert not table.covers([*SITES, replace(SITES[0], kind="Conv z")])
    with pytest.raises(InternalError, match="no site 'Conv z'"):
        table.site_ms("Conv z", 16, 8)


def test_depthwise_sites_and_sites_of_unknown_work_are_fitted() -> None:
    sites = (*SITES[:2], Site("depthwise", "Conv depthwise kernel_shape=3x3", (32, 32), True))

    def at(width: int) -> Sample:
        sizes = {"conv0": (width, 3), "conv1": (32, width), "depthwise": (width, width)}
        return Sample(sizes, {}, {BEFORE: 0.0}, 0.1 + 0.01 * math.ceil(width / 8) * 8)

    table = fit_table(sites, [at(width) for width in (2, 4, 8, 12, 16, 20, 24, 32)])
    assert table.network_ms(sites, at(24).sizes) == pytest.approx(at(24).total_ms, rel=0.02)
    assert table.spread == 0.0


def test_many_different_sums_behind_a_concatenation_get_a_few_knots() -> None:
    random = np.random.default_rng(0)
    sites = (Site("join", "Conv kernel_shape=1x1", (16, 512), False, (8192, 512, 16)),)

    def at(inp: int) -> Sample:
        return Sample({"join": (16, inp)}, {}, {BEFORE: 0.0}, 0.05 + 0.001 * inp)

    table = fit_table(sites, [at(int(inp)) for inp in random.integers(1, 512, 64)])
    assert len(next(iter(table.priors.values())).knots[1]) <= 16
    assert table.network_ms(sites, at(300).sizes) == pytest.approx(at(300).total_ms, rel=0.01)
