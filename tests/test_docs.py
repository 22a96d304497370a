"""The pages of docs/ tell the truth: their code runs, and prints what stands there."""

import contextlib
import io
import pathlib
import re
from typing import Any

import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_code_runs_and_prints_what_stands_there(page: pathlib.Path) -> None:
    namespace: dict[str, Any] = {}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {i}", "exec"), namespace)
        following = blocks[i + 1] if i + 1 < len(blocks) else ("", "")
        expected = following[1] if following[0] == "text" else ""
        assert printed.getvalue() == expected, f"block {i} prints\n{printed.getvalue()}"


def test_no_example_is_untyped() -> None:
    """The page for authors of variants types what it shows, and types nothing `Any`."""
    text = (DOCS / "write_your_own_variant.md").read_text(encoding="utf-8")
    code = "".join(code for language, code in BLOCK.findall(text) if language == "python")
    assert not re.search(r"\bAny\b", code)
    assert all("->" in line for line in re.findall(r"def \w+\([^)]*\)[^:]*:", code))
