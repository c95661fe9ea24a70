"""The documentation as pages; `make docs` writes them, beginning with build/docs/index.html."""

import inspect
import re

from flax import nnx
import optax
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

import dhp_jax

project = "dhp_jax"
release = version = dhp_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*.md"]  # the guides link to what was measured
exclude_patterns = [".*", "build", "runs", "docs/README.md"]  # the last is in docs/index.rst
html_theme = "furo"
html_title = "dhp_jax"
html_show_copyright = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
maximum_signature_line_length = 80

SCHEDULE = stringify_annotation(optax.Schedule, "smart")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w*)")


def mark_code(app, what, name, obj, options, lines):
    """Turns the docstrings' `code` into what reStructuredText takes for code."""
    del app, what, name, obj, options
    text = CODE.sub(lambda m: f"``{m[1]}``" + (rf"\ {m[2]}" if m[2] else ""), "\n".join(lines))
    lines[:] = text.split("\n")


def readable_signature(app, what, name, obj, options, signature, returned):
    """Arrays, classes and functions by their names alone; constructors' arguments of NNX modules.

    The metaclass of NNX modules shows `*args, **kwargs`.
    """
    del app, name, options
    if what == "class" and issubclass(obj, nnx.Module):
        own = inspect.signature(obj.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:])
        signature = stringify_signature(own, unqualified_typehints=True)
    if signature == "(*args, **kwargs)":
        return "", None  # of a class without a constructor of its own
    return signature and named(signature), returned and named(returned)


def named(signature):
    """A signature without what Python shows of arrays, classes and functions besides names."""
    signature = signature.replace(SCHEDULE, "Schedule")
    signature = re.sub(r"~?(jax\.)?jaxlib\._jax\.Array", "Array", signature)
    signature = re.sub(r"<class '(\w+\.)*(\w+)'>", r"\2", signature)
    signature = re.sub(r"<function [\w.]*<lambda>( at \w+)?>", "...", signature)
    return re.sub(r"<function (\w+\.)*(\w+)( at \w+)?>", r"\2", signature)


def setup(app):
    """Connects what is above; Sphinx calls it."""
    app.connect("autodoc-process-docstring", mark_code, priority=0)
    app.connect("autodoc-process-signature", readable_signature)
