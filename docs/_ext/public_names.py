"""The reference: what autodoc cannot find out about the public names by itself.

- The text of an alias or a constant stands below its assignment, in the module that defines it. autodoc looks only into
  the module that publishes it.
- A default that is a constant of ours is shown by its value, and an alias that is public by its name.
- A class that another function makes ("Made by `open_tunnel`") shows no constructor, and no class shows a base class
  that is private, or `object`.
- Code in a docstring is an indented paragraph, without the `::` of reStructuredText.
- The directive `public-names` is a table of all public names, with the first sentence about each.
- A name in backticks is a link when it is the name of something in the reference, in docstrings and in guides. This
  needs no markup, so the same text reads well in an editor.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import itertools
import re
import sys
from types import ModuleType
from typing import Any, ClassVar, Final

import attrs
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata, stringify_annotation

__all__ = ["MODULES", "setup", "text_of"]

MODULES: Final = (
    "pioneer_tunnel",
    "pioneer_tunnel.aio",
    "pioneer_tunnel.asgi",
    "pioneer_tunnel.blocking",
    "pioneer_tunnel.monitoring",
    "pioneer_tunnel.relay",
    "pioneer_tunnel.testing",
    "pioneer_tunnel.testing.strategies",
    "pioneer_tunnel.transports",
)

_NAME: Final = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", re.DOTALL)
_DEFAULT: Final = re.compile(r"(= ?)([\w.\[\]']+)(?=[,)])")
_MADE_ELSEWHERE: Final = re.compile(r"Made by `|makes one")


def text_of(module: ModuleType, name: str) -> str:
    """The docstring of a public name.

    Raises:
        LookupError: it has none.
    """
    value: Any = getattr(module, name)
    if isinstance(value, str):
        return "The version of this package."
    text = inspect.getdoc(value) if inspect.isclass(value) or inspect.isfunction(value) else _below(module, name)
    if not text:
        raise LookupError(f"{module.__name__}.{name} is not explained")
    return text


def _below(module: ModuleType, name: str) -> str | None:
    """The string below the assignment of `name`, in the module or where the module takes its names from."""
    sources = [module, *(found for key, found in [*sys.modules.items()] if key.startswith("pioneer_tunnel."))]
    for source in sources:
        if getattr(source, name, None) is not getattr(module, name):
            continue
        body = ast.parse(inspect.getsource(source)).body
        for statement, following in itertools.pairwise(body):
            target = getattr(statement, "target", None) or (getattr(statement, "targets", None) or [None])[0]
            if getattr(target, "id", None) == name and isinstance(following, ast.Expr):
                return inspect.cleandoc(ast.literal_eval(following.value))
    return None


def _explain_data(app: Sphinx, what: str, full_name: str, value: object, options: object, lines: list[str]) -> None:
    if what == "data":
        module, _, name = full_name.rpartition(".")
        lines[:] = [*text_of(importlib.import_module(module), name).splitlines(), ""]


def _mark_code(app: Sphinx, what: str, full_name: str, value: object, options: object, lines: list[str]) -> None:
    before = ""
    marked: list[str] = []
    for line in lines:
        if line.startswith("    ") and before and not marked[-1] and not before.startswith(" "):
            marked += ["::", ""]
        marked.append(line)
        before = line or before
    lines[:] = marked


def _show_signature(
    app: Sphinx, what: str, full_name: str, value: Any, options: object, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    if signature is None:
        return None
    if what == "class" and (
        _MADE_ELSEWHERE.search(inspect.getdoc(value) or "") or getattr(value, "_is_protocol", False)
    ):
        return "", ""
    defaults = _defaults_of(value)
    shown = _DEFAULT.sub(lambda match: match[1] + defaults.get(match[2], match[2]), signature)
    for written, alias in _aliases().items():
        shown = shown.replace(written, alias)
    return shown, returns or ""


def _defaults_of(value: Any) -> dict[str, str]:
    """How autodoc writes default values that need to be looked up, and the values."""
    if attrs.has(value):
        fields = {f"attr_dict['{field.name}'].default": _written(field.default) for field in attrs.fields(value)}
        return fields | {"NOTHING": "...", "'NOTHING'": "..."}  # a function makes the value
    function = inspect.unwrap(value.__init__ if inspect.isclass(value) else value)
    names = getattr(function, "__globals__", {}).items()
    return {name: repr(constant) for name, constant in names if isinstance(constant, int | float | str)}


def _written(default: object) -> str:
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    return getattr(default, "__name__", None) or repr(default).replace("PosixPath(", "Path(")


@functools.cache
def _aliases() -> dict[str, str]:
    """How autodoc writes out each public alias, and its name; the longest first, since one may be a part of another."""
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, str) and not inspect.isclass(value) and not inspect.isfunction(value):
                found[stringify_annotation(value, "smart")] = f"~{module_name}.{name}"
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def _hide_private_bases(app: Sphinx, full_name: str, value: type, options: object, bases: list[Any]) -> None:
    def shown(base: Any) -> list[Any]:
        if base.__module__ in MODULES or not base.__module__.startswith("pioneer_tunnel"):
            return [base]
        return [known for each in base.__bases__ for known in shown(each)]

    bases[:] = [known for base in bases for known in (shown(base) if inspect.isclass(base) else [base])]
    if len(bases) > 1 and object in bases:
        bases.remove(object)


class PublicNames(SphinxDirective):
    """A table of the public names of each module."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for module_name in MODULES:
            module = importlib.import_module(module_name)
            lines += [module_name, "-" * len(module_name), "", _first_sentence(inspect.getdoc(module) or ""), ""]
            lines += [".. list-table::", "   :widths: 30 70", "   :class: names", ""]
            for name in sorted(module.__all__, key=str.lower):
                about = _first_sentence(text_of(module, name))
                lines += [f"   * - :py:obj:`{name} <{module_name}.{name}>`", f"     - {about}"]
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


