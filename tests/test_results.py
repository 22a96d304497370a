"""The tables of RESULTS.md are what their programs make of the results under version control."""

import importlib
import json
import pathlib

import pytest
import reporting

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


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_page_says_what_came_out(page: str) -> None:
    digits, few, old = (
        json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train_digits", "quantize", "forgetting")
    )
    plain, sam = (reporting.show(digits["arms"][arm]["final"]) for arm in ("momentum", "sam, rho 0.7"))
    rounded = {arm: row["accuracy"]["2 bits"]["mean"] for arm, row in few["settings"]["mnist, mlp"].items()}
    kept = {arm: row["at"]["80"]["mean"] for arm, row in old["settings"]["mnist, mlp, mirrored"].items()}
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert f"test accuracy {sam} % with SAM, {plain} % with momentum SGD." in text
    for values in (rounded, kept):
        assert f" {values['SAM']:.1f} % with SAM, {values['AdamW']:.1f} % with AdamW." in text
