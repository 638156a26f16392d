"""Sphinx builds these pages and the API reference from the docstrings: `make docs`."""

import rnnfast

project = "rnnfast"
author = "The rnnfast authors"
copyright = "the rnnfast authors. MIT licence"
release = version = rnnfast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 72
default_role = "code"
highlight_language = "none"
napoleon_google_docstring, napoleon_numpy_docstring = True, False

doctest_global_setup = """
import torch
import rnnfast
torch.manual_seed(0)
"""


def as_literal(app, what, name, obj, options, lines):
    """Equations and tables, which docstrings indent after a colon and an empty line, keep their lines."""
    for at in range(len(lines) - 2):
        if lines[at].endswith(":") and not lines[at + 1].strip() and lines[at + 2][:1] == " ":
            lines[at] += ":"


def setup(app):
    app.connect("autodoc-process-docstring", as_literal, priority=400)  # before napoleon


html_theme = "furo"
html_title = f"rnnfast {version}"  # above the navigation
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sourcelink = html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
exclude_patterns = ["_build"]