class Tidy(SphinxTransform):
    """Leave out `Bases: object`, and call attributes attributes."""

    default_priority = 400

    def apply(self, **options: Any) -> None:
        for content in self.document.findall(addnodes.desc_content):
            for child in [*content.children]:
                if child.astext() == "Bases: object":
                    content.remove(child)
        for name in self.document.findall(nodes.field_name):
            if name.astext() == "Variables":
                name[:] = [nodes.Text("Attributes")]


class LinkNames(SphinxTransform):
    """Make a reference of each literal that looks like a name; what is no name of ours stays a literal."""

    default_priority = 400

    def apply(self, **options: Any) -> None:
        for literal in [*self.document.findall(nodes.literal)]:
            match = _NAME.fullmatch(literal.astext())
            # `relay` alone is an argument, not the module `pioneer_tunnel.relay`.
            if match is None or f"pioneer_tunnel.{match[1]}" in MODULES or _is_linked(literal):
                continue
            module, cls = _surroundings(literal)
            reference = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=match[1],
                refexplicit=False,
                refwarn=False,
                refdoc=self.env.docname,
                if_known=True,
            )
            reference["py:module"], reference["py:class"] = module, cls
            literal.replace_self(reference)
            reference += literal


def _is_linked(node: nodes.Node) -> bool:
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.reference | addnodes.pending_xref | nodes.title | addnodes.desc_signature):
            return True
        parent = parent.parent
    return False


def _surroundings(node: nodes.Node) -> tuple[str, str | None]:
    """The module and the class whose docstring this is in; the package for a guide."""
    parent = node.parent
    while parent is not None:
        if isinstance(parent, addnodes.desc):
            signature = parent[0]
            assert isinstance(signature, nodes.Element)
            is_class = parent["objtype"] in ("class", "exception")
            return signature["module"], signature["fullname"] if is_class else signature["class"]
        parent = parent.parent
    return "pioneer_tunnel", None


def _find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Find an alias that stands where a class may stand, and a name that stands outside of its module's page.

    A name in backticks that no module has, or several have, stays a literal.
    """
    domain = env.domains.python_domain
    target = node.get("reftarget")
    guessed = bool(node.get("if_known"))
    candidates = [f"{module}.{target}" for module in MODULES] if guessed else [target]
    found = [name for name in candidates if name in domain.objects]
    if len(found) != 1:
        return content if guessed else None
    entry = domain.objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("public-names", PublicNames)
    app.add_transform(LinkNames)
    app.add_transform(Tidy)
    app.connect("autodoc-process-docstring", _explain_data, priority=400)
    app.connect("autodoc-process-docstring", _mark_code, priority=450)  # before napoleon
    app.connect("autodoc-process-signature", _show_signature)
    app.connect("autodoc-process-bases", _hide_private_bases)
    app.connect("missing-reference", _find_elsewhere, priority=900)  # after intersphinx
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
