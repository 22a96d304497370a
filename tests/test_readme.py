"""The README tells the truth: its code runs, prints what stands there, and its tables are complete."""

import contextlib
import inspect
import io
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import optax_sam

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def cells(text: str, column: int) -> list[str]:
    """A column of the tables in a text, without their heads."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [row[column].strip() for row in rows if not set(row[0]) <= set("-: ") and row[0].strip()[0] == "`"]


def test_code_runs_and_prints_what_stands_there() -> None:
    namespace: dict[str, Any] = {}
    blocks = BLOCK.findall(README)
    executed = 0
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"README.md, block {i}", "exec"), namespace)
        executed += 1
        following = blocks[i + 1] if i + 1 < len(blocks) else ("", "")
        expected = following[1] if following[0] == "text" else ""
        assert printed.getvalue() == expected, f"block {i} prints\n{printed.getvalue()}"
    assert executed >= 14


def test_table_of_ascent_rules_is_complete() -> None:
    in_readme = {
        cell.strip("`").split("(")[0] for cell in cells(section("The variants").split("ascent rule")[1], 0)
    }
    public = {
        name
        for name, value in vars(optax_sam.ascent).items()
        if inspect.isfunction(value) and "AscentRule" in str(inspect.signature(value).return_annotation)
    }
    assert in_readme == public


KERAS = section("Coming from Keras")


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


def anchors(page: pathlib.Path) -> set[str]:
    """Those of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/guides/*.md")) if path.parent.name[0] != "."),
    ids=lambda page: page.name,
)
def test_links_and_pictures_are_there(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):  # Elsewhere in the world.
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
                    measures or name in ("sharpness_aware", "constructor", "resolve")
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
