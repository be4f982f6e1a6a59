"""The manifests say in CEL what the contract says in Python; here it is checked that they say the same."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cotenant.contract.environment import INJECTED
from cotenant.contract.grant import Isolation
from cotenant.contract.names import Names
from cotenant.contract.request import MAX_GPUS
from extender.admission.pod import ALIASES
from tests.admission.settings import SETTINGS

MANIFESTS = Path(__file__).parents[2] / "manifests" / "admission"
NAMES = Names()
POLICIES = {stem: MANIFESTS / "policies" / f"{stem}.yaml" for stem in ("grants", "pods", "requests")}
WEBHOOKS = {stem: MANIFESTS / "webhook" / f"{stem}.yaml" for stem in ("mutating", "validating")}
ASKED_NAMES = [NAMES.gpu_mem, *ALIASES]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def variable(path: Path, name: str) -> str:
    return str(next(one["expression"] for one in documents(path)[0]["spec"]["variables"] if one["name"] == name))


def conditions() -> Iterator[tuple[str, str]]:
    """Every matchCondition that tells whether a pod asks, with the manifest that it is from."""
    for stem, path in (POLICIES | WEBHOOKS).items():
        for document in documents(path):
            for holder in document.get("webhooks", [document.get("spec", {})]):
                for condition in holder.get("matchConditions", []):
                    if condition["name"] == "asks-for-gpu-memory":
                        yield stem, condition["expression"]


def test_every_manifest_tells_our_pods_by_the_same_condition() -> None:
    stems, expressions = zip(*conditions(), strict=True)
    assert ["mutating", "pods", "requests", "validating"] == sorted(stems)
    assert 1 == len(set(expressions))
    # in limits and in requests
    prefixes = [NAMES.mig_prefix] * 2
    assert [*ASKED_NAMES, *prefixes] == re.findall(r"'([a-z.]+/[a-z-]+)'", expressions[0])


def test_the_unit_is_the_extender_s() -> None:
    assert SETTINGS.unit_bytes == int(variable(POLICIES["pods"], "unit"))


def test_aliases_are_worth_the_same() -> None:
    found = re.findall(r"'([^']+)': (\d+)", variable(POLICIES["pods"], "aliases"))
    assert ALIASES == {name: int(worth) for name, worth in found}


@pytest.mark.parametrize("stem", ["pods", "requests"])
def test_the_environment_is_read_from_the_same_annotations(stem: str) -> None:
    found = dict(re.findall(r"\['(\w+)', '([^']+)'\]", variable(POLICIES[stem], "environment")))
    assert dict(zip(INJECTED, NAMES.env_prefixes(), strict=True)) == found
    assert list(INJECTED) == re.findall(r"'(\w+)'", variable(POLICIES[stem], "preset"))


@pytest.mark.parametrize("path", [POLICIES["grants"], WEBHOOKS["validating"]], ids=str)
def test_the_same_annotations_are_guarded_against_all_but_the_same_user(path: Path) -> None:
    text = path.read_text()
    assert {NAMES.grant} == set(re.findall(r"k == '([^']+)'", text))
    assert set(NAMES.env_prefixes()) == set(re.findall(r"k\.startsWith\('([^']+)'\)", text))
    assert 1 == text.count(f"request.userInfo.username != '{SETTINGS.extender_user}'")


def test_wishes_have_the_same_bounds() -> None:
    text = POLICIES["requests"].read_text()
    assert f"variables.isolation in {[str(one) for one in Isolation]}" in text
    assert f"is none of {', '.join(Isolation)}" in text
    assert f"int(variables.gpuCount) <= {MAX_GPUS}" in text


@pytest.mark.parametrize("stem", ["pods", "requests"])
def test_the_scheduler_is_the_same(stem: str) -> None:
    assert f"'{SETTINGS.scheduler}'" == variable(POLICIES[stem], "scheduler")


def test_all_fail_closed_and_deny() -> None:
    for path in (POLICIES | WEBHOOKS).values():
        for document in documents(path):
            for holder in document.get("webhooks", [document.get("spec", {})]):
                if document["kind"] == "ValidatingAdmissionPolicyBinding":
                    assert ["Deny"] == holder["validationActions"]
                elif document["kind"] != "MutatingAdmissionPolicyBinding":
                    assert "Fail" == holder["failurePolicy"]
                    assert holder["matchConditions"]
