"""Links of the pages lead somewhere, and every page stands in the navigation of the site."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]*)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and Python-Markdown make them.

    >>> sorted(anchors("# A page\\n## `low_rank`, and more\\n## A page"))
    ['a-page', 'a-page_1', 'low_rank-and-more']
    """
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title).lower()
        name = re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        found.add(f"{name}_1" if name in found else name)
    return found


def _navigation(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list | dict):
        for one in entry.values() if isinstance(entry, dict) else entry:
            yield from _navigation(one)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


def test_pages_of_the_site_link_to_nothing_outside_of_it() -> None:
    outside = [
        (page.name, link)
        for page in PAGES[2:]
        for link in LINK.findall(_prose(page))
        if not re.match(r"[a-z]+:|#", link) and DOCS not in (page.parent / link.partition("#")[0]).resolve().parents
    ]
    assert outside == []


def test_every_page_stands_in_the_navigation_once() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = list(_navigation(yaml.safe_load(config)["nav"]))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[2:])


def test_a_broken_anchor_is_found() -> None:
    assert anchors("# One\n\n```sh\n# no heading\n```\n## How `a` is\n") == {"one", "how-a-is"}
    assert "confidence" in anchors((DOCS / "verification.md").read_text(encoding="utf-8"))
