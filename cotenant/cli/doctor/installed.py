"""Checks of what is installed: programs, versions, configurations, admission."""

import base64
import re
import ssl

from cotenant import __version__
from cotenant.cli.doctor.checks import Said, Severity, check
from cotenant.cli.doctor.facts import EXTENDER, PLUGIN, Facts, Json, seconds
from cotenant.cluster import ClusterError
from cotenant.contract.configuration import (
    ConfigurationError,
    DevicePluginConfiguration,
    ExtenderConfiguration,
    Layout,
)

BROKEN, SUSPECT = Severity.BROKEN, Severity.SUSPECT
_POLICIES_SINCE = (1, 36)
# The attached layout's NetworkPolicy as shipped lets this address in, which is nobody's (RFC 5737).
_NOBODY = "192.0.2.1/32"
# What the policy cotenant-writer says when it refuses (manifests/*/writer.yaml).
_REFUSED = re.compile(r"written in the term '([^']*)', but the Lease \S+ is held by '([^']*)'")
# API servers learn of a new holder within milliseconds; a refusal so long after the take-over has another cause.
_LEARNED_SECONDS = 5.0
_SOON_SECONDS = 30 * 86_400.0


def _has_policies(facts: Facts) -> bool:
    """Tell whether the API server has the kind of admission policies that ours are."""
    major, minor = (int("".join(filter(str.isdigit, part))) for part in facts.version.lstrip("v").split(".")[:2])
    return (major, minor) >= _POLICIES_SINCE


@check("not-readable")
def _not_readable(facts: Facts) -> Said:
    # kinds that this version of Kubernetes does not have are no matter of rights
    for what, why in facts.unread.items():
        if "could not find the requested resource" not in why:
            yield (
                SUSPECT,
                f"{what} could not be read, so what depends on them was not checked: {why}",
                "run cotenant doctor as a cluster administrator, or with a role that may list them",
            )


@check("extender-missing")
def _extender_missing(facts: Facts) -> Said:
    if "deployments" in facts.objects and facts.workload(EXTENDER) is None:
        folder = "second-scheduler" if _has_policies(facts) else "webhook"
        yield (
            BROKEN,
            f"no Deployment in {facts.namespace} runs cotenant-extender",
            (
                f"install it: kubectl apply -k manifests/{folder} with your image (docs/install.md), or helm install; "
                "if it lies in another namespace, name it with --service"
            ),
        )


@check("plugin-missing")
def _plugin_missing(facts: Facts) -> Said:
    if "daemonsets" in facts.objects and facts.workload(PLUGIN) is None:
        yield (
            BROKEN,
            f"no DaemonSet in {facts.namespace} runs cotenant-device-plugin",
            "install it with manifests/base, which both layouts include; without it no node advertises GPU memory",
        )


@check("extender-not-answering")
def _not_answering(facts: Facts) -> Said:
    answer = facts.extender["/readyz"]
    if facts.workload(EXTENDER) is not None and isinstance(answer, ClusterError):
        yield (
            BROKEN,
            f"the extender does not answer through the API server's proxy: {answer}",
            (
                f"look at its pod: kubectl -n {facts.namespace} get pods; with the webhook it serves HTTPS, and "
                "--service needs https: instead of http:"
            ),
        )


@check("two-extenders")
def _two_extenders(facts: Facts) -> Said:
    workload = facts.workload(EXTENDER)
    replicas = workload.body["spec"].get("replicas", 1) if workload else 1
    configuration = facts.extender_configuration()
    if replicas > 1 and isinstance(configuration, ExtenderConfiguration) and configuration.writer is None:
        yield (
            BROKEN,
            (
                f"{replicas} extenders run at once and no Lease says which of them binds: neither knows what the other "
                "is just binding"
            ),
            "name a Lease in the extender's configuration, key writer, or set replicas: 1 and strategy: Recreate",
        )
    fences = facts.objects.get("validatingadmissionpolicybindings")
    if replicas > 1 and fences is not None and "cotenant-writer" not in {one["spec"]["policyName"] for one in fences}:
        yield (
            BROKEN,
            f"{replicas} extenders run at once, and nothing refuses what the last one still sends after a take-over",
            "apply writer.yaml of the layout; before Kubernetes 1.30 set replicas: 1 and strategy: Recreate",
        )


