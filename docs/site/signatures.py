"""What the reference shows that the source does not say as it wants it: attrs' signatures, dispatchers, examples."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

import attrs
import griffe
from multipledispatch import Dispatcher

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n.+)*", re.MULTILINE)
"""An example: from its first prompt to the next empty line."""
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


class Shown(griffe.Extension):
    """Give classes the signatures that attrs has made, leave handlers out, and let examples be code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put fences around the examples of a docstring, which Markdown takes for quotations."""
        if obj.is_attribute:
            describe_dispatcher(obj)
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Look at a class once its members are known. Handlers are called by events alone: they are left out."""
        for name, member in list(cls.members.items()):
            if member.is_function and any(str(each.value).startswith("on(") for each in member.decorators):
                del cls.members[name]
        if "__init__" in cls.members or not cls.path.startswith("fluxloop."):
            return
        made = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not (inspect.isclass(made) and attrs.has(made) and "__init__" in vars(made)):
            return
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        types = {field.alias or field.name: str(field.type) for field in attrs.fields(made)}
        for name, parameter in inspect.signature(made).parameters.items():
            default = None if parameter.default is parameter.empty else shown(parameter.default)
            parameters.append(
                griffe.Parameter(name, annotation=types.get(name), kind=KINDS[parameter.kind], default=default)
            )
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def describe_dispatcher(attribute: Any) -> None:
    """Give an attribute that is a dispatcher its docstring, which is an argument in the source or its class's."""
    module = sys.modules.get(attribute.parent.path)  # those of public names have been imported for the list of them
    thing = getattr(module, attribute.name, None)
    if isinstance(thing, Dispatcher):
        attribute.docstring = griffe.Docstring(inspect.cleandoc(thing.doc or type(thing).__doc__), parent=attribute)
        attribute.value = None


def shown(default: Any) -> str:
    """Return a default as it is written."""
    return "..." if default is attrs.NOTHING or "NOTHING" in repr(default) else repr(default)
