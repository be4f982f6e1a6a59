"""Whose process is it? By the cgroups that kubelets and container runtimes make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_plugin.watchdog.cgroups import Origin, parse

UID = "8d4ff2a0-6b3e-5c1f-9a77-0c9b6f3f1a01"
UNDERSCORED = UID.replace("-", "_")
ID = "4f" * 32
FOUND = Origin(UID, ID)


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/burstable/pod{UID}/{ID}",
        f"/kubepods/pod{UID}/{ID}",
        f"/some/root/kubepods/besteffort/pod{UID}/{ID}",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{ID}.scope",
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{ID}.scope/container",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice/docker-{ID}.scope/init",
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        f"/system.slice/containerd.service/kubepods-burstable-pod{UNDERSCORED}.slice:cri-containerd:{ID}",
        f"/../../pod{UID}/{ID}",
        f"/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        f"/docker/{'ab' * 32}/kubelet/kubepods/burstable/pod{UID}/{ID}",
        # a Kubernetes within a container of ours
        f"/kubepods/pod{UID}/{ID}/kubepods/burstable/pod{'0' * 8}-{'0' * 4}-{'0' * 4}-{'0' * 4}-{'0' * 12}/{'00' * 32}",
    ],
)
@pytest.mark.parametrize("prefix", ["0::", "11:memory:", "1:name=systemd:"])
def test_a_container_is_found_wherever_its_cgroup_lies(path: str, prefix: str) -> None:
    assert FOUND == parse(f"{prefix}{path}\n")


def test_a_static_pod_has_a_hash_for_its_uid() -> None:
    assert Origin("0123456789abcdef" * 2, ID) == parse(f"0::/kubepods/burstable/pod{'0123456789abcdef' * 2}/{ID}")


def test_a_pod_is_found_where_its_container_is_not_told() -> None:
    assert Origin(UID) == parse(f"0::/kubepods/burstable/pod{UID}\n")
    assert Origin(UID) == parse(f"0::/kubepods/burstable/pod{UID}/sandbox\n")


def test_of_the_hierarchies_of_version_1_the_one_that_tells_most_counts() -> None:
    text = f"12:cpuset:/\n11:pids:/kubepods/pod{UID}\n10:memory:/kubepods/pod{UID}/{ID}\n1:name=systemd:/init.scope\n"
    assert FOUND == parse(text)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/user.slice/user-1000.slice/session-3.scope",
        "/system.slice/docker-" + ID + ".scope",
        f"/machine.slice/libpod-{ID}.scope",
        f"/kubepods/burstable/pod{UID}x/{ID}",
        f"/podman/{ID}",
        "/kubepods.slice",
    ],
)
def test_what_runs_in_no_pod_is_of_none(path: str) -> None:
    assert parse(f"0::{path}") is None


@given(st.text(max_size=300))
def test_no_text_is_too_odd(text: str) -> None:
    found = parse(text)
    assert found is None or "pod" in text


uids = st.uuids().map(str)
ids = st.text("0123456789abcdef", min_size=64, max_size=64)
runtimes = st.sampled_from(["cri-containerd-", "crio-", "docker-", ""])
classes = st.sampled_from(["", "burstable", "besteffort"])
roots = st.lists(st.sampled_from(["..", "kubelet.slice", "docker", "a-b_c", ""]), max_size=3)


@given(uids, ids, runtimes, classes, roots, st.sampled_from(["systemd", "cgroupfs"]))
def test_what_is_written_as_either_driver_does_is_read_back(  # noqa: PLR0917
    uid: str, container: str, runtime: str, qos: str, root: list[str], driver: str
) -> None:
    if driver == "systemd":
        slices = ["kubepods.slice", *([f"kubepods-{qos}.slice"] if qos else [])]
        pod = "-".join(["kubepods", *([qos] if qos else []), f"pod{uid.replace('-', '_')}.slice"])
        parts = [*root, *slices, pod, f"{runtime or 'cri-containerd-'}{container}.scope"]
    else:
        parts = [*root, "kubepods", *([qos] if qos else []), f"pod{uid}", container]
    assert Origin(uid, container) == parse("0::/" + "/".join(parts))