@check("writer-lease-stale")
def _writer_lease_stale(facts: Facts) -> Said:
    configuration = facts.extender_configuration()
    if not isinstance(configuration, ExtenderConfiguration) or configuration.writer is None:
        return
    name = configuration.writer.lease.partition("/")[2]
    lease: Json = next((one["spec"] for one in facts.of("writers") if one["metadata"]["name"] == name), {})
    if not lease.get("holderIdentity") or not lease.get("acquireTime"):
        return
    term = f"{lease['holderIdentity']}/{lease.get('leaseTransitions') or 0}"
    since = seconds(lease["acquireTime"]) + _LEARNED_SECONDS
    for event in facts.of("refusals"):
        said = _REFUSED.search(event.get("note") or "")
        if said and said[1] == term and _last_seen(event) > since:
            yield (
                BROKEN,
                (
                    f"the API server refuses the grants of {term}, which holds the Lease: it still compares them with "
                    f"a Lease held by {said[2]!r}"
                ),
                (
                    "restart the API server; docs/troubleshooting.md, Every pod of ours waits after a second "
                    "installation, says why and what else helps"
                ),
            )
            return


def _last_seen(event: Json) -> float:
    """Say when an Event came last, by whichever of its times is there."""
    series = event.get("series") or {}
    when = series.get("lastObservedTime") or event.get("deprecatedLastTimestamp") or event.get("eventTime")
    return seconds(when) if when else 0.0


@check("version-skew")
def _version_skew(facts: Facts) -> Said:
    images = {
        program: container["image"]
        for program in (EXTENDER, PLUGIN)
        if (workload := facts.workload(program)) and (container := workload.container(program))
    }
    if len(set(images.values())) > 1:
        yield (
            SUSPECT,
            f"the programs are of different images: {', '.join(map(' '.join, images.items()))}",
            "roll out one image; docs/operations.md says in which order",
        )
    answer = facts.extender["/version"]
    if isinstance(answer, str) and f'"version":"{__version__}"' not in answer.replace(" ", ""):
        yield (
            SUSPECT,
            f"the extender says {answer.strip()}, this command is {__version__}",
            "use the command of the extender's version; it may judge by rules that have changed",
        )


@check("configuration-unreadable")
def _configuration_unreadable(facts: Facts) -> Said:
    for program, found in ((EXTENDER, facts.extender_configuration()), (PLUGIN, facts.plugin_configuration())):
        if isinstance(found, ConfigurationError):
            yield (
                BROKEN,
                f"{program} cannot start with its configuration: {found}",
                "mend the file in its ConfigMap; docs/configuration.md has every key",
            )


@check("unit-differs")
def _unit_differs(facts: Facts) -> Said:
    units: dict[str, int] = {}
    extender, plugin = facts.extender_configuration(), facts.plugin_configuration()
    if isinstance(extender, ExtenderConfiguration):
        units["the extender"] = extender.unit_bytes
    if isinstance(plugin, DevicePluginConfiguration):
        units["the device plugins"] = plugin.unit_bytes
    for policy in facts.of("mutatingadmissionpolicies"):
        for variable in policy["spec"].get("variables", ()):
            if variable["name"] == "unit" and variable["expression"].isdigit():
                units["the admission policy"] = int(variable["expression"])
    if len(set(units.values())) > 1:
        said = ", ".join(f"{who} {unit} bytes" for who, unit in units.items())
        yield (
            BROKEN,
            f"one gpu-mem is not worth the same everywhere: {said}",
            (
                "give all of them one unit: extender-config.yaml, device-plugin-config.yaml, and the variable unit of "
                "the policy cotenant-pods"
            ),
        )


@check("domain-differs")
def _domain_differs(facts: Facts) -> Said:
    extender, plugin = facts.extender_configuration(), facts.plugin_configuration()
    if isinstance(extender, ExtenderConfiguration) and isinstance(plugin, DevicePluginConfiguration):
        domains = {"the extender": extender.domain, "the device plugins": plugin.domain}
        policies = [str(policy["spec"]) for policy in facts.of("mutatingadmissionpolicies")]
        if policies and not any(f"'{extender.domain}/gpu-mem'" in text for text in policies):
            domains["the admission policies"] = "another"
        fences = (
            one for one in facts.of("validatingadmissionpolicies") if one["metadata"]["name"] == "cotenant-writer"
        )
        if any(extender.names.granted not in str(fence["spec"]) for fence in fences):
            domains["the policy cotenant-writer"] = "another"
        if len(set(domains.values())) > 1:
            said = ", ".join(f"{who} {domain}" for who, domain in domains.items())
            yield BROKEN, f"resources have different domains: {said}", "give all of them one domain"


