"""README and pages are complete: tables name everything, links lead somewhere, the first pages are short."""

import inspect
import pathlib
import re
import tomllib
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import optax_sam

ROOT = pathlib.Path(__file__).resolve().parent.parent


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def cells(text: str, column: int) -> list[str]:
    """A column of the tables in a text, without their heads."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [row[column].strip() for row in rows if not set(row[0]) <= set("-: ") and row[0].strip()[0] == "`"]


@pytest.mark.parametrize(("page", "lines"), [("README.md", 200), ("BUILD_NOTES.md", 200)])
def test_what_is_read_first_is_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= lines


@pytest.mark.parametrize(
    ("heading", "module", "kind"),
    [("Ascent rules", optax_sam.ascent, "AscentRule"), ("Gates", optax_sam.gates, "Gate")],
)
def test_table_of_rules_is_complete(heading: str, module: Any, kind: str) -> None:
    listed = cells(section("docs/choosing.md", heading), 0)
    public = {
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and inspect.isfunction(value)
        and str(inspect.signature(value).return_annotation).rstrip("'>").rpartition(".")[2] == kind
    }
    assert {rule.strip("`").split("(")[0] for rule in listed} == public


KERAS = (ROOT / "docs" / "migrating" / "keras.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", cells(KERAS, 1), ids=cells(KERAS, 0))
def test_keras_parameter(code: str) -> None:
    """Every line of the table is run, and what makes an optimizer takes a step."""
    params = {"w": jnp.ones((3,))}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch @ params["w"]) ** 2)

    sam = optax_sam.sam()
    namespace = {
        "optax": optax,
        "optax_sam": optax_sam,
        "jnp": jnp,
        "base": optax.sgd(0.1),
        "params": params,
        "averages": params,
        "step": 100,
        "batch": jnp.ones((4, 3)),
        "opt_state": sam.init(params),
        "value_and_grad": optax_sam.sam_value_and_grad(loss, sam),
    }
    code = code.strip("`")
    try:
        made = eval(code, namespace)
    except SyntaxError:
        exec(code, namespace)
        return
    for tx in made if isinstance(made, tuple) and not hasattr(made, "init") else (made,):
        if hasattr(tx, "init"):
            grads = optax_sam.SAMGradients(params, params)
            tx.update(grads, tx.init(params), params)


def test_keras_table_names_every_parameter() -> None:
    wanted = """base_optimizer rho adaptive use_gc perturb_eps clipnorm clipvalue global_clipnorm use_ema
    ema_momentum ema_overwrite_frequency loss_scale_factor gradient_accumulation_steps rho_scheduler alpha k
    num_data lr beta1 beta2 weight_decay damping step name"""
    assert {cell.strip("`") for cell in cells(KERAS, 0)} == set(wanted.split())


PAGES = {*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("docs/[a-z]*/*.md")}


def test_a_package_index_gets_no_link_into_the_repository() -> None:
    """The substitutions of pyproject.toml leave links into the world alone, and no others."""
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["metadata"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert inside
    for substitution in hook["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert all(f"`{path}`" in text for path in inside if path.endswith(".md"))


@pytest.mark.parametrize("page", ["README.md", "docs/citing.md", "CITATION.cff"])
def test_citations_name_this_version(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"^ *version(?: = \{|: )([\d.]+)", text, re.MULTILINE) == [optax_sam.__version__]


def anchors(page: pathlib.Path) -> set[str]:
    """Those of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    sorted(PAGES),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_and_pictures_are_there(page: pathlib.Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):  # Elsewhere in the world.
            continue
        if target.endswith(".png") and not (ROOT / "images").exists():  # A source distribution has none.
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} leads to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} leads to {target}"


def test_public_docstrings() -> None:
    """Everything public says what it does, with an example where it can be called."""
    for module in (
        optax_sam,
        optax_sam.ascent,
        optax_sam.equinox,
        optax_sam.landscape,
        optax_sam.linen,
        optax_sam.nnx,
        optax_sam.schedules,
        optax_sam.sharpness.ball,
        optax_sam.sharpness.curvature,
        optax_sam.sharpness.gradients,
    ):
        for name, value in vars(module).items():
            own = module in (optax_sam, inspect.getmodule(value))
            if name[0] == "_" or not inspect.isfunction(value) or not own:
                continue
            for part in ("Args:", "Returns:", "Examples:", "References:"):
                if part == "Args:" and not inspect.signature(value).parameters:
                    continue
                measures = module.__name__.startswith(("optax_sam.sharpness", "optax_sam.landscape"))
                if part == "References:" and (
                    measures or name in ("sharpness_aware", "constructor", "gated", "resolve", "warmup")
                ):
                    continue
                assert part in (value.__doc__ or ""), f"{module.__name__}.{name} lacks {part}"


def test_core_needs_little() -> None:
    """The files of the package import nothing at the top but the standard library, JAX, Optax and NumPy."""
    for path in (ROOT / "optax_sam").rglob("*.py"):
        names = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not set(names) & {
            "flax",
            "chex",
            "equinox",
            "haiku",
            "matfree",
            "matplotlib",
            "tqdm",
            "orbax",
            "sklearn",
        }, path
