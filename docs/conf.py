"""How `make docs` builds this folder into a site, with Sphinx.

The pages are Markdown that reads as well where it lies; what they need of Sphinx is in `index.md` and `api/`. Sphinx
and its parsers run no notebook and fetch nothing.
"""

import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.transforms import SphinxTransform

import sparse_interp

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"

# Modules whose classes are pieces of `Circuit` and of `HookedSparseTransformer`, which are one class to a reader.
PARTS = (
    *(f"sparse_interp.circuit.{part}" for part in ("pictures", "files", "exports", "comparison", "compact")),
    *(f"sparse_interp.model.{part}" for part in ("surface", "loading", "generation", "checkpoint", "text")),
)

project = "sparse_interp"
version = release = sparse_interp.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# Every reference has to lead somewhere; other people's types and the standard library's have no page here.
nitpicky = True
OTHERS = "torch|Tensor|pandas|numpy|jaxtyping|transformers|transformer_lens|matplotlib|networkx|pathlib|typing|module"
nitpick_ignore_regex = [
    ("py:.*", rf"({OTHERS})(\..*)?"),
    ("py:.*", r"(collections|contextlib|types|random)\..*"),
    ("py:.*", r"sparse_interp\.viewer\..*"),  # what the circuit page is made from, which is told in its module
    ("py:class", "|".join(re.escape(part) + r"\.\w+" for part in PARTS)),
    ("py:class", r"tuple\[str"),  # half of a key's type, where Sphinx cuts it in two
]

myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no notebook has widgets, whose scripts would come from elsewhere

# Signatures as they are written: short names, one argument a line, defaults as in the source.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
viewcode_line_numbers = True

html_theme = "furo"
html_title = "sparse_interp"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def copy_notebooks(app: Sphinx) -> None:
    """Notebooks, which say now that their code is Python, and their log beside the pages, where Sphinx looks."""
    copies = {}
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"] |= {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
        copies[path.name] = json.dumps(notebook)
    copies["LOG.md"] = (NOTEBOOKS / "LOG.md").read_text(encoding="utf-8").replace("](../docs/", "](../")
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in copies:
            old.unlink()
    for name, text in copies.items():
        copy = folder / name
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:  # one that is the same is not read again
            copy.write_text(text, encoding="utf-8")


def lead_to_their_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to notebooks, and to README, lead to their pages here."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/").replace("](../README.md", "](index.md")


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Plain text as our docstrings are: `Args` and `Raises` become lists, indented lines code, and no sign is markup.

    (napoleon is called from here, since as an extension it would also take the first words of a field's sentence for
    the field's type.)
    """
    text: list[str] = []
    code = False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not before and not code:
            text += ["::", ""]
        code = (indented and not before) or (code and (indented or not line))
        text.append(line if code else re.sub(r"(`[^`]*`)|([|*])", lambda sign: sign[1] or "\\" + sign[2], line))
    lines[:] = GoogleDocstring(text, Config(napoleon_use_rtype=False), app, "", name, obj, options).lines()


def leave_out_parts(app: Sphinx, name: str, obj: Any, options: Any, bases: list[type]) -> None:
    """Of its bases a class shows those that a reader can look up; the rest are the class itself, in several files."""
    bases[:] = [base for base in bases if not base.__module__.startswith(PARTS)] or [object]


def leave_out_object(app: Sphinx, document: nodes.document) -> None:
    """That a class is an object says nothing."""
    for paragraph in list(document.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)


def leave_out_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Arguments of a dataclass are its fields, which stand below with a sentence each."""
    return ("", None) if what == "class" and is_dataclass(obj) else (signature, returned)


def mend_links_of_sources(
    app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None
) -> None:
    """Sources lead back to entries; viewcode gives a module one prefix, for public names and others alike."""
    if page.startswith("_modules/sparse_interp"):
        module = page.removeprefix("_modules/").replace("/", ".")

        def mended(link: re.Match[str]) -> str:
            name = link[2].removeprefix(f"{module}.").removeprefix("sparse_interp.")
            return f"{link[1]}#{module if link[1].endswith('/others.html') else 'sparse_interp'}.{name}"

        context["body"] = re.sub(r"(api/\w+\.html)#([\w.]+)", mended, context["body"])


class LinkPublicNames(SphinxTransform):
    """`si.name` in a text leads to its entry; a name that is not public is an unresolved reference, so an error."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Wrap each such literal in a reference, unless it is in a link already."""
        for literal in list(self.document.findall(nodes.literal)):
            found = re.match(r"si\.(\w+)", literal.astext())
            if found and not isinstance(literal.parent, nodes.reference | pending_xref):
                target = pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=f"sparse_interp.{found[1]}", refexplicit=True,
                    refwarn=True, refdoc=self.env.docname,
                )  # fmt: skip
                literal.replace_self(target)
                target += literal


def setup(app: Sphinx) -> None:
    """Hooks of this site."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", lead_to_their_pages)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-bases", leave_out_parts)
    app.connect("autodoc-process-signature", leave_out_fields)
    app.connect("doctree-read", leave_out_object)
    app.connect("html-page-context", mend_links_of_sources)
    app.add_transform(LinkPublicNames)
