"""The pages of the API, written from the code: every variant and every public module has one.

`python docs/_ext/api_pages.py` writes them to docs/api, as Sphinx does before it reads. This file needs the
standard library alone, so that `tests/test_api_pages.py` can ask whether every public name has its place.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent
PACKAGE = DOCS.parent / "optax_sam"
RESULTS = DOCS.parent / "examples" / "RESULTS.md"

LETTERS = "g: gradient at params, p: gradient at the perturbed point"
STEP = "The training step"
CUSTOM = "Custom variants"
# Where the names go that `optax_sam` takes from its private files, in this order; others go to the last.
SECTIONS = {"_value_and_grad": STEP, "_types": STEP, "_state": STEP, "_variant": CUSTOM, "_loss": CUSTOM}
IN_STEP = ("SAMGradients",)  # Of `_loss`, but what every user meets.
# Names that no documentation has a page for: shown in short.
UNLINKED = ("optax.ScalarOrSchedule", "optax.Schedule")
CONSTRUCTED = ("SharpnessAwareTransformation", "optax.GradientTransformationExtraArgs")


class Name(NamedTuple):
    """A public name: how users write it, the file that defines it, and its definition there."""

    path: str
    file: Path
    node: ast.AST

    @property
    def short(self) -> str:
        """The name alone."""
        return self.path.rpartition(".")[2]

    def same(self, other: "Name") -> bool:
        """Whether both are the same thing, perhaps by other paths."""
        return (self.file, self.short) == (other.file, other.short)


def parse(file: Path) -> ast.Module:
    """The syntax of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    """The file of a module, by its dotted name."""
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def definitions(file: Path) -> dict[str, ast.AST]:
    """What a file defines at its top: functions (of overloads the last), classes and assigned names."""
    found: dict[str, ast.AST] = {}
    for node in parse(file).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case _:
                pass
    return found


def exports(file: Path) -> dict[str, str]:
    """What a file imports as itself, `from m import x as x`: the name, and where it is from."""
    return {
        alias.name: node.module or ""
        for node in parse(file).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name and alias.name[0] != "_"
    }


def modules() -> list[str]:
    """The public modules of the package, in the order of its file."""
    return [name for name, module in exports(PACKAGE / "__init__.py").items() if module == "optax_sam"]


def definition(module: str, name: str) -> tuple[Path, ast.AST]:
    """Where a name is defined: in the file of a module, or in one that this file takes it from."""
    file = file_of(module)
    own = definitions(file)
    return (file, own[name]) if name in own else definition(exports(file)[name], name)


def names_of(module: str) -> list[Name]:
    """The public names of a module: what it exports of other files, and what it defines."""
    file = file_of(module)
    found = []
    for name, origin in exports(file).items():
        if origin != "optax_sam":
            found.append(Name(f"{module}.{name}", *definition(origin, name)))
    if module != "optax_sam":
        own = definitions(file).items()
        found += [Name(f"{module}.{name}", file, node) for name, node in own if name[0] != "_"]
    return found


def is_constructor(name: Name) -> bool:
    """Whether a name is that of a variant, or of an optimizer."""
    node, inside = name.node, name.file.parent.name == "variants"
    if not (inside and isinstance(node, ast.FunctionDef) and node.returns):
        return False
    return ast.unparse(node.returns) in CONSTRUCTED


def places() -> dict[str, list[Name]]:
    """What stands on which page; the pages of variants are called `variants/NAME`."""
    pages: dict[str, list[Name]] = {STEP: [], CUSTOM: []}
    top = names_of("optax_sam")
    variants = sorted((name for name in top if is_constructor(name)), key=lambda name: name.short)
    pages |= {f"variants/{name.short}": [name] for name in variants}
    pages |= {module: names_of(f"optax_sam.{module}") for module in modules()}
    for name in top:
        if name in variants:
            continue
        also = [m for m in modules() if any(name.same(other) for other in pages[m])]
        if also:  # A public module has it too: there it stands.
            page = also[0]
            pages[page] = [other for other in pages[page] if not name.same(other)]
        elif name.file.parent.name == "variants":  # A helper, beside the first variant of its file.
            page = next(f"variants/{other.short}" for other in variants if other.file == name.file)
        else:
            page = STEP if name.short in IN_STEP else SECTIONS.get(name.file.stem, CUSTOM)
        pages[page].append(name)
    return pages


class _Paths(ast.NodeTransformer):
    """Writes the names in an annotation as users would write them, from the imports of a file."""

    def __init__(self, file: Path, public: dict[tuple[Path, str], str]) -> None:
        self.public = public
        self.paths: dict[str, str] = {}
        for name in definitions(file):
            self.paths[name] = public.get((file, name), name)
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = node.module or ""
                    path = f"{module}.{alias.name}"
                    if module in ("typing", "collections.abc"):
                        path = alias.name
                    elif module.startswith("optax_sam."):
                        path = public.get((file_of(module), alias.name), alias.name)
                    self.paths[alias.asname or alias.name] = path

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.paths.get(node.id, node.id))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) in UNLINKED:
            return ast.Name(node.attr)
        module, _, name = ast.unparse(self.generic_visit(node)).rpartition(".")
        path = f"{module}.{name}"
        if module.startswith("optax_sam"):
            path = self.public.get((definition(module, name)[0], name), path)
        return ast.Name(path)


