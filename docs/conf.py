"""The site: `python -m sphinx -n -W docs docs/_build/html` builds it in seconds, without network."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import optax_sam  # noqa: E402

project = "optax_sam"
author = "the optax_sam authors"
copyright = "the optax_sam authors, Apache-2.0"
version = release = optax_sam.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "api_pages",
    "mathml",
]
exclude_patterns = ["_build", "_ext", "inventories"]

# Tests execute the pages (tests/test_docs.py); the build only shows them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Signatures are written by `api_pages`, as they stand in the source.
autodoc_typehints = "none"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "code"

inventories = {
    "jax": "https://docs.jax.dev/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
}
intersphinx_mapping = {name: (url, f"inventories/{name}.inv") for name, url in inventories.items()}
# Names of the standard library, type variables, private aliases and array types are shown and lead nowhere.
nitpick_ignore_regex = [("py:.*", r"\w+"), ("py:.*", r"(jax|numpy)\.typing\.\w+")]

html_theme = "sphinx_book_theme"
html_title = f"optax_sam {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
