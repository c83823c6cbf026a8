"""Noise and corruptions go into both networks alike, and what is lost there is told."""

import numpy as np
import pytest

from compress.catalog import CORRUPTIONS, NOMINAL
from compress.config.schema.verify import RobustnessConfig
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import DataError
from compress.model.artifacts import Signature, TensorSpec
from compress.verification.metrics import Estimate, paired_drop
from compress.verification.robustness import (
    Robustness,
    Standing,
    distributions,
    standings,
    stated,
    summarize,
)
from compress.verification.runtimes.base import Runtime
from compress.verification.scope import Scope

ONE = Robustness(noise_levels=(0.5,), corruptions=("brightness",), severities=(5,))


class Bright(Runtime):
    """Says class 1 where the mean of an image is above a threshold; remembers what it saw."""

    name = "bright"

    def __init__(self, threshold=0.0, batch="batch"):
        super().__init__("none")
        self.threshold, self.batch, self.seen = threshold, batch, []

    @property
    def provider_in_use(self):
        return "none"

    def _open(self):
        shape = (self.batch, 1, 8, 8)
        return Signature((TensorSpec("image", shape),), (TensorSpec("logits", (self.batch, 2)),))

    def _run(self, inputs):
        (images,) = inputs.values()
        self.seen.append(images.copy())
        means = images.mean((1, 2, 3)) - self.threshold
        return {"logits": np.stack([-means, means], axis=1).astype(np.float32)}

    def _close(self):
        pass


@pytest.fixture
def split():
    """Dark and light images in turn."""
    images = np.full((40, 8, 8, 1), 100, np.uint8)
    images[1::2] = 160
    source = ArraySource(images, np.arange(40) % 2, ())
    return Split("evaluation", source, np.arange(40), Preprocessing((0.5,), (0.25,), channels="L"))


def test_what_is_looked_at():
    names = [one.name for one in distributions(Robustness(noise_levels=(0.1, 0.25), severities=(1, 3)))]
    assert names[:3] == [NOMINAL, "uniform noise 0.1", "uniform noise 0.25"]
    assert names[3:] == [f"{name} {severity}" for name in CORRUPTIONS for severity in (1, 3)]


def test_both_networks_see_the_same_whatever_their_batches_are(split):
    with Bright() as one, Bright(batch=1) as other:
        wanted = Robustness(images=12, corruptions=("gaussian_noise", "elastic", "fog"))
        found = standings(one, other, split, wanted, 5)
    a, b = (np.concatenate(seen) for seen in (one.seen, other.seen))
    assert len(a) == 12 * len(found)
    assert np.array_equal(a, b)
    assert {standing.changes["churn"].value for standing in found} == {0.0}


def test_what_a_network_loses_in_the_light(split):
    """Brighter images make all of them class 1; a threshold in between is as good before and loses less."""
    with Bright(0.3) as slim, Bright(0.95) as baseline:
        nominal, noise, bright = standings(slim, baseline, split, ONE, 16)
    assert (nominal.value, nominal.baseline_value) == (1.0, 0.5)
    assert noise.kind == "noise"
    assert (bright.name, bright.value, bright.baseline_value) == ("brightness 5", 0.5, 1.0)
    assert bright.changes["drop.top1"].value == 0.5
    own, changes = summarize([nominal, noise, bright])
    assert own["corruptions"].value == 0.5
    assert changes["drop.corruptions"].value == changes["drop.worst_distribution"].value == 0.5
    assert changes["drop.worst_distribution"].detail.startswith("brightness 5, of 3 distributions; ")
    assert changes["rise.excess_error"].value == 1.0


def test_without_a_baseline_only_the_file_is_judged(split):
    with Bright() as session:
        found = standings(session, None, split, ONE, 16)
    own, changes = summarize(found)
    assert set(own) == {"noise", "corruptions"}
    assert changes == {}
    assert found[0].baseline_value is None


def test_the_summary_is_of_means_and_of_the_worst():
    def standing(name, kind, top1, drop):
        hits, before = (np.arange(100) < round(100 * share) for share in (top1, top1 + drop))
        return Standing(name, kind, top1, top1 + drop, {"drop.top1": Estimate(drop)}, hits, before)

    found = [
        standing(NOMINAL, NOMINAL, 0.9, 0.01),
        standing("a", "noise", 0.8, 0.02),
        standing("b", "noise", 0.6, 0.10),
        standing("c", "corruption", 0.7, 0.04),
    ]
    own, changes = summarize(found)
    assert (own["noise"].value, own["noise"].detail) == (pytest.approx(0.7), "mean over 2 distributions")
    assert changes["drop.noise"].value == pytest.approx(0.06)
    for name, value in {"drop.noise": 0.06, "drop.corruptions": 0.04}.items():
        assert changes[name].low < value < changes[name].high
    assert own["noise"].low < 0.7 < own["noise"].high
    worst, alone = changes["drop.worst_distribution"], changes["on.b"]
    assert worst.value == pytest.approx(0.10)
    assert worst.detail.startswith("b, of 4 distributions; ")
    single = paired_drop(found[2].baseline_hits, found[2].hits).interval
    assert worst.low < single[0] < single[1] < worst.high  # the largest of four is less sure than one alone
    assert alone.value == 0.10
    assert changes["rise.excess_error"].value == pytest.approx(0.03)
    assert [one["name"] for one in stated(found)] == [NOMINAL, "a", "b", "c"]


def test_a_shifted_data_set_has_a_name_of_its_own(split):
    wanted = Robustness(noise_levels=(), corruptions=("jpeg",))
    assert [one.name for one in distributions(wanted, {"web": split})] == [NOMINAL, "jpeg 3", "web"]
    for name in (NOMINAL, "jpeg 3"):
        with pytest.raises(DataError, match=f"Shifted data set '{name}' must have a name of its own"):
            Scope(robustness=wanted, shifted={name: split})


def test_an_excess_may_be_as_large_as_two():
    hits, none = np.ones(400, bool), np.zeros(400, bool)
    change = {"drop.top1": Estimate(0.0)}
    nominal = Standing(NOMINAL, NOMINAL, 1.0, 0.0, change, hits, none)
    corrupted = Standing("fog 3", "corruption", 0.0, 1.0, change, none, hits)
    excess = summarize([nominal, corrupted])[1]["rise.excess_error"]
    assert excess.value == 2.0
    assert 1.9 < excess.low < excess.high <= 2.0


def test_defaults_are_the_same_in_both_places():
    assert Robustness(**RobustnessConfig().model_dump(exclude={"shifted"})) == Robustness()
