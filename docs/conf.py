"""The site: `make docs` writes it to build/docs. Pages are Markdown (MyST); the API comes from the docstrings."""

import re
from typing import Any

import grkan

project = "grkan"
author = "The grkan developers"
copyright = author
version = release = grkan.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_heading_anchors = 3

default_role = "code"  # docstrings put code into single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signatures
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "notes_style"), ("Returns, raises", "returns_style")]

html_theme = "pydata_sphinx_theme"
html_title = "grkan"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["pages.html"]}
html_theme_options = {
    "navbar_center": [],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "navigation_with_keys": True,
}


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let |x| and x* in a docstring be what they say, and no markup of reStructuredText."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"(?<!\\)([*|])", r"\\\1", p) for p in parts)


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon adds markup of its own
