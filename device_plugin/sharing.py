"""Which rules this node's GPUs are under: read from files and the node's label, and read again while it runs.

A ConfigMap that is mounted changes by a symlink that is swapped; so what counts is the text, looked at every now and
then, and not the time or the inode of a file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import structlog

from cotenant.contract import configuration
from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, GPURule, MIGStrategy
from device_plugin.families import nvidia

log = structlog.get_logger(__name__)

# What selects a file of NVIDIA's folder on nodes that NVIDIA's operator has labelled.
_NVIDIA_LABEL = "nvidia.com/device-plugin.config"
_DEFAULT = "default"
_ENDINGS = ("", ".yaml", ".yml")
# The keys of our configuration that are taken over while the plugin runs.
_LIVE = frozenset({"gpus", "profiles"})


class Sharing(NamedTuple):
    """Hold the rules in force, and whether shares of used GPUs come first."""

    rules: tuple[GPURule, ...]
    packed: bool = False
    # how NVIDIA's file says that MIG instances are named, where there is one
    mig_strategy: MIGStrategy | None = None


class Tell(Protocol):
    """Be told of a change, as an Event's reason and note, and whether all is well."""

    def __call__(self, reason: str, note: str, *, well: bool) -> None:
        """Take the news."""


class Rules:
    """Keep the rules for this node, which *file* says, read as *first* before, and what *nvidia_config* names.

    *tell* hears of changes. Not safe to use from many threads.
    """

    def __init__(self, first: DevicePluginConfiguration, file: Path | None, nvidia_config: str, tell: Tell) -> None:
        self._first = self._settings = first
        # what the file said at the start, without flags
        self._at_start = first
        self._file = file
        # what the settings were read from
        self._text: str | None = None
        self._nvidia = Path(nvidia_config) if nvidia_config else None
        self._tell = tell
        self._seen: tuple[str, ...] | None = None
        self._said: set[str] = set()
        self._sharing: Sharing | None = None

    @property
    def by_label(self) -> bool:
        """Tell whether a label of the node has a say."""
        return bool(self._settings.profiles) or (self._nvidia is not None and self._nvidia.is_dir())

    def look(self, labels: Mapping[str, str], fits: Callable[[Sharing], None] = lambda _: None) -> Sharing:
        """Give the rules that files and *labels* of the node say now, or where these are bad, the last good ones.

        *fits* raises ConfigurationError for others that this node cannot offer. Raises it where there are no good ones
        yet.
        """
        try:
            texts = self._texts(labels)
            if self._sharing is not None and texts == self._seen:
                return self._sharing
            found, warnings = self._read(texts)
            if self._sharing is not None:
                fits(found)
        except ConfigurationError as error:
            if self._sharing is None:
                raise
            self._say_once("BadConfiguration", f"{error}; the configuration before it stays in force")
            return self._sharing
        for warning in warnings:
            self._say_once("ConfigurationWarning", warning)
        changed = self._sharing is not None and found != self._sharing
        if self._seen is not None and self._seen != texts:
            self._said = {warning for warning in self._said if warning in warnings}
        self._seen, self._sharing = texts, found
        if changed:
            log.info("configuration.taken", rules=len(found.rules))
            self._tell("ConfigurationTaken", "the configuration has changed and is in force", well=True)
        return found

    def _say_once(self, reason: str, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            log.warning("configuration.problem", reason=reason, note=note)
            self._tell(reason, note, well=False)

    def _texts(self, labels: Mapping[str, str]) -> tuple[str, str, str, str]:
        """Read all that decides, as text: our file, the label, and the name and text of NVIDIA's file."""
        ours = "" if self._file is None else self._follow(self._file)
        path = self._nvidia_file(labels)
        return ours, labels.get(self._first.names.profile, ""), str(path or ""), "" if path is None else _text(path)

    def _follow(self, file: Path) -> str:
        """Have the settings that our file says, whatever becomes of them: which profiles there are is asked first."""
        text = _text(file)
        if text != self._text:
            try:
                self._settings = configuration.convert(text, DevicePluginConfiguration)
            except ConfigurationError as error:
                raise ConfigurationError(f"{file}: {error}") from error
            if self._text is None:
                self._at_start = self._settings
            self._text = text
        return text

    def _read(self, texts: tuple[str, str, str, str]) -> tuple[Sharing, list[str]]:
        _, label, path, theirs = texts
        settings = self._settings
        warnings = self._until_restart(settings)
        rules, packed, strategy = settings.gpus, False, None
        if label in settings.profiles:
            rules = settings.profiles[label]
        elif label and (self._nvidia is None or not self._nvidia.is_dir()):
            known = ", ".join(sorted(settings.profiles)) or "none"
            raise ConfigurationError(
                f"the node's label {settings.names.profile} is {label!r}, which is no profile; there are: {known}"
            )
        if path:
            try:
                found = nvidia.read(theirs)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {error}") from error
            warnings += [f"{path}: {warning}" for warning in found.warnings]
            rules, packed, strategy = rules + found.rules, found.packed, found.mig_strategy
        return Sharing(rules, packed, strategy), warnings

    def _until_restart(self, settings: DevicePluginConfiguration) -> list[str]:
        """Say which keys differ that are read at the start alone."""
        keys = [
            field.encode_name
            for field in msgspec.structs.fields(DevicePluginConfiguration)
            if field.name not in _LIVE and getattr(settings, field.name) != getattr(self._at_start, field.name)
        ]
        return [f"{self._file}: {', '.join(keys)}: counts from the plugin's next start"] if keys else []

    def _nvidia_file(self, labels: Mapping[str, str]) -> Path | None:
        """Find NVIDIA's file for this node; None where there is to be none."""
        if self._nvidia is None or not self._nvidia.is_dir():
            return self._nvidia
        folder, names = self._nvidia, _names(self._nvidia)
        said = ", ".join(names) or "none"
        for value in filter(None, (labels.get(self._first.names.profile, ""), labels.get(_NVIDIA_LABEL, ""))):
            found = _named(folder, value)
            if found is not None:
                return found
            if value not in self._settings.profiles:
                raise ConfigurationError(f"{folder}: has no file for the node's label, {value!r}; there are: {said}")
        found = _named(folder, _DEFAULT) or (folder / names[0] if len(names) == 1 else None)
        if found is None:
            label = self._first.names.profile
            raise ConfigurationError(f"{folder}: label the node {label}, or add a file {_DEFAULT}; there are: {said}")
        return found


def _named(folder: Path, name: str) -> Path | None:
    if "/" in name or name.startswith("."):
        return None
    return next((folder / (name + ending) for ending in _ENDINGS if (folder / (name + ending)).is_file()), None)


def _names(folder: Path) -> list[str]:
    # a mounted ConfigMap keeps what it swaps under names with two dots
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be read: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
