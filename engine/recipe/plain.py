"""Plain data from YAML text and back: no tags, no aliases, no key twice, and numbers as YAML 1.2 reads them."""

import math
import re
from typing import Any

import yaml

from engine.errors import UserError, one_line

# YAML 1.2's plain scalars. PyYAML's own are those of 1.1, where 1e-3 is text, 010 is 8, 1:30 is 90 and `no` is false.
_NUMBER = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
_SCALARS = {
    None: [
        (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
        for tag, pattern in (
            ("null", r"|~|null|Null|NULL"),
            ("bool", r"true|True|TRUE|false|False|FALSE"),
            ("int", r"[-+]?(?:0|[1-9][0-9]*)"),
            ("float", rf"{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
        )
    ]
}


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no aliases, keys are text, and no key twice."""

    yaml_implicit_resolvers = _SCALARS

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise _problem("a tag, anchor or alias; write the plain value", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for inner, _ in node.value:
            if inner.tag != "tag:yaml.org,2002:str":
                raise _problem("a key that is not text; quote it", inner)
            if inner.value in lines:
                raise _problem(f"the key {inner.value} twice, first on line {lines[inner.value]}; keep one", inner)
            lines[inner.value] = inner.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _problem(what: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _SCALARS
    yaml_representers = {  # noqa: RUF012 (the name and form that PyYAML looks for)
        **yaml.SafeDumper.yaml_representers,
        tuple: lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True),
    }

    def ignore_aliases(self, data):
        return True


def parse(text: str | bytes, origin: str) -> Any:
    """Plain data from YAML.

    Raises:
        UserError: the text is not plain YAML; `origin`, such as `recipe (a.yaml)`, begins the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = one_line(error.problem)
        problem = "a tab; indent with spaces" if r"'\t'" in problem else problem
        raise UserError(f"{origin} must be plain YAML; found{where}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin} must be plain YAML; found: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{origin} must be plain YAML; found: too many brackets inside each other") from None


def unparse(data: Any) -> str:
    """ASCII YAML that parses back to `data`; tuples become lists on one line."""
    # Not allow_unicode: PyYAML would write a next-line character (U+0085) so that it reads back as a space.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=math.inf)
