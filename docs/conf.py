"""How Sphinx builds these pages: ``make docs``. Nothing here needs the network, and every warning is an error."""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pydantic import BaseModel

from unlabeled._version import __version__

project = "unlabeled"
copyright = "the authors of unlabeled, Apache-2.0"  # noqa: A001  (the name that Sphinx reads)
version = release = __version__
language = "en"
smartquotes_action = "qe"  # not dashes: --multirun stays what it is

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
suppress_warnings = ["config.cache"]  # the hooks below cannot be pickled, which is fine

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

default_role = "py:obj"
"""A `name` in a docstring is a link where it is documented, and code everywhere else."""
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init"}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_math_renderer = "mathml"
"""Formulas are MathML, which browsers draw themselves: no script from elsewhere."""
html_theme = "furo"
html_title = "unlabeled"
html_static_path = ["_static"]
html_css_files = ["unlabeled.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b6e5f", "color-brand-content": "#0b6e5f"},
    "dark_css_variables": {"color-brand-primary": "#4fd1b5", "color-brand-content": "#4fd1b5"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

_MATHML = "http://www.w3.org/1998/Math/MathML"
_ACCENTS = frozenset("~ˆ¯^→")
_SETTINGS = ["setting", "type", "default", "meaning"]
ElementTree.register_namespace("", _MATHML)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("doctree-resolved", _mark_settings)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))


def _signature(
    app: Any, kind: str, name: str, found: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Settings have a page of their own, and results are not built by users: neither needs its fields twice."""
    if kind == "class" and isinstance(found, type) and (issubclass(found, BaseModel) or "<factory>" in f"{signature}"):
        return "", None
    return signature, returns


def _docstring(app: Any, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    if lines and lines[0].startswith("Alias for field number"):  # what Python writes for a field of a named tuple
        lines.clear()


def _mark_settings(app: Any, doctree: nodes.document, page: str) -> None:
    """Gives tables of settings a class, by which the style sheet stacks their cells on a phone."""
    for table in doctree.findall(nodes.table):
        head = next(table.findall(nodes.row), None)
        if head is not None and [cell.astext() for cell in head.children] == _SETTINGS:
            table["classes"].append("settings")


def _inline_math(writer: Any, node: nodes.Node) -> None:
    writer.body.append(_mathml(node))
    raise nodes.SkipNode


def _block_math(writer: Any, node: nodes.Node) -> None:
    formula = _mathml(node).replace("<math", '<math display="block"', 1)
    writer.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Node) -> str:
    """docutils puts the index of an accented letter below the letter; here it goes to where indices belong."""
    # names of characters that HTML knows and XML does not
    text = re.sub(r"&(?!lt;|gt;|amp;)\w+;", lambda match: html.unescape(match[0]), tex2mathml(node.astext()))
    formula = ElementTree.fromstring(text)
    for element in formula.iter(f"{{{_MATHML}}}munderover"):
        base, index, accent = element
        if accent.text in _ACCENTS:
            element.tag = f"{{{_MATHML}}}msub"
            accented = ElementTree.Element(f"{{{_MATHML}}}mover", accent="true")
            accented.extend([base, accent])
            element[:] = [accented, index]
    return ElementTree.tostring(formula, encoding="unicode")
