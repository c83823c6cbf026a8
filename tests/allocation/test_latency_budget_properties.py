"""The latency budget equals the table at every choice, however many groups a layer is narrowed by."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocation.costs import Axis
from compress.allocation.knapsack import allocate
from compress.allocation.problem import Budget, Decision
from compress.cost.latency_table import Entry, Fill, LatencyTable, latency_cost
from compress.cost.variants import Site
from compress.pruning.width_costs import LayerAxes

SETTINGS = settings(max_examples=40, deadline=None)
BLOCK = "block"


@st.composite
def networks(draw):
    """Draw a concat network: layers that read and pass on what up to five groups produce, and their table."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    monotone = draw(st.booleans())
    shares = draw(st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 0.5)]))
    full = {f"g{index}": int(random.integers(2, 9)) for index in range(draw(st.integers(3, 5)))}
    levels = {name: tuple(sorted({1, int(random.integers(1, width + 1)), width})) for name, width in full.items()}
    axes: dict[str, tuple[Axis, Axis]] = {}
    sites, entries, fills = [], {}, {}
    for number in range(draw(st.integers(1, 4))):
        layer, is_depthwise = f"layer{number}", random.random() < 0.3
        out, inp = (_axis(full, random, shares) for _ in range(2))
        axes[layer] = (out, out) if is_depthwise else (out, inp)
        sizes = tuple(round(axis.size) for axis in axes[layer])
        kind = f"kind{number}"
        sites.append(Site(layer, kind, sizes, is_depthwise))
        entries[kind], fills[kind] = _times(sizes, random, monotone)
    clock = draw(st.sampled_from([(0.5, 0), (-1e-4 * len(sites), len(sites))]))  # a fixed offset, and one for each site
    table = LatencyTable(entries, 0.9, clock[0], 0.0, fills, clock[1])
    return table, tuple(sites), LayerAxes(axes, full), levels, monotone


def _axis(full, random, shares) -> Axis:
    chosen = [name for name in full if random.random() < 0.7]
    slots = {name: float(random.choice(shares)) for name in chosen}
    return Axis(float(np.ceil(sum(full[name] * share for name, share in slots.items())) + 3), slots)


def _times(sizes, random, monotone):
    """Return entries and the fill of a kind; where `monotone`, no more channels take less time."""
    stairs = np.cumsum(random.random(sizes[0] + 1)) + 0.1
    fill = Fill(dict(enumerate(stairs.tolist())), float(random.random()), float(random.random() + 0.01))
    known = {
        (int(out), int(inp)): float(fill.at(out, inp)) * (1 if monotone else random.uniform(0.2, 5))
        for out, inp in zip(random.integers(0, sizes[0] + 1, 30), random.integers(0, sizes[1] + 1, 30), strict=True)
    }
    return {pair: Entry(ms, 0.0, 1) for pair, ms in known.items()}, fill


def _all_choices(levels):
    for options in itertools.product(*(range(len(widths)) for widths in levels.values())):
        choice = dict(zip(levels, options, strict=True))
        yield choice, {name: levels[name][option] for name, option in choice.items()}


@SETTINGS
@given(networks())
def test_the_budget_costs_what_the_table_predicts_at_every_choice(network):
    table, sites, axes, levels, _ = network
    cost = latency_cost(table, sites, axes.axes, levels)
    for choice, widths in _all_choices(levels):
        assert cost.at(choice) == pytest.approx(table.network_ms(sites, axes.sizes(widths)), rel=1e-12)
        assert cost.at(choice) > 0


@SETTINGS
@given(networks(), st.integers(0, 2**32 - 1))
def test_costs_of_options_are_those_of_the_choices_they_make(network, seed):
    table, sites, axes, levels, _ = network
    cost = latency_cost(table, sites, axes.axes, levels)
    random = np.random.default_rng(seed)
    choice = {name: int(random.integers(len(widths))) for name, widths in levels.items()}
    each = cost.of_each(choice, levels, cost.at(choice))
    for name, widths in levels.items():
        wanted = [cost.at({**choice, name: option}) for option in range(len(widths))]
        shape = (len(widths),)
        assert np.broadcast_to(cost.of_options(choice, name), shape) == pytest.approx(wanted)
        assert np.broadcast_to(each[name], shape) == pytest.approx(wanted)


@SETTINGS
@given(networks())
def test_wider_is_never_cheaper_where_the_table_says_so(network):
    table, sites, axes, levels, monotone = network
    if not monotone:
        return
    cost = latency_cost(table, sites, axes.axes, levels)
    for choice, _ in _all_choices(levels):
        for name in levels:
            costs = cost.of_options(choice, name)
            assert (np.diff(costs) >= -1e-9).all()


@SETTINGS
@given(networks(), st.integers(0, 2**32 - 1))
def test_layers_of_a_block_that_goes_cost_nothing(network, seed):
    table, sites, axes, levels, _ = network
    random = np.random.default_rng(seed)
    gone = {site.layer: BLOCK for site in sites if random.random() < 0.5}
    cost = latency_cost(table, sites, axes.axes, levels, gone)
    without = [site for site in sites if site.layer not in gone]
    for choice, widths in itertools.islice(_all_choices(levels), 40):
        sizes = axes.sizes(widths)
        wanted = [table.network_ms(left, sizes) for left in (without, sites)]
        assert [cost.at({**choice, BLOCK: option}) for option in (0, 1)] == pytest.approx(wanted)
        for here in (0, 1):
            start = {**choice, BLOCK: here}
            assert np.broadcast_to(cost.of_options(start, BLOCK), 2) == pytest.approx(wanted)
            each = cost.of_each(start, [*levels, BLOCK], cost.at(start))
            for name in levels:
                costs = [cost.at({**start, name: option}) for option in range(len(levels[name]))]
                assert np.broadcast_to(each[name], len(costs)) == pytest.approx(costs)


@SETTINGS
@given(networks(), st.integers(0, 2**32 - 1), st.floats(0.02, 1), st.booleans())
def test_no_choice_within_the_budget_does_less_damage(network, seed, share, with_block):
    table, sites, axes, levels, _ = network
    random = np.random.default_rng(seed)
    gone = {site.layer: BLOCK for site in sites if random.random() < 0.5} if with_block else {}
    cost = latency_cost(table, sites, axes.axes, levels, gone)
    damages = {name: np.sort(random.random(len(widths)))[::-1] for name, widths in levels.items()}
    if gone:
        damages[BLOCK] = np.asarray([random.random(), 0.0])
    choices = [
        dict(zip(damages, options, strict=True))
        for options in itertools.product(*(range(len(values)) for values in damages.values()))
    ]
    costs = [cost.at(choice) for choice in choices]
    budget = Budget("ms", cost, min(costs) + share * (max(costs) - min(costs)))
    found = allocate([Decision(name, values) for name, values in damages.items()], [budget])
    best = min(
        sum(damages[name][option] for name, option in choice.items()) for choice in choices if budget.allows(choice)
    )
    assert budget.allows(found.choice)
    if all(axis.slots[name] == 1 for pair in axes.axes.values() for axis in pair for name in axis.slots):
        assert found.is_optimal, "only counts that are rounded may keep the solver from a proof"
    if found.is_optimal:
        assert found.damage == pytest.approx(best, rel=1e-5, abs=1e-9)
