"""Formulas as MathML, which browsers draw themselves: no script, no font and no network."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

# What the converter of docutils does not know, and what stands for it.
INSTEAD = {r"\\dots\b": r"\\ldots", r"\\Big\|": r"\\Bigl|"}


def convert(tex: str, *, as_block: bool = False) -> str:
    """A formula of LaTeX as MathML; lines that end in two backslashes are aligned at their ampersands."""
    for pattern, other in INSTEAD.items():
        tex = re.sub(pattern, other, tex)
    if r"\\" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    bar = '<mo stretchy="false">|</mo>'  # As in |w|: a fence, without the space of an operator.
    return tex2mathml(tex, as_block=as_block).replace(bar, bar.replace(">", ' lspace="0" rspace="0">', 1))


def _write(visitor: Any, node: nodes.Element, *, as_block: bool) -> None:
    try:
        visitor.body.append(convert(node.astext(), as_block=as_block))
    except MathError as error:
        logging.getLogger(__name__).warning("no MathML for %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def _inline(visitor: Any, node: nodes.Element) -> None:
    _write(visitor, node, as_block=False)


def _block(visitor: Any, node: nodes.Element) -> None:
    visitor.body.append('<div class="math">')
    try:
        _write(visitor, node, as_block=True)
    finally:
        visitor.body.append("</div>\n")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True}
