"""The pages of docs/ say what the code does: every method has one, with every setting and its default."""

import re
from pathlib import Path

import pytest

from compress.catalog import METHODS
from compress.config.schema import (
    CsgdConfig,
    GatesMethodConfig,
    GregConfig,
    GsmConfig,
    IncRegConfig,
    PruneConfig,
    TrpConfig,
)

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
SETTINGS = {
    "gsm": GsmConfig,
    "gates": GatesMethodConfig,
    "greg": GregConfig,
    "increg": IncRegConfig,
    "csgd": CsgdConfig,
    "trp": TrpConfig,
}


def test_every_method_has_a_page_and_stands_in_the_index():
    assert set(SETTINGS) == {*METHODS, "trp"}
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SETTINGS:
        assert (FOLDER / f"{name}.md").is_file()
        assert f"[{name}]({name}.md)" in index


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_page_has_every_setting_with_its_default_and_the_source(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    wanted = {key: field.default for key, field in SETTINGS[name].model_fields.items()}
    assert table.keys() == wanted.keys()
    for key, default in wanted.items():
        assert table[key].strip() == ("sized for the run" if default is None else str(default))
    assert re.search(r"Sources?: .*arXiv:\d{4}\.\d{5}", text, re.DOTALL)


def test_settings_of_methods_are_keys_of_the_stage():
    assert {name for name in SETTINGS if name != "trp"} <= set(PruneConfig.model_fields)
