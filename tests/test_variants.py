"""What belongs to a variant is all there: a failure names the file to edit; CONTRIBUTING.md has the steps."""

import ast
import importlib
import inspect
import pathlib
import re
from typing import Any

import digits_recipes
import optax
import oracles
import pytest
import table

import optax_sam

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "optax_sam" / "variants").glob("*.py") if path.stem != "__init__")


def constructors(path: pathlib.Path, *kinds: Any) -> list[str]:
    """The public functions of a file that return a variant, or another optimizer."""
    module = importlib.import_module(f"optax_sam.variants.{path.stem}")
    return [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name[0] != "_"
        and inspect.signature(getattr(module, node.name), eval_str=True).return_annotation in kinds
    ]


VARIANT, OTHER = optax_sam.SharpnessAwareTransformation, optax.GradientTransformationExtraArgs
DEFINED = {name: path.stem for path in FILES for name in constructors(path, VARIANT, OTHER)}
VARIANTS = [name for path in FILES for name in constructors(path, VARIANT)]
# Their loss has two parts, which the losses of the generic tests have not: they have a file of tests instead.
OF_TWO_PARTS = {"functional_sam": "test_functional_sam.py"}


def section_of(document: str, heading: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def listed(document: str, heading: str) -> set[str]:
    """The names that begin the rows of the tables of a section."""
    return set(re.findall(r"^\| `(\w+)` \|", section_of(document, heading), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_variants_holds_one(path: pathlib.Path) -> None:
    assert constructors(path, VARIANT, OTHER), f"{path} defines no public constructor"


@pytest.mark.parametrize("name", DEFINED)
def test_every_constructor_is_public(name: str) -> None:
    line = f"from optax_sam.variants.{DEFINED[name]} import {name} as {name}"
    assert hasattr(optax_sam, name), f"add to optax_sam/__init__.py: {line}"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_knows_its_name(name: str) -> None:
    """By which pairs of gradients of another are refused."""
    rows = [row for row in table.ROWS if row.constructor.__name__ == name]
    for row in rows:
        assert row.make().made_by.name == name, (
            f"decorate it in optax_sam/variants/{DEFINED[name]}.py: @constructor"
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_row(name: str) -> None:
    if name in OF_TWO_PARTS:
        assert (ROOT / "tests" / OF_TWO_PARTS[name]).exists()
        return
    rows = {row.constructor.__name__ for row in table.ROWS}
    assert name in rows, f'add to ROWS in tests/table.py: _row("{name}", optax_sam.{name}, kwargs=...)'


@pytest.mark.parametrize("name", [row.name for row in table.ROWS])
def test_every_row_has_an_oracle(name: str) -> None:
    assert name in oracles.ORACLES, (
        f'add to ORACLES in tests/oracles.py, with a function written from the paper alone: "{name}": ...'
    )


def test_every_oracle_has_a_row() -> None:
    more = oracles.ORACLES.keys() - {row.name for row in table.ROWS}
    assert not more, f"tests/oracles.py has oracles without a row in tests/table.py: {sorted(more)}"


@pytest.mark.parametrize("name", DEFINED)
def test_every_constructor_is_in_the_documents(name: str) -> None:
    assert name in listed("docs/choosing.md", "All variants"), (
        "add a line to the table of docs/choosing.md, section 'All variants': "
        f"| `{name}` | paper | direction | ..."
    )
    wanted = section_of("docs/choosing.md", "By what you need")
    assert f"`{name}`" in wanted, (
        "add a line to the table of docs/choosing.md, section 'By what you need', or name it in one: "
        f"| your case | `{name}` | ..."
    )
    if name in VARIANTS:
        text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
        assert f"\n| `{name}` | " in text, (
            f"add a line to the table of defaults in docs/tuning.md: | `{name}` |"
        )


def test_the_documents_name_no_other_constructor() -> None:
    rules = {name for name in vars(optax_sam.ascent) if name[0] != "_"}
    more = listed("docs/choosing.md", "All variants") - DEFINED.keys() - rules
    assert not more, f"docs/choosing.md, section 'All variants', names what is not there: {sorted(more)}"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_recipe(name: str) -> None:
    assert name in digits_recipes.RECIPES, (
        "add to RECIPES in examples/digits_recipes.py, with a radius chosen on the seeds 0 to 4 by "
        f'examples/compare_variants.py: "{name}": Recipe(...)'
    )
