"""Checks of how kube-scheduler is told to call the extender."""

import re
from collections.abc import Iterator

from cotenant.cli.doctor.checks import Said, Severity, check
from cotenant.cli.doctor.facts import EXTENDER, Facts, Json
from cotenant.contract.configuration import ExtenderConfiguration

BROKEN, SUSPECT = Severity.BROKEN, Severity.SUSPECT
_WHERE = "in scheduler-config.yaml of the ConfigMap"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DEFAULT_TIMEOUT_SECONDS = 5.0


def _seconds(duration: str) -> float:
    """Read a duration as Go writes it: 1m30s."""
    parts = re.findall(r"([0-9.]+)(ms|s|m|h)", duration)
    return sum(float(amount) * _UNITS[unit] for amount, unit in parts)


def _ours(facts: Facts) -> Iterator[tuple[Json, ExtenderConfiguration]]:
    """Give the stanza of kube-scheduler's configuration that calls us, beside what the extender is told."""
    configuration, told = facts.scheduler_configuration(), facts.extender_configuration()
    if configuration is None or not isinstance(told, ExtenderConfiguration):
        return
    for stanza in configuration.get("extenders") or ():
        if any(one.get("name") == told.names.managed for one in stanza.get("managedResources") or ()):
            yield stanza, told


@check("scheduler-does-not-call")
def _does_not_call(facts: Facts) -> Said:
    configuration, told = facts.scheduler_configuration(), facts.extender_configuration()
    if configuration is None or not isinstance(told, ExtenderConfiguration):
        return
    stanzas = list(_ours(facts))
    if not stanzas:
        yield (
            BROKEN,
            f"no extender {_WHERE} has managedResources with {told.names.managed}",
            "take `extenders` over from manifests/second-scheduler/scheduler-config.yaml",
        )
    for stanza, _ in stanzas:
        port = str(stanza.get("urlPrefix", "")).rpartition(":")[2]
        if port != told.listen.rpartition(":")[2]:
            yield (
                BROKEN,
                f"kube-scheduler calls {stanza.get('urlPrefix')}, the extender listens on {told.listen}",
                f"let urlPrefix {_WHERE} name the extender's `listen`",
            )
        missing = [verb for verb in ("filterVerb", "prioritizeVerb", "bindVerb") if not stanza.get(verb)]
        if missing:
            yield BROKEN, f"kube-scheduler is not told of {', '.join(missing)}", f"set them {_WHERE}"


@check("scheduler-ignores-errors")
def _ignores_errors(facts: Facts) -> Said:
    if any(stanza.get("ignorable") for stanza, _ in _ours(facts)):
        yield (
            BROKEN,
            f"ignorable: true {_WHERE}: on an error kube-scheduler binds pods itself, without a grant",
            "set ignorable: false",
        )


@check("scheduler-sends-whole-nodes")
def _sends_whole_nodes(facts: Facts) -> Said:
    if any(not stanza.get("nodeCacheCapable") for stanza, _ in _ours(facts)):
        yield (
            BROKEN,
            f"nodeCacheCapable is not true {_WHERE}: 700 times as much is sent, and in-tree scores go wrong",
            "set nodeCacheCapable: true",
        )


@check("scheduler-looks-for-managed")
def _looks_for_managed(facts: Facts) -> Said:
    for stanza, told in _ours(facts):
        for one in stanza["managedResources"]:
            if one.get("name") == told.names.managed and not one.get("ignoredByScheduler"):
                yield (
                    BROKEN,
                    f"kube-scheduler looks for {told.names.managed}, which no node has",
                    f"set ignoredByScheduler: true beside it {_WHERE}",
                )


@check("scheduler-gives-up-first")
def _gives_up_first(facts: Facts) -> Said:
    for stanza, told in _ours(facts):
        patience = _seconds(stanza["httpTimeout"]) if stanza.get("httpTimeout") else _DEFAULT_TIMEOUT_SECONDS
        if patience <= told.bind_timeout:
            yield (
                BROKEN,
                (
                    f"kube-scheduler waits {patience:g} s for a bind that may take {told.bind_timeout:g} s, and would "
                    "think that one failed which did not"
                ),
                f"set httpTimeout {_WHERE} above bindTimeout of extender-config.yaml",
            )


@check("scheduler-name-differs")
def _name_differs(facts: Facts) -> Said:
    configuration = facts.scheduler_configuration()
    if configuration is None:
        return
    profiles = {profile.get("schedulerName") for profile in configuration.get("profiles") or ()}
    for policy in facts.of("mutatingadmissionpolicies"):
        for variable in policy["spec"].get("variables", ()):
            name = variable["expression"].strip("'")
            if variable["name"] == "scheduler" and name not in profiles:
                yield (
                    BROKEN,
                    f"admission gives pods to the scheduler {name!r}, of which nobody has a profile",
                    (
                        f"let the policy {policy['metadata']['name']} (variable scheduler) and the profile {_WHERE} "
                        "have one name"
                    ),
                )


@check("scheduler-version")
def _version(facts: Facts) -> Said:
    workload = facts.workload(EXTENDER)
    container = workload.container("kube-scheduler") if workload else None
    if container is None:
        return
    found = re.search(r":v(\d+)\.(\d+)", container["image"])
    server = re.match(r"v?(\d+)\.(\d+)", facts.version)
    if found and server:
        behind = int(server[2]) - int(found[2])
        if behind not in {0, 1}:
            yield (
                BROKEN,
                f"kube-scheduler is {container['image'].rpartition(':')[2]}, the API server {facts.version}",
                "use the API server's version or the minor version before it",
            )
