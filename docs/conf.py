"""Sphinx settings of the site: `make -C docs html` writes it to docs/_build/html."""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
# Sphinx reads pages below this directory only. The notebooks are shown as they are stored.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "lora_jax"
html_title = "lora_jax"
author = "the lora_jax authors"
copyright = "2026, the lora_jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"  # indented blocks are output and error texts

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search is in the sidebar
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

default_role = "code"  # docstrings mark code with one backtick
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
nitpicky = True
# Types of other packages have no page here; the build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!lora_jax\.).*"), ("py:class", r"lora_jax\..*")]


def escape(app, what, name, obj, options, lines):
    """Keep `*`, `|` and a trailing `_` outside of code as they are written in the docstring."""
    for index, line in enumerate(lines):
        if not line.lstrip().startswith(">>>"):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[index] = "".join(parts)


def write_math(self, node):
    """Write a formula as MathML, which browsers draw without a script from elsewhere."""
    formula = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    self.body.append(formula if isinstance(node, nodes.math) else f"<p>{formula}</p>")
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=900)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