def signature(name: Name, public: dict[tuple[Path, str], str]) -> str:
    """The signature of a function as its file has it, and not as Python evaluates it."""
    node = name.node
    assert isinstance(node, ast.FunctionDef)
    paths = _Paths(name.file, public)
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg) and argument.annotation:
            argument.annotation = paths.visit(argument.annotation)
    returns = f" -> {ast.unparse(paths.visit(node.returns))}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def directive(name: Name, public: dict[tuple[Path, str], str]) -> str:
    """The directive of Sphinx for a name."""
    match name.node:
        case ast.FunctionDef():
            return f".. autofunction:: {name.path}{signature(name, public)}\n"
        case ast.ClassDef(body=body):
            methods = [
                node.name for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
            ]
            members = f"   :members: {', '.join(methods)}\n" if methods else ""
            return f".. autoclass:: {name.path}\n{members}"
        case _:
            return (
                f".. py:data:: {name.path}\n\n   .. code-block:: python\n\n      {ast.unparse(name.node)}\n"
            )


def reference(names: list[Name], public: dict[tuple[Path, str], str]) -> str:
    """The directives of a page."""
    lines = "\n".join(directive(name, public) for name in names)
    return f"```{{eval-rst}}\n{lines}```\n"


def row(page: str, heading: str, variant: str) -> list[str]:
    """The cells of a variant in a table of a page; empty where there is no line for it."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    for line in text.splitlines():
        if re.match(rf"\|[^|]*`{variant}`", line) or re.match(rf"\|[^|]*\|[^|]*`{variant}`", line):
            return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return []


def facts(variant: str) -> str:
    """A variant at a glance, from the tables of the pages on choosing and tuning."""
    rows: list[tuple[str, str]] = []
    if chosen := row("choosing.md", "By what you need", variant):
        rows.append(("use it for", chosen[0]))
    if described := row("choosing.md", "All variants", variant):
        rows += zip(
            ("paper", "direction", "gradients a step", "copies of params"), described[1:], strict=False
        )
    if tuned := row("tuning.md", "Defaults", variant):
        keys = (
            "default",
            "safe ([meaning](../../tuning.md#defaults-and-what-was-safe-around-them))",
            "not safe",
        )
        rows += zip(keys, tuned[1:], strict=False)
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows if value)
    return f"| at a glance | {LETTERS} |\n|---|---|\n{lines}"


def results(variant: str) -> str:
    """The lines of a variant in the table of all variants, with its head and its command; or nothing."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.search(r"`(python examples/compare_variants\.py[^`]*)`[^`]*```\w*\n(.*?)```", text, re.DOTALL)
    if not found:
        return ""
    lines = found[2].split("\n\n")[0].splitlines()
    wanted = [line for line in lines if re.match(rf"{variant}\b", line)]
    if not wanted:
        return ""
    base = 1 + max(i for i, line in enumerate(lines) if line[0] == " ")  # After the head.
    table = "\n".join([*lines[: base + 1], *wanted, lines[-1]])
    return (
        f"## On the digits\n\nFrom `{found[1]}` ([all variants](../../results/examples.md)). The first row\n"
        f"is the base optimizer, the last a tuned penalty without SAM.\n\n```text\n{table}\n```\n"
    )


def first_line(node: ast.AST) -> str:
    """What a module or a function says of itself first."""
    assert isinstance(node, ast.Module | ast.FunctionDef)
    return re.sub(r":math:`([^`]+)`", r"$\1$", (ast.get_docstring(node) or "").split("\n", 1)[0])


def pages() -> dict[str, str]:
    """All pages of the API: the path below docs/api, and the text."""
    found = places()
    public = {(n.file, n.short): n.path for names in found.values() for n in names}
    texts: dict[str, str] = {}
    # Of the index: heading -> page -> what it says.
    index: dict[str, dict[str, str]] = {"Core": {}, "Variants": {}, "Modules": {}}
    for page, names in found.items():
        if page in (STEP, CUSTOM):
            slug = page.lower().replace(" ", "_")
            names = sorted(names, key=lambda name: not isinstance(name.node, ast.FunctionDef))
            index["Core"][slug] = ", ".join(f"`{name.short}`" for name in names)
            texts[slug] = f"# {page}\n\n{reference(names, public)}"
        elif page.startswith("variants/"):
            variant = page.split("/")[1]
            index["Variants"][page] = first_line(names[0].node)
            texts[page] = f"# {variant}\n\n{facts(variant)}\n{reference(names, public)}\n{results(variant)}"
        else:
            module = f"optax_sam.{page}"
            index["Modules"][page] = first_line(parse(file_of(module)))
            about = f"```{{eval-rst}}\n.. automodule:: {module}\n```"
            texts[page] = f"# {module}\n\n{about}\n\n{reference(names, public)}"
    texts["index"] = (
        "# API\n\nRules that hold for all functions are on the page [Conventions](../conventions.md).\n\n"
    )
    for heading, lines in index.items():
        rows = "".join(f"| {{doc}}`{page}` | {line} |\n" for page, line in lines.items())
        tree = "\n".join(lines)
        texts["index"] += f"## {heading}\n\n| page | |\n|---|---|\n{rows}\n"
        texts["index"] += f"```{{toctree}}\n:hidden:\n\n{tree}\n```\n\n"
    return texts


def write(*_: Any) -> None:
    """Writes the pages, and removes those of names that are gone."""
    folder = DOCS / "api"
    texts = {folder / f"{page}.md": text for page, text in pages().items()}
    for old in set(folder.rglob("*.md")) - texts.keys():
        old.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    write()
