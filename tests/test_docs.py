"""README and the pages of docs/ tell the truth: their code runs, and prints what stands there."""

import contextlib
import functools
import io
import pathlib
import re
import textwrap
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import table
import test_contract
import test_papers
from jax.sharding import PartitionSpec as P

import optax_sam

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Code may be indented: in a list.
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: pathlib.Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, textwrap.dedent(text)) for _, language, text in found]


# Folders that begin with "_" are no pages. What is trained waits for `--full`.
PAGES = [
    pytest.param(
        page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.full] * (page.parent.name == "gallery")
    )
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("[a-z]*/*.md")))
    if "```python\n" in page.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_and_prints_what_stands_there(page: pathlib.Path) -> None:
    namespace: dict[str, Any] = {}
    blocks = blocks_of(page)
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {i}", "exec"), namespace)
        following = blocks[i + 1] if i + 1 < len(blocks) else ("", "")
        expected = following[1] if following[0] == "text" else ""
        assert printed.getvalue() == expected, f"block {i} prints\n{printed.getvalue()}"


GALLERY = sorted((DOCS / "gallery").glob("*.md"))


@pytest.mark.parametrize("page", GALLERY, ids=lambda page: page.stem)
def test_the_gallery_is_short_and_shows_what_came_out(page: pathlib.Path) -> None:
    """Code under 80 lines that imports nothing of examples/, and tables as they stand in RESULTS.md."""
    text, results = page.read_text(encoding="utf-8"), (ROOT / "examples" / "RESULTS.md").read_text("utf-8")
    code = "".join(code for language, code in blocks_of(page) if language == "python")
    assert len(code.splitlines()) < 80
    own = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"landscape"}
    assert not set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) & own
    for line in text.partition("## Results")[2].splitlines():
        if "±" in line:
            assert line in results, f"{page.name}: examples/RESULTS.md has no line {line!r}"


@functools.cache
def names_of(page: str) -> dict[str, Any]:
    """What the code of a page defines."""
    namespace: dict[str, Any] = {"__name__": page}
    for language, code in blocks_of(DOCS / f"{page}.md"):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, page, "exec"), namespace)
    return namespace


def test_the_variant_that_decides_by_a_gradient_is_the_papers() -> None:
    """AE-SAM of the page, as a row of the table and against numpy: what it evaluates depends on the data."""
    make = names_of("write_your_own_variant")["adaptive_steps"]
    row = table.Row(
        "adaptive_steps",
        make,
        {"rho": 0.1, "threshold": -0.3},
        evaluations=(1, 2),
        evaluates_by_data=True,
        memory_scalars=2,
    )
    test_contract.test_memory(row)
    test_contract.test_traces_once(row)
    test_contract.test_evaluations(row)

    def rule(grad: Any, w: np.ndarray, t: int, memory: Any) -> Any:
        del t
        mean, variance = (0.0, 0.0) if memory is None else memory
        g = grad(w)
        mean = 0.9 * mean + 0.1 * g @ g
        variance = 0.9 * variance + 0.1 * (g @ g - mean) ** 2
        is_long = g @ g >= mean - 0.3 * np.sqrt(variance)
        counts.append(1 + is_long)
        return (grad(w + 0.1 * oracles.unit(g)) if is_long else g), np.array([mean, variance])

    counts: list[int] = []
    expected, memories, _ = oracles.trajectory(rule, whole_optimizer=False)
    with jax.enable_x64(True):
        points, kept, _ = test_papers.walk(row)(
            test_papers.tree(oracles.first_params()), jnp.asarray(oracles.batches())
        )
    np.testing.assert_allclose(points, expected, rtol=1e-5, atol=1e-6)  # Its moments are in float32.
    np.testing.assert_allclose(kept, memories, rtol=1e-5)


def test_the_variant_of_one_gradient_is_averaged_over_devices() -> None:
    """`loss.at` as the only pass: each device at its own point, and the mean of all."""
    variant = names_of("write_your_own_variant")["noisy"](0.1)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    params, batch = table.params(), table.batch(8)
    key = jax.random.fold_in(jax.random.key(0), 0)
    climb = optax_sam.ascent.normalized()

    def gradient(shard: Any, part: Any) -> Any:
        noise = optax.tree.random_like(jax.random.fold_in(key, shard), params, jax.random.normal)
        return jax.grad(table.loss)(optax.tree.add(params, climb(noise, 0.1, params)), part)

    parts = batch.reshape(4, 2, 3)
    own = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(gradient)(jnp.arange(4), parts))
    shared = gradient(0, batch)
    for how, expected in (({}, shared), ({"perturbation": "local"}, own)):

        def run(params: Any, batch: Any, how: Any = how) -> Any:
            value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, axis_name="data", **how)
            return value_and_grad(params, batch, state=variant.init(params))[1].perturbed

        mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        chex.assert_trees_all_close(jax.jit(mapped)(params, batch), expected, rtol=1e-4, atol=1e-5)


def test_no_example_is_untyped() -> None:
    """The page for authors of variants types what it shows, and types nothing `Any`."""
    blocks = blocks_of(DOCS / "write_your_own_variant.md")
    code = "".join(code for language, code in blocks if language == "python")
    assert not re.search(r"\bAny\b", code)
    assert all("->" in line for line in re.findall(r"def \w+\([^)]*\)[^:]*:", code))
