"""A recipe is data: it goes through JSON unchanged, and foreign text is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ArtifactError
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels

NAMES = st.text(min_size=1, max_size=8)
INDICES = st.lists(st.integers(0, 999), max_size=5).map(tuple)
EDITS = st.one_of(
    st.builds(RemoveChannels, st.dictionaries(NAMES, INDICES, max_size=3)),
    st.builds(RemoveBlock, NAMES),
    st.builds(Factorize, NAMES, st.sampled_from(["nc", "vh", "tucker2", "svd"]), INDICES),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(EDITS, max_size=4))
def test_json_round_trip(edits):
    recipe = Recipe(tuple(edits))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).to_json() == recipe.to_json()


def test_then_adds_at_the_end_and_leaves_the_first_alone():
    first = Recipe().then(RemoveBlock("a"))
    both = first.then(RemoveBlock("b"), RemoveChannels({"c": (1,)}))
    assert first.edits == (RemoveBlock("a"),)
    assert both.edits == (RemoveBlock("a"), RemoveBlock("b"), RemoveChannels({"c": (1,)}))


def _text(*edits: object, schema: object = 1) -> str:
    return json.dumps({"schema": schema, "edits": list(edits)})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must be a list of known edits"),
        ("not json", "must be a list of known edits"),
        ("[]", "must be a list of known edits"),
        ("{}", "must be a list of known edits.*schema"),
        ("[" * 100_000, "must be a list of known edits.*RecursionError"),
        (_text(schema=2), "must have schema 1, got 2"),
        (_text({"edit": "run_code"}), "must be a list of known edits.*run_code"),
        (_text({"block": "a"}), "must be a list of known edits.*edit"),
        (_text("remove_block"), "must be a list of known edits"),
        (_text({"edit": "remove_block"}), "must be a list of known edits.*block"),
        (_text({"edit": "remove_block", "block": 5}), "block must be text, got 5"),
        (_text({"edit": "remove_block", "block": "a", "more": "b"}), "must be a list of known edits.*more"),
        (_text({"edit": "remove_channels", "removed": [1]}), "must be a list of known edits"),
        (_text({"edit": "remove_channels", "removed": {"a": [1.5]}}), r"whole numbers must be listed, got \[1.5\]"),
        (_text({"edit": "remove_channels", "removed": {"a": [float("inf")]}}), "whole numbers must be listed"),
        (_text({"edit": "remove_channels", "removed": {"a": "12"}}), "whole numbers must be listed, got '12'"),
        (_text({"edit": "factorize", "layer": "a", "scheme": "nc", "ranks": [True]}), "whole numbers must be listed"),
        (_text({"edit": "factorize", "layer": "a", "scheme": "nc"}), "must be a list of known edits.*ranks"),
    ],
)
def test_foreign_text_is_refused(text, match):
    with pytest.raises(ArtifactError, match=match):
        Recipe.from_json(text)


@given(JSON)
def test_any_other_json_is_refused_and_never_a_crash(value):
    for text in (json.dumps(value), _text(value), _text({"edit": "remove_channels", "removed": value})):
        try:
            recipe = Recipe.from_json(text)
        except ArtifactError:
            continue
        assert Recipe.from_json(recipe.to_json()) == recipe


@given(st.text(max_size=30))
def test_any_other_text_is_refused(text):
    with pytest.raises(ArtifactError, match="must be a list of known edits"):
        Recipe.from_json(text)
