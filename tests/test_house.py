"""The structure of the package: no import goes back up, and every file says what it is for."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "optax_sam"

# From the ground up: a file imports from files that stand before it only.
FLOORS = (
    "_checks _tree",
    "ascent schedules _loss",
    "_state _types",
    "_variant",
    "gates",
    "variants",
    "_gradient _shards",
    "losses",
    "_value_and_grad",
    "nnx linen equinox",
    "sharpness",
    "landscape",
    "__init__",
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor.split()}
# Side by side on one floor, in this direction.
NEIGHBOURS = {("_tree", "_checks"), ("_shards", "_gradient")}


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """The parts of the package that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optax_sam"):
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def test_no_import_goes_back_up() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = part_of(path)
        for other in imports(path) - {own}:
            below = HEIGHT[other] < HEIGHT[own]
            beside = (own, other) in NEIGHBOURS or HEIGHT[other] == HEIGHT[own] == HEIGHT["_loss"]
            assert below or beside, f"{path.name} imports {other}"


def test_every_file_says_what_it_is_for_in_its_first_line() -> None:
    for path in PACKAGE.rglob("*.py"):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert re.match(r'r?""".+\."?', first), path.name


def test_the_core_is_short() -> None:
    """A newcomer reads it in an hour: no function longer than a screen shows, its docstring aside."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
                assert (node.end_lineno or 0) - start <= 60, f"{path.name}: {node.name}"


def test_a_variant_is_short() -> None:
    """What a paper adds, without docstrings and imports; `sam`'s relatives fit a screen."""
    for name in ("friendly_sam", "vasso"):
        tree = ast.parse((PACKAGE / "variants" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            for first in body[:1] if isinstance(body, list) else ():
                if isinstance(first, ast.Expr):  # The docstring.
                    first.value = ast.Constant("")
        lines = [line for line in ast.unparse(tree).splitlines() if line.strip(" '\"")]
        assert len(lines) <= 40, f"{name}: {len(lines)}"
