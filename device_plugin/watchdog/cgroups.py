"""Whose process is this? Reads /proc/PID/cgroup, as kubelets and container runtimes name cgroups; pure.

What they write (kubelet: pkg/kubelet/cm/cgroup_manager_linux.go and pod_container_manager_linux.go)::

    cgroupfs   /kubepods/burstable/pod<uid>/<container>             guaranteed pods without a class between
    systemd    /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, _ for ->.slice/cri-containerd-<container>.scope
    mixed      /.../kubepods-burstable-pod<uid>.slice:cri-containerd:<container>   containerd without its systemd driver

A root of the kubelet's own may come before, a container's own cgroups after. In version 1 there is a line for each
hierarchy; in version 2 one, which seen from a container begins with as many `..` as there are levels to climb.
"""  # noqa: E501 - as they write it

import re

import msgspec

# Static pods have the hash of their file for a UID there, the annotation kubernetes.io/config.hash of their mirror pod.
_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD = re.compile(rf"(?:.*-)?pod(?P<uid>{_UID})(?:\.slice(?::[\w-]+:(?P<id>[0-9a-f]{{64}}))?)?")
_CONTAINER = re.compile(r"(?:[a-z][a-z-]*-)?(?P<id>[0-9a-f]{64})(?:\.scope)?")


class Origin(msgspec.Struct, frozen=True):
    """Name a pod by what stands in its cgroup, and the container where that stands there too."""

    pod_uid: str
    container_id: str = ""


def parse(text: str) -> Origin | None:
    """Find the pod of a process by the content of its cgroup file; None where it is of no pod."""
    best: Origin | None = None
    for line in text.splitlines():
        path = line.split(":", 2)[-1]
        found = _origin(path.split("/"))
        if found is not None and (best is None or not best.container_id):
            best = found
    return best


def _origin(parts: list[str]) -> Origin | None:
    for position, part in enumerate(parts):
        # the outermost: what runs in a pod may be another Kubernetes, whose pods are none of ours
        pod = _POD.fullmatch(part)
        if pod is None:
            continue
        uid = pod["uid"].replace("_", "-")
        if pod["id"]:
            return Origin(uid, pod["id"])
        container = _CONTAINER.fullmatch(parts[position + 1]) if position + 1 < len(parts) else None
        return Origin(uid, container["id"] if container else "")
    return None
