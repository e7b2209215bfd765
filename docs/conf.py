"""Sphinx configuration of the documentation."""

import importlib.metadata

project = "grsd_jax"
author = "The grsd_jax developers"
project_copyright = "the grsd_jax developers"
release = importlib.metadata.version("grsd-jax")
version = release

extensions = [
    "myst_nb",  # myst_parser, and pages that run
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a network
]
exclude_patterns = ["_build"]

# Every reference to a public name of grsd_jax must resolve. Those to names of JAX
# cannot, as no inventory is at hand without a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!grsd_jax(\.[A-Za-z]|$)).*"),
    # Types of fields that are not part of the interface.
    (r"py:class", r"grsd_jax\.(objective|jacobian|kernel\.mesh|models\.chain)\..*"),
]
default_role = "py:obj"
numfig = True

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# The notebooks run when they have changed; their outputs are kept beside the output.
nb_execution_mode = "cache"
nb_execution_in_temp = True  # which they may write to
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"
copybutton_selector = "div:not(.output) > div.highlight pre"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "grsd_jax"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
