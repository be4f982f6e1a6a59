"""The chart's schema and values are those of the programs. everyday/test_chart.py renders it."""

import runpy

import msgspec
import yaml

from cotenant.contract.configuration import DevicePluginConfiguration, ExtenderConfiguration
from e2e.kustomize import MANIFESTS
from e2e.rest import Object

ROOT = MANIFESTS.parent
CHART = ROOT / "charts" / "cotenant"
# Named once for both programs, and not among a program's own keys.
SHARED = {"domain", "migDomain", "unit", "schedulerName"}


def test_the_schema_is_the_one_that_the_code_makes() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "chart-schema.py"))["text"]()
    assert made == (CHART / "values.schema.json").read_text(), "run `make generated`"


def test_the_schema_knows_every_key_of_both_programs_and_every_value_that_is_shown() -> None:
    schema = msgspec.json.decode((CHART / "values.schema.json").read_bytes())
    for name, kind in (("extender", ExtenderConfiguration), ("devicePlugin", DevicePluginConfiguration)):
        keys = schema["properties"][name]["properties"]["configuration"]["properties"]
        assert {field.encode_name for field in msgspec.structs.fields(kind)} - SHARED == keys.keys()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert paths(values) == paths_of(schema) - {"global"}


def paths(values: Object, above: str = "") -> set[str]:
    """List the values that have no values below them."""
    found = set()
    for key, value in values.items():
        nested = isinstance(value, dict) and value and key != "dashboardLabels"
        found |= paths(value, f"{above}{key}.") if nested else {f"{above}{key}"}
    return found


def paths_of(schema: Object, above: str = "") -> set[str]:
    found = set()
    for key, value in schema["properties"].items():
        nested = "properties" in value and key != "configuration"
        found |= paths_of(value, f"{above}{key}.") if nested else {f"{above}{key}"}
    return found


def test_the_defaults_are_the_programs_own() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    default = ExtenderConfiguration()
    assert (
        default.domain,
        default.mig_domain,
        default.unit,
        default.scheduler_name,
        str(default.layout),
    ) == tuple(values[key] for key in ("domain", "migDomain", "unit", "schedulerName", "layout"))
