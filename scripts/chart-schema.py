"""Write charts/cotenant/values.schema.json: the chart's values, and the configuration as the programs read it.

`make generated` runs it; a test says when that has been forgotten.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec

from cotenant.contract.configuration import DevicePluginConfiguration, ExtenderConfiguration

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "charts" / "cotenant" / "values.schema.json"
Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_ANY: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_LIST: Schema = {"type": "array"}
_DOMAIN: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 237}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def _configuration(kind: type[msgspec.Struct]) -> Schema:
    """Describe a program's configuration file; where values name a key themselves, it does not stand in the file."""
    (schemas, parts) = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    name = schemas[0]["$ref"].rpartition("/")[2]
    own = dict(parts.pop(name))
    own.pop("title", None)
    own.pop("description", None)
    for key in ("domain", "migDomain", "unit", "schedulerName"):
        own["properties"].pop(key, None)
    _DEFINITIONS.update(parts)
    return own


_DEFINITIONS: dict[str, Any] = {}


def schema() -> Schema:
    """Make the schema."""
    pods = {
        "resources": _ANY,
        "nodeSelector": _TEXTS,
        "tolerations": _LIST,
        "affinity": _ANY,
        "priorityClassName": _TEXT,
        "podAnnotations": _TEXTS,
        "podLabels": _TEXTS,
        "extraEnv": _LIST,
        "hostNetwork": _FLAG,
    }
    values = _object(
        layout=_one_of("second-scheduler", "attached"),
        admission=_one_of("auto", "policies", "webhook", "none"),
        domain=_DOMAIN,
        migDomain=_DOMAIN,
        unit={"type": "string", "pattern": r"^[1-9][0-9]*(MiB|GiB)$"},
        # the cluster's own: two schedulers would both place every pod
        schedulerName={"type": "string", "minLength": 1, "not": {"const": "default-scheduler"}},
        image=_object(
            repository=_TEXT,
            tag=_TEXT,
            digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            pullPolicy=_one_of("Always", "IfNotPresent", "Never"),
        ),
        imagePullSecrets=_LIST,
        extender=_object(configuration=_configuration(ExtenderConfiguration), **pods),
        scheduler=_object(image=_object(repository=_TEXT, tag=_TEXT), resources=_ANY, configuration=_ANY),
        devicePlugin=_object(
            enabled=_FLAG,
            configuration=_configuration(DevicePluginConfiguration),
            mig=_object(enabled=_FLAG, configs={"type": "object", "additionalProperties": _LIST}),
            mps=_object(enabled=_FLAG, nursery=_FLAG, nurseryResources=_ANY),
            nvidiaConfigMap=_TEXT,
            fakeGPUs=_ANY,
            memoryWatchdog=_FLAG,
            kubeletRoot={"type": "string", "pattern": "^/.*[^/]$"},
            runtimeClassName=_TEXT,
            **pods,
        ),
        webhook=_object(existingSecret=_TEXT, annotations=_TEXTS),
        monitoring=_object(enabled=_FLAG, labels=_TEXTS, dashboardLabels=_TEXTS),
        networkPolicy=_object(enabled=_FLAG, serveFrom=_LIST, verbsFromCIDRs={"type": "array", "items": _TEXT}),
        viewer=_object(create=_FLAG),
    )
    values["properties"]["global"] = _ANY  # every chart has it
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **values, "$defs": _DEFINITIONS}


def text() -> str:
    """Give the schema as the file has it."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv and TARGET.read_text() != text():
        sys.exit(f"{TARGET.relative_to(ROOT)} is not what the code makes any more: run `make generated`")
    TARGET.write_text(text())
