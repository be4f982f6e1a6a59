"""What a node may suffer, on the real kubelet: reboots, a killed container runtime; see docs/crash-safety.md."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cotenant.cli.main import main
from cotenant.contract import grant as grants
from e2e import policies
from e2e.agreement import GPU_MEM, GRANT, disagreements, expected, phase
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.plugin import held as ids_held
from e2e.processes import wait_until
from e2e.programs import Ground, RunningExtender, RunningPlugin
from e2e.rest import Object
from e2e.test_main_job import allocated

# of each 79 units
GPUS = "gpus: [{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, count: 2}]"


@pytest.fixture
def ground(control_plane: ControlPlane, real_node: RealNode, tmp_path: Path) -> Iterator[Ground]:
    api = control_plane.api()
    plugin = RunningPlugin(real_node, tmp_path / "plugin", gpus=GPUS)
    with (
        policies.installed(api),
        RunningExtender(control_plane, tmp_path / "extender") as extender,
        control_plane.scheduling(extender.scheduler_config()),
        plugin,
    ):
        yield Ground(api, real_node, extender, plugin)
        api.delete_pods()


def lasting(name: str, units: int) -> Object:
    """A pod as controllers make them: the kubelet starts its container again."""
    return pod(name, container("c0", limits={GPU_MEM: units}), spec={"restartPolicy": "Always"})


def held(node: RealNode) -> dict[str, int]:
    """Count our units that the kubelet keeps, by pod; each has one container."""
    return {pod: len(ids) for (pod, _), ids in ids_held(node.pod_resources_socket, GPU_MEM).items()}


def waits_for(seen: Object | None) -> list[str]:
    """Say why its containers do not run yet, as the kubelet has it."""
    statuses = (seen or {}).get("status", {}).get("containerStatuses") or []
    waiting = [one["state"]["waiting"] for one in statuses if "waiting" in one["state"]]
    return [f"{one.get('reason')}: {one.get('message', '')}" for one in waiting]


def held_back(seen: Object | None) -> bool:
    """Whether the kubelet admitted it before the plugin had registered, and came to its container after that."""
    return any("no devices found allocated" in why for why in waits_for(seen))


def lacks_image(seen: Object | None) -> bool:
    return any(why.startswith("ErrImageNeverPull") for why in waits_for(seen))


@pytest.mark.parametrize("checkpoint", ["kept", "lost"])
def test_after_a_reboot_a_pod_has_the_gpu_of_its_grant_again_or_holds_nothing(ground: Ground, checkpoint: str) -> None:
    names = [f"p{n}" for n in range(4)]
    for name in names:
        ground.api.create(lasting(name, 35))  # two on each GPU
    before = {name: ground.running(name) for name in names}

    ground.plugin.kill()
    ground.node.reboot(keep_checkpoint=checkpoint == "kept")
    ground.plugin.start()

    def settled(seen: Object | None) -> bool:
        """Whether the kubelet has started it anew, has given it up, or holds it back for good."""
        if phase(seen) == "Failed" or seen is None or held_back(seen):
            return True
        (was,) = before[seen["metadata"]["name"]]["status"]["containerStatuses"]
        (now,) = seen["status"].get("containerStatuses") or [was]
        return "running" in now["state"] and now["containerID"] != was["containerID"]

    after = [ground.api.wait("Pod", name, settled, saying="to be started again", timeout_s=120) for name in names]
    waiting = [seen["metadata"]["name"] for seen in after if held_back(seen)]
    assert not waiting or checkpoint == "lost"
    for name in waiting:  # as docs/troubleshooting.md says
        ground.api.delete("Pod", name)
        ground.api.gone(name)
    back = [seen for seen in after if phase(seen) == "Running" and not held_back(seen)]
    units = held(ground.node)
    print(
        f"\ncheckpoint {checkpoint}: {len(back)} of 4 run again, {len(waiting)} were held back,"
        f" the kubelet keeps units of {units}"
    )
    for seen in back:
        (granted,) = grants.decode(seen["metadata"]["annotations"][GRANT]).containers
        got = ground.node.environment(seen, "c0")
        if not units.get(seen["metadata"]["name"]):
            # started without a question to any plugin: what it sees is what stands in its annotations
            assert granted.gpus[0].uuid == got["NVIDIA_VISIBLE_DEVICES"]
        else:
            assert expected(granted).items() <= got.items()
    # who holds something is charged, and nobody else is
    charged: dict[str, int] = {}
    for seen in back:
        for uuid, amount in grants.decode(seen["metadata"]["annotations"][GRANT]).charges().items():
            charged[uuid] = charged.get(uuid, 0) + amount
    assert wait_until(lambda: charged == allocated(ground.extender), timeout_s=30), allocated(ground.extender)
    # and what is left goes to the next, with the right ids: 158 units less 35 for each that runs
    more = [f"n{n}" for n in range(4 - len(back))]
    for name in more:
        ground.api.create(lasting(name, 35))
    fresh = [ground.running(name) for name in more]
    time.sleep(1)
    assert (0, []) == (
        disagreements(ground.node, fresh, lambda node, seen, name: node.environment(seen, name))[0] - len(more),
        [],
    )


def test_after_a_new_disk_pods_whose_images_come_after_the_plugin_are_held_back_and_their_successors_run(
    ground: Ground, control_plane: ControlPlane
) -> None:
    names = [f"p{n}" for n in range(4)]
    for name in names:
        ground.api.create(lasting(name, 35))
    for name in names:
        ground.running(name)

    ground.plugin.kill()
    ground.node.reboot(keep_checkpoint=False, keep_images=False)
    for name in names:  # else the plugin might be there before the kubelet admits them
        ground.api.wait("Pod", name, lacks_image, saying="to be admitted, and to wait for its image")
    ground.plugin.start()
    ground.node.import_images()

    for name in names:
        ground.api.wait("Pod", name, held_back, saying="to be held back", timeout_s=120)
    told = CliRunner().invoke(main, ["doctor", f"--kubeconfig={control_plane.kubeconfig()}"])
    assert "default/p0, default/p1, default/p2 and 1 more" in told.output
    # what they were granted stays theirs
    ground.api.create(lasting("fifth", 35))
    ground.api.unschedulable("fifth")

    ground.api.delete_pods()
    for name in names:
        ground.api.create(lasting(name, 35))
    for name in names:
        ground.running(name)
    assert dict.fromkeys(names, 35) == held(ground.node)


def test_a_container_runtime_that_is_killed_disturbs_nobody_and_serves_the_next(ground: Ground) -> None:
    for name in ("first", "second"):
        ground.api.create(lasting(name, 40))
    before = {name: ground.running(name) for name in ("first", "second")}
    pids = {name: ground.node.pid(seen, "c0") for name, seen in before.items()}

    ground.node.restart_containerd()

    ground.api.create(lasting("third", 30))
    third = ground.running("third")
    for name, pid in pids.items():
        os.kill(pid, 0)  # raises where it is gone
        now = ground.api.get("Pod", name)
        assert (
            before[name]["status"]["containerStatuses"][0]["containerID"]
            == (now["status"]["containerStatuses"][0]["containerID"])
        )
    seen = [*(ground.api.get("Pod", name) for name in before), third]
    assert (3, []) == disagreements(ground.node, seen, lambda node, one, name: node.environment(one, name))
