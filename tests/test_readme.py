"""README: short, its Python runs, its links lead somewhere, and the commands in it parse."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = ("*.md", "reports/**/*.md", "params/**/*.md", "notebooks/models/*/*.md")
PAGES = [path for place in PLACES for path in sorted(ROOT.glob(place))]


def test_it_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if not re.match(r"https?:|mailto:", link)]
    assert [link for link in inside if not (page.parent / link).exists()] == []
    titles = re.findall("^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    places = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub names them
    assert {*re.findall(r"\]\(#([^)]*)\)", page.read_text(encoding="utf-8"))} <= places
    made = [link for link in inside if link.endswith((".html", ".ipynb")) and "notebooks/" not in link]
    assert made == [] or "reports" not in str(page)  # not kept


def test_what_lies_beside_a_published_page_is_named_by_one() -> None:
    """Files of an earlier page with other numbers would be taken for this one's."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    folders = {page.parent for page in PAGES if page.parent.parent == ROOT / "reports"}
    files = [file for folder in folders if not (folder / "status.json").exists() for file in folder.rglob("*.*")]
    every = {"environment.json", "metrics.json", "timings.json", "params.yaml"}
    assert len(files) > 100
    assert [file for file in files if file.suffix != ".md" and file.name not in every and file.name not in text] == []


def test_every_experiment_and_file_that_it_names_is_there() -> None:
    both = README + (ROOT / "reports/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:params|notebooks)/[\w/.-]+\.(?:yaml|ipynb))", both)) - {"params/mine.yaml"}
    assert len(named) > 10 and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    images, real = names["images"], names["real"]
    assert isinstance(images, list) and (len(images), images[0].size, len(real)) == (64, (16, 16), 179)
