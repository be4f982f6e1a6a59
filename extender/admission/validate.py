"""What is refused: requests that could never be met or that go past the grant, and grants that others write."""

from collections.abc import Mapping
from typing import Any

import msgspec

from cotenant.contract import pods, request
from extender.admission.pod import ALIASES, Container, Pod, PodError, environment, read
from extender.admission.settings import Settings


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what is asked of the API server: who does what to which object, and how it is stored now."""

    operation: str
    resource: str
    subresource: str = ""
    namespace: str = ""
    user: str
    object: Mapping[str, Any] | None = None
    old: Mapping[str, Any] | None = None


def validate(asked: Request, settings: Settings) -> str | None:
    """Say why the request must be refused, for its user; None when it may pass.

    Raises PodError for an object that the API server would not send.
    """
    writes = asked.operation in {"CREATE", "UPDATE"} and asked.resource in {"pods", "bindings"}
    if asked.object is None or not writes:
        return None
    if asked.user != settings.extender_user and (sentence := _forged(asked.object, asked.old, settings)):
        return sentence
    if (asked.operation, asked.resource, asked.subresource) == ("CREATE", "pods", ""):
        return _refused(asked.object, asked.namespace, settings)
    return None


def _forged(new: Mapping[str, Any], old: Mapping[str, Any] | None, settings: Settings) -> str | None:
    """Refuse any change to what the extender writes at bind, in a pod or in a Binding."""
    after, before = read(new).metadata.annotations or {}, read(old or {}).metadata.annotations or {}
    for key in (*after, *before):
        ours = key == settings.names.grant or key.startswith(settings.names.env_prefixes())
        if ours and after.get(key) != before.get(key):
            advice = "leave it as it is" if key in before else "leave it out"
            return f"annotation {key} is written only by Cotenant's extender, when it binds the pod; {advice}"
    return None


def _refused(pod: Mapping[str, Any], namespace: str, settings: Settings) -> str | None:
    known = read(pod)
    asking = [container for _, container in known.asking(settings.names)]
    if not asking:
        return None
    return (
        _placed_past_us(known, settings)
        or next(filter(None, (_misnamed(container, settings) for container in asking)), None)
        or next(filter(None, (_overriding(container, settings) for container in asking)), None)
        or next(filter(None, (_unprepared(container, settings) for container in asking)), None)
        or _impossible(pod, namespace, settings)
    )


def _placed_past_us(pod: Pod, settings: Settings) -> str | None:
    if settings.scheduler and pod.spec.scheduler_name not in {settings.scheduler, *settings.profiles}:
        return (
            f"spec.schedulerName is {pod.spec.scheduler_name}, but only {settings.scheduler} knows who holds which "
            "GPU; leave schedulerName out"
        )
    if pod.spec.node_name:
        return (
            f"spec.nodeName is {pod.spec.node_name}, which goes past the scheduler that chooses the GPU; "
            "leave nodeName out and use nodeSelector or node affinity"
        )
    return None


def _misnamed(container: Container, settings: Settings) -> str | None:
    asked = container.asked_names(settings.names)
    if len(asked) > 1:
        return (
            f"container {container.name} asks for GPU memory under two names, {' and '.join(asked)}; keep one of them"
        )
    if asked and asked[0] in ALIASES:
        return (
            f"container {container.name} asks for {asked[0]}, which could not be rewritten to "
            f"{settings.names.gpu_mem}; ask for a whole number of {settings.names.gpu_mem}"
        )
    return None


def _overriding(container: Container, settings: Settings) -> str | None:
    """Refuse a container that sets one of our variables: the last of the same name would win.

    envFrom is let be: a variable that comes from there loses against one of the same name in env.
    """
    for variable, annotation in environment(container.name, settings.names).items():
        same = [own for own in container.env or () if own.name == variable]
        if len(same) > 1 or not all(own.reads(annotation) for own in same):
            return (
                f"container {container.name} sets {variable} itself, which Cotenant sets to the GPU that it chooses; "
                "remove it from the container's env"
            )
    return None


def _unprepared(container: Container, settings: Settings) -> str | None:
    present = {own.name for own in container.env or ()}
    limits = dict(container.sections()).get("limits", {})
    if present.issuperset(environment(container.name, settings.names)) and limits.get(settings.names.managed) == "0":
        return None
    return (
        f"container {container.name} lacks what Cotenant's mutating admission adds to a container that asks for GPU "
        "memory; check that its policy or webhook is installed"
    )


def _impossible(pod: Mapping[str, Any], namespace: str, settings: Settings) -> str | None:
    """Refuse at once what the extender would refuse on every node."""
    try:
        # a pod that is being created has no UID, and with generateName no name; neither matters here
        metadata = {"name": "", "uid": "", **(pod.get("metadata") or {})}
        known = msgspec.convert({"metadata": metadata, "spec": pod.get("spec") or {}}, pods.Pod)
        asked = request.parse(known, settings.names, settings.unit_bytes)
        if asked is not None and settings.tenants is not None:
            settings.tenants.hold(namespace, asked)
    except request.RequestError as error:
        return str(error)
    except msgspec.ValidationError as error:
        raise PodError(f"the pod cannot be read: {error}; send it as the API server writes it") from error
    return None
