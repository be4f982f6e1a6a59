"""YAML read strictly, so that a typo stops the program instead of being ignored."""

import re
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T", bound=msgspec.Struct)


class ConfigurationError(ValueError):
    """Say which key of which file is wrong, what was expected and what was found."""


# who looks through a type (contract/versions.py)
_one_at_a_time = threading.Lock()


def load(path: str | Path | None, kind: type[T]) -> T:
    """Read a configuration file; without one, give the defaults.

    Raises ConfigurationError when it cannot be read, is no YAML, repeats a key, or has an unknown key or a wrong type.
    """
    if path is None:
        return kind()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    try:
        return convert(text, kind)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def convert(text: str, kind: type[T]) -> T:
    """Read a configuration from YAML text; raise ConfigurationError as *load* does."""
    try:
        found = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that also refuses repeated keys
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        with _one_at_a_time:
            return msgspec.convert({} if found is None else found, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_sentence(_with_keys(str(error), found, kind))) from error


def _with_keys(problem: str, found: Any, kind: type) -> str:
    """Write into msgspec's message the keys of mappings, for which it has [...]: the one that alone fails alike."""
    match = _PATH.fullmatch(problem)
    if match is None or _ANY not in match["path"]:
        return problem
    here, named = found, ""
    for step in _STEP.findall(match["path"]):
        if step == _ANY:
            key = next((key for key in here if _alone(here, key, found, kind) == problem), None)
            if key is None:
                return problem
            here, named = here[key], f"{named}.{key}"
        elif step.startswith("["):
            here, named = here[int(step[1:-1])], named + step
        else:
            here, named = here.get(step[1:]), named + step
    return problem[: match.start("path")] + named + "`"


def _alone(mapping: dict[str, Any], key: str, found: Any, kind: type) -> str:
    """Say what is wrong with *found* where *mapping*, a part of it, has one key alone; "" where nothing is."""
    whole = dict(mapping)
    mapping.clear()
    mapping[key] = whole[key]
    try:
        msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        return str(error)
    finally:
        mapping.clear()
        mapping.update(whole)
    return ""


class _StrictLoader(yaml.SafeLoader):
    """Load plain YAML, but refuse a key that stands twice: PyYAML would let the last one win."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's
        """Make the value of *node*; PyYAML trips over `!!int ""`, `!!bool maybe` and `!!timestamp soon`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"the value is no {kind}", node.start_mark) from error


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_ANY = "[...]"
_PATH = re.compile(r".* - at `(?:key in )?\$(?P<path>[^`]*)`", re.DOTALL)
_STEP = re.compile(r"\[\.\.\.\]|\[\d+\]|\.[^.\[]+")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*?)`(?: - at `\$\.?(?P<path>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<key>.*?)`(?: - at `\$\.?(?P<path>.*)`)?")
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<key>key in )?\$\.?(?P<path>.*)`)?", re.DOTALL)


def _sentence(problem: str) -> str:
    """Turn msgspec's message into "path.to.key: what was expected"."""
    if match := _UNKNOWN.fullmatch(problem):
        return f"{_join(match)}: unknown key"
    if match := _MISSING.fullmatch(problem):
        return f"{_join(match)}: missing, but required"
    match = _AT.fullmatch(problem)
    what, path = (match["what"], match["path"]) if match else (problem, None)
    what = what.replace("`", "").replace("Expected", "expected", 1).replace("Invalid enum value", "unknown value", 1)
    return f"{path}: {what}" if path else what


def _join(match: re.Match[str]) -> str:
    return f"{match['path']}.{match['key']}" if match["path"] else match["key"]