def _policies(facts: Facts) -> bool:
    bound = {
        one["spec"]["policyName"]
        for kind in ("mutatingadmissionpolicybindings", "validatingadmissionpolicybindings")
        for one in facts.of(kind)
    }
    return {"cotenant-pods", "cotenant-requests", "cotenant-grants"} <= bound


def _webhooks(facts: Facts) -> list[Json]:
    kinds = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")
    return [webhook for kind in kinds for one in facts.of(kind) for webhook in one["webhooks"]]


@check("admission-missing")
def _admission_missing(facts: Facts) -> Said:
    if _policies(facts) or _webhooks(facts):
        return
    if "validatingadmissionpolicies" in facts.unread and "validatingwebhookconfigurations" in facts.unread:
        return
    kind = "admission/policies" if _has_policies(facts) else "admission/webhook"
    yield (
        BROKEN,
        "nothing readies and refuses pods: anybody could write grants, and pods get no environment",
        f"apply manifests/{kind} (all policies and their bindings)",
    )


@check("webhook-without-authority")
def _webhook_without_authority(facts: Facts) -> Said:
    bare = [webhook["name"] for webhook in _webhooks(facts) if not webhook["clientConfig"].get("caBundle")]
    if bare:
        yield (
            BROKEN,
            f"webhooks have no caBundle, so every call fails and our pods are refused: {', '.join(bare)}",
            "put the CA of the extender's certificate there; the chart does so by itself",
        )
    ends = {webhook["name"]: _expires(webhook["clientConfig"].get("caBundle") or "") for webhook in _webhooks(facts)}
    first = min(ends.values(), default=float("inf"))
    if first < facts.now + _SOON_SECONDS:
        over = first < facts.now
        yield (
            BROKEN if over else SUSPECT,
            (
                f"the caBundle of webhooks {'has expired, so every call fails' if over else 'expires within 30 days'}: "
                f"{', '.join(name for name, end in ends.items() if end == first)}"
            ),
            "make another certificate: docs/operations.md, The webhook's certificate",
        )
    configuration = facts.extender_configuration()
    if _webhooks(facts) and isinstance(configuration, ExtenderConfiguration) and configuration.tls is None:
        yield (
            BROKEN,
            "webhooks call the extender by HTTPS, and it has no tls in its configuration",
            "make a certificate and name it by tls in extender-config.yaml; the chart does so by itself",
        )


def _expires(bundle: str) -> float:
    """Say when the last authority of a caBundle expires, in seconds since 1970; never, where it cannot be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=base64.b64decode(bundle).decode())
    except (ValueError, ssl.SSLError):
        return float("inf")
    ends = (ssl.cert_time_to_seconds(str(authority["notAfter"])) for authority in context.get_ca_certs())
    return max(ends, default=float("inf"))


@check("made-up-gpus")
def _made_up_gpus(facts: Facts) -> Said:
    workload = facts.workload(PLUGIN)
    container = workload.container(PLUGIN) if workload else None
    if container and any(flag.startswith("--fake-gpus") for flag in container.get("args", ())):
        yield SUSPECT, "the device plugins make their GPUs up (--fake-gpus)", "leave the flag out on real nodes"


@check("verbs-closed")
def _verbs_closed(facts: Facts) -> Said:
    configuration = facts.extender_configuration()
    if isinstance(configuration, ExtenderConfiguration) and configuration.layout is Layout.ATTACHED:
        shipped = [one for one in facts.of("networkpolicies") if _NOBODY in str(one["spec"].get("ingress"))]
        if shipped:
            yield (
                BROKEN,
                f"the NetworkPolicy {shipped[0]['metadata']['name']} lets nobody call the verbs",
                f"put the addresses of the control plane nodes there instead of {_NOBODY}",
            )
        if not facts.of("networkpolicies") and "networkpolicies" in facts.objects:
            yield (
                SUSPECT,
                "no NetworkPolicy guards the verbs: whoever reaches them can bind pods",
                "apply the one of manifests/attached/extender.yaml",
            )
