"""The tables of RESULTS.md are what their programs make of the results under version control."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = sorted(ROOT.glob("*/results/*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_json(path: pathlib.Path) -> None:
    folder = path.parent.parent
    content = json.loads(path.read_text(encoding="utf-8"))
    tables = importlib.import_module(path.stem).text_of(content)
    page = (folder / "RESULTS.md").read_text(encoding="utf-8")
    before, found, _ = page.partition(tables)
    assert found, f"{folder.name}/RESULTS.md has no\n\n{tables}\n"
    assert f"python {folder.name}/{path.stem}.py" in before.rpartition("\n## ")[2]
    assert content.get("meaning", "") in page
