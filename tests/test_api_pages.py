"""Every public name has its place in the reference, and every variant a page of its own."""

import importlib
import importlib.util
import pathlib

import pytest

import optax_sam

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "_ext" / "api_pages.py")
api_pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(api_pages)

PLACES = api_pages.places()
PAGES = api_pages.pages()
VARIANTS = sorted(page for page in PAGES if page.startswith("variants/"))


def last(path: str) -> str:
    return path.rpartition(".")[2]


def test_every_public_name_has_one_place() -> None:
    placed = [name.path for names in PLACES.values() for name in names]
    assert len(placed) == len(set(placed))
    assert all(PLACES[module] for module in api_pages.modules())
    # What a public module defines stands there only, though `optax_sam` exports it too.
    missing = set(optax_sam.__all__) - set(api_pages.modules()) - {last(path) for path in placed}
    assert not missing, f"without a place in the reference: {sorted(missing)}"


def test_every_place_is_of_a_public_name() -> None:
    for names in PLACES.values():
        for name in names:
            module, _, attribute = name.path.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name.path


@pytest.mark.parametrize("page", VARIANTS)
def test_the_page_of_a_variant_is_complete(page: str) -> None:
    name = page.split("/")[1]
    text = PAGES[page]
    assert f"autofunction:: optax_sam.{name}(" in text
    for row in ("use it for", "paper", "direction", "gradients a step"):
        assert f"| {row} | " in text, f"docs/choosing.md has no row of `{name}` that says: {row}"


def test_what_is_measured_stands_on_the_page() -> None:
    text = PAGES["variants/gsam"]
    assert "| default | rho 0.05" in text
    assert "\ngsam, rho" in text
    assert "\nmomentum " in text
