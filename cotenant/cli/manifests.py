"""Manifests in YAML, read and written as Kubernetes does it.

To Kubernetes (sigs.k8s.io/yaml; tried with kubectl 1.32.4) y, 08, 1e3 and 0o644 are a truth and numbers, and 22:22 and
2024-01-01 are text; to PyYAML it is the other way round. Text that kubectl takes for a number is refused by the API
server, or means something else.
"""

import re
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import yaml

from cotenant.contract.configuration import ConfigurationError

_MERGE, _MAP = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:map"
_DIGITS = "-+.0123456789"
# by tag: what is taken for it where it stands without quotes, and with what that begins; the first that fits counts
_PLAIN = {
    "bool": (r"[yYnN]|yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0o?[0-7][0-7_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)", _DIGITS),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _DIGITS,
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """Read what Kubernetes reads; refuse a key that stands twice, of which the last one would win."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it
    bool_values: ClassVar[dict[str, bool]] = {**yaml.SafeLoader.bool_values, "y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        """Make a mapping with all that is in it, which refuses what contains itself."""
        keys = [(key.start_mark, self.construct_object(key, deep=True)) for key, _ in node.value if key.tag != _MERGE]
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        seen: set[Hashable] = set()
        for mark, key in keys:
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
            seen.add(key)
        return made


class _Dumper(yaml.SafeDumper):
    """Write text that Kubernetes would take for something else in quotes, and line breaks that are none in escapes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write text, a script line by line; Unicode's line breaks would be folded outside of double quotes."""
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor(_MAP, _Loader.construct_mapping)
for _tag, (_pattern, _first) in _PLAIN.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read(text: str) -> list[Any]:
    """Read the documents of a YAML text, without those that are empty; raise ConfigurationError for what is none."""
    if text.lstrip().startswith("{"):  # JSON, which may be indented by tabs
        text = re.sub("^\t+", " ", text, flags=re.MULTILINE)
    try:
        documents = yaml.load_all(text, Loader=_Loader)
        return [one for one in documents if one is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigurationError(f"is not valid YAML: {where}{why}") from error
    # the last ones are PyYAML's for an explicit tag that does not fit, such as !!int ""
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def written(documents: Iterable[Any]) -> str:
    """Write documents as YAML, with a line between them."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
