"""The latency table adds up sites, fills in what was not timed without crossing a stair, and is kept in a file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from compress.allocation.costs import Axis
from compress.cost.conditions import TableConditions, present_conditions
from compress.cost.latency_table import BEFORE, HEAD, Sample, build_table, latency_cost, site_times
from compress.cost.table_file import TableFile, network_digest
from compress.cost.variants import Site
from compress.errors import ArtifactError, InternalError

SITES = (
    Site("stem", "Conv a", (16, 3), False),
    Site("body", "Conv b", (32, 16), False),
    Site("twin", "Conv b", (32, 32), False),
    Site("head", "Gemm", (10, 32), False),
)
STAIRS = {8: 1.0, 16: 1.6, 24: 3.1, 32: 3.3}


def _true_ms(site: Site, out: int, inp: int) -> float:
    """A staircase along the outputs, a line along the inputs."""
    return 0.2 * STAIRS.get(out, 1.0) * (1 + 0.05 * inp)


def _sample(rng: np.random.Generator, a: int, b: int, scale: float = 0.9, offset: float = 0.5) -> Sample:
    """The network with its first group at `a` and its second at `b` channels."""
    sizes = {"stem": (a, 3), "body": (b, a), "twin": (32, b), "head": (10, 32)}
    site_ms = {i: _true_ms(site, *sizes[site.layer]) for i, site in enumerate(SITES)} | {BEFORE: 0.1}
    total = scale * sum(site_ms.values()) + offset
    return Sample(sizes, site_ms, dict.fromkeys(site_ms, 0.02), total)


def _table(pairs):
    rng = np.random.default_rng(0)
    return build_table(SITES, [_sample(rng, a, b) for a, b in pairs])


ALL = [(a, b) for a in (8, 16) for b in STAIRS]
SOME = [(16, 32), (8, 8), (8, 24), (16, 16), (16, 8)]


@pytest.mark.parametrize("pairs", [ALL, SOME], ids=["all timed", "some filled in"])
def test_prediction_is_the_whole_network_also_for_pairs_that_were_not_timed(pairs):
    table = _table(pairs)
    assert table.error < 1e-6
    for a, b in ALL:
        want = _sample(np.random.default_rng(0), a, b)
        assert table.network_ms(SITES, want.sizes) == pytest.approx(want.total_ms, rel=0.01)


def test_a_network_of_fewer_sites_is_free_of_their_share_of_the_clocks_own_time():
    clock_ms = 0.05  # added to every site by timing it
    samples = []
    for a, b in ALL:
        sizes = _sample(np.random.default_rng(0), a, b).sizes
        true_ms = {number: _true_ms(site, *sizes[site.layer]) for number, site in enumerate(SITES)}
        timed = {number: took + clock_ms for number, took in true_ms.items()}
        samples.append(Sample(sizes, timed, dict.fromkeys(timed, 0.02), sum(true_ms.values())))
    table = build_table(SITES, samples)
    assert table.offset_ms == pytest.approx(-clock_ms * len(SITES))
    for left in (SITES, SITES[:2], SITES[1:], SITES[:1]):
        wanted = sum(_true_ms(site, *samples[0].sizes[site.layer]) for site in left)
        assert table.network_ms(left, samples[0].sizes) == pytest.approx(wanted)


def test_nothing_is_interpolated_across_a_stair():
    table = _table(SOME)
    steps = [table.site_ms("Conv b", out, 12) for out in (16, 24, 32)]
    assert steps[1] / steps[0] == pytest.approx(3.1 / 1.6, rel=0.01)
    assert steps[2] / steps[1] == pytest.approx(3.3 / 3.1, rel=0.01)
    with pytest.raises(InternalError, match="no site 'Conv z'"):
        table.site_ms("Conv z", 16, 8)


def test_outputs_that_no_variant_had_lie_between_their_neighbours():
    """Behind a concatenation groups add up to numbers of outputs that were never timed."""
    table = _table(SOME)
    low, middle, high = (table.site_ms("Conv b", out, 12) for out in (16, 20, 24))
    assert middle == pytest.approx((low + high) / 2)
    assert table.site_ms("Conv b", 99, 12) == table.site_ms("Conv b", 32, 12)


@pytest.mark.parametrize("pairs", [ALL, SOME], ids=["all timed", "some filled in"])
def test_arrays_of_sizes_cost_what_single_sizes_cost(pairs):
    table = _table(pairs)
    outs, inps = np.arange(4, 36)[:, None], np.arange(1, 40)[None, :]
    wanted = [[table.site_ms("Conv b", out, inp) for inp in inps[0]] for out in outs[:, 0]]
    assert np.array_equal(table.sites_ms("Conv b", outs, inps), wanted)
    assert table.site_ms("Conv b", 32, 16) == table.scale * table.entries["Conv b"][32, 16].milliseconds


def test_cost_tables_hold_the_prediction_for_every_choice():
    table = _table(SOME)
    levels = {"one": (8, 16), "two": (8, 16, 24, 32)}
    axes = {
        "stem": (Axis(16, {"one": 1}), Axis(3)),
        "body": (Axis(32, {"two": 1}), Axis(16, {"one": 1})),
        "twin": (Axis(32), Axis(32, {"two": 1})),
    }
    cost = latency_cost(table, SITES, axes, levels)
    for i, a in enumerate(levels["one"]):
        for j, b in enumerate(levels["two"]):
            sizes = {"stem": (a, 3), "body": (b, a), "twin": (32, b)}
            assert cost.at({"one": i, "two": j}) == pytest.approx(table.network_ms(SITES, sizes))
    assert cost.fixed < min(cost.at({"one": i, "two": 0}) for i in (0, 1))


def test_a_block_that_goes_takes_its_sites_along():
    table = _table(ALL)
    cost = latency_cost(table, SITES, {}, {}, switches={"body": "block", "twin": "block"})
    gone, there = (cost.at({"block": option}) for option in (0, 1))
    expected = sum(table.site_ms(site.kind, *site.sizes) for site in SITES[1:3])
    assert there - gone == pytest.approx(expected)


def test_nodes_that_the_runtime_put_in_go_with_the_site_before_them():
    names = ["ReorderInput", "site0.1.0_nchwc", "ReorderOutput_token_5", "site1.3", "site0.2"]
    times = site_times(names, np.array([[1.0], [2.0], [4.0], [8.0], [16.0]]))
    assert {site: calls.tolist() for site, calls in times.items()} == {BEFORE: [1.0], 0: [22.0], 1: [8.0]}


def test_times_are_put_on_the_scale_of_the_usual_machine():
    calls = np.full((1, 9), 3.0)
    sample = Sample.of({}, ["site0.1"], calls, np.full(9, 4.0), slowness=2.0)
    assert (sample.site_ms, sample.total_ms, sample.spreads) == ({0: 1.5}, 2.0, {0: 0.0})


def test_file_reads_back_and_gives_the_same_table(tmp_path):
    here = present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    rng = np.random.default_rng(0)
    written = TableFile(here, network_digest(SITES), 2.5, tuple(_sample(rng, a, b) for a, b in SOME))
    written.write(tmp_path / "tables" / "device.json")
    read = TableFile.read(tmp_path / "tables" / "device.json")
    assert read == written
    assert build_table(SITES, read.samples) == build_table(SITES, written.samples)
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["device.json"]
    assert HEAD in build_table(SITES, read.samples).entries


def test_conditions_name_what_differs():
    here = TableConditions("cpu", 2, "avx2", "onnxruntime 1.31", "CPUExecutionProvider", 1, 1)
    assert here.differences(here) == []
    other = replace(here, machine="phone", threads=4)
    assert here.differences(other) == ["machine cpu here, phone in the table", "threads 1 here, 4 in the table"]
    assert here.key != other.key


def test_the_digest_of_a_network_is_of_its_structure():
    assert network_digest(SITES) == network_digest(list(SITES))
    assert network_digest(SITES) != network_digest(SITES[:-1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values: values.update(kind="other"), "ValueError: kind 'other'"),
        (lambda values: values.update(schema=99), "schema 99"),
        (lambda values: values.pop("samples"), "KeyError: 'samples'"),
        (lambda values: values["conditions"].pop("machine"), "TypeError"),
        (lambda values: values["samples"][0].update(total_ms=-1), "finite numbers of at least 0, got -1"),
        (lambda values: values["samples"][0]["site_ms"].update({"0": "fast"}), "got 'fast'"),
        (lambda values: values["samples"][0].update(sizes=[]), "AttributeError"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change, text):
    path = tmp_path / "device.json"
    here = present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    TableFile(here, "digest", 1.0, (_sample(np.random.default_rng(0), 8, 8),)).write(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["record_digest"]  # as an older version wrote it
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtifactError, match="must be a latency table of schema 2") as caught:
        TableFile.read(path)
    assert text in str(caught.value)


def test_a_changed_bit_of_a_table_is_noticed(tmp_path):
    path = tmp_path / "device.json"
    here = present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    written = TableFile(here, "digest", 1.0, (_sample(np.random.default_rng(0), 8, 8),))
    written.write(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        warned: list[str] = []
        kept = TableFile.read_cached(path, warned.append)
        assert (kept is None and len(warned) == 1) or kept == written
    assert TableFile.read_cached(tmp_path / "none.json", pytest.fail) is None


def test_a_table_of_an_older_version_is_read(tmp_path):
    path = tmp_path / "device.json"
    here = present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    written = TableFile(here, "digest", 1.0, (_sample(np.random.default_rng(0), 8, 8),))
    written.write(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["record_digest"]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert TableFile.read(path) == written


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"device\.json' does not exist"):
        TableFile.read(tmp_path / "device.json")
    (tmp_path / "device.json").write_bytes(b"\xff\xfe not json")
    with pytest.raises(ArtifactError, match="must be a latency table"):
        TableFile.read(tmp_path / "device.json")


def test_no_prediction_is_negative_even_where_variants_took_less_than_their_layers():
    """The clock inside slows layers down; so much may not be taken off that nothing is left of a narrow network."""
    samples = []
    for a, b in ALL:
        sample = _sample(np.random.default_rng(0), a, b)
        samples.append(replace(sample, total_ms=max(0.05, 2 * sum(sample.site_ms.values()) - 9)))
    table = build_table(SITES, samples)
    sizes = {"stem": (8, 3), "body": (8, 8), "twin": (8, 8), "head": (10, 8)}
    assert table.network_ms(SITES, sizes) > 0
