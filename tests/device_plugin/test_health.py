"""A GPU falls ill and gets well again, from the driver's word to where the extender puts pods."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotenant.contract.health import FaultRecord, FaultRecords, Severity, decode_faults, encode_faults
from cotenant.contract.inventory import Health
from cotenant.standins.api_rules import NODES
from device_plugin.health.care import _boot
from device_plugin.health.listener import Listener
from device_plugin.nvml import GPUEvent, PhysicalGPU
from device_plugin.nvml.events import EventsError
from tests.builders import a_pod
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, container_grant, uuid
from tests.extender.running import Running, eventually, submit

QUICK = "health: {cleanProbes: 1}"


def annotate(node: Node, **annotations: str | None) -> None:
    named = {f"{NAMES.domain}/{key.replace('_', '-')}": text for key, text in annotations.items()}
    node.api.patch(NODES, NODE, {"metadata": {"annotations": named}})


def annotation(node: Node, key: str) -> str | None:
    found = node.api.node(NODE)
    assert found is not None
    text: str | None = found["metadata"].get("annotations", {}).get(key)
    return text


def is_so(node: Node, condition: Callable[[], Any]) -> bool:
    return bool(node.api.wait_until(condition, SECONDS))


def unhealthy(node: Node, *indices: int, held: int = 0) -> None:
    """Wait until exactly these GPUs get no new pods, by inventory and by device ids, but for those that are *held*."""
    wanted = {uuid(index) for index in indices}
    node.wait_published(
        f"unhealthy in {indices}",
        lambda i: {gpu.uuid for gpu in i.gpus if gpu.health is Health.UNHEALTHY} == wanted,
    )
    units = 80 * (2 - len(indices)) + held
    node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == units, f"{units} units")


def detail(node: Node, index: int) -> str:
    published = node.published()
    assert published is not None
    return published.gpus[index].detail


def told(node: Node, reason: str, part: str) -> bool:
    return is_so(
        node,
        lambda: any(
            event["regarding"]["name"] == NODE and event["reason"] == reason and part in event["note"]
            for event in node.api.events()
        ),
    )


class TestXIDs:
    """The driver tells of a trouble, and what it means is configured."""

    def test_a_transient_one_keeps_new_pods_away_until_the_gpu_was_quiet_and_leaves_running_ones_alone(self) -> None:
        with Node(config=QUICK) as node:
            running = node.add_pod("running", container_grant(gpus=[0], units=8))
            node.running(running)
            held = node.ids(running)
            node.write_gpus([{"xids": [1000]}, {}])
            # Events tell of what may be over when a test looks
            why = "XID 1000; it is used again when it has been quiet for a while"
            assert told(node, "GPUUnhealthy", f"GPU 0 ({uuid(0)}) gets no new pods: {why}")
            assert told(node, "GPUHealthy", f"GPU 0 ({uuid(0)}) gets new pods again")
            unhealthy(node)
            assert ("Running", held) == (node.kubelet.phase(running), node.ids(running))
            assert None is annotation(node, NAMES.gpu_faults)

    def test_one_of_a_gpu_that_was_lost_and_has_come_back_is_heard(self) -> None:
        with Node(config=QUICK) as node:
            node.write_gpus([{"lost": True}, {}])
            unhealthy(node, 0)
            node.write_gpus([{}, {}])
            unhealthy(node)
            node.write_gpus([{"xids": [79]}, {}])
            unhealthy(node, 0)

    def test_an_applications_own_one_changes_nothing(self) -> None:
        with Node() as node:
            node.write_gpus([{"xids": [13, 31, 43]}, {"xids": [79]}])
            unhealthy(node, 1)  # came after the others
            assert "" == detail(node, 0)

    def test_the_configuration_can_say_otherwise(self) -> None:
        with Node(config="health: {cleanProbes: 1, xids: {application: [79], fatal: [31]}}") as node:
            node.write_gpus([{"xids": [79]}, {"xids": [31]}])
            unhealthy(node, 1)
            assert "XID 31, memory page fault: a program's bad pointer; reboot the node" == detail(node, 1)

    def test_a_grave_one_outlasts_the_plugin_until_somebody_takes_the_record_away(self) -> None:
        with Node(config=QUICK) as node:
            node.write_gpus([{"xids": [79]}, {"xids": [48]}])
            unhealthy(node, 0, 1)
            node.stop_plugin()
            node.write_gpus([{}, {}])
            node.start_plugin(wait=False)
            unhealthy(node, 0, 1)
            text = annotation(node, NAMES.gpu_faults)
            assert text is not None
            kept = {fault.uuid: (fault.key, fault.severity) for fault in decode_faults(text).faults}
            assert {uuid(0): ("xid-79", Severity.FATAL), uuid(1): ("xid-48", Severity.RESET)} == kept
            annotate(node, gpu_faults=None)
            unhealthy(node)

    def test_a_grave_one_is_over_after_a_reboot(self) -> None:
        with Node(config=QUICK, plugin=False) as node:
            fault = FaultRecord(uuid=uuid(0), key="xid-79", severity=Severity.FATAL, sentence="XID 79")
            annotate(node, gpu_faults=encode_faults(FaultRecords(boot="another", faults=(fault,))))
            node.start_plugin()
            assert is_so(node, lambda: annotation(node, NAMES.gpu_faults) is None)
            unhealthy(node)
            # the same from this boot would have counted
            node.stop_plugin()
            annotate(node, gpu_faults=encode_faults(FaultRecords(boot=_boot(), faults=(fault,))))
            node.start_plugin(wait=False)
            unhealthy(node, 0)

    def test_a_record_that_cannot_be_read_is_told_of_and_harms_nobody(self) -> None:
        with Node(config=QUICK, plugin=False) as node:
            annotate(node, gpu_faults='{"version":1,"faults":[{"uuid":3}]}')
            node.start_plugin()
            assert told(node, "BadGPUFaults", "the node's record of GPU faults is not valid")
            assert is_so(node, lambda: annotation(node, NAMES.gpu_faults) is None)
            unhealthy(node)

    def test_what_the_driver_says_ends_what_needs_a_reset(self) -> None:
        with Node(config=QUICK) as node:
            node.write_gpus([{"xids": [48], "recoveryAction": "reset"}, {}])
            unhealthy(node, 0)
            node.write_gpus([{"xids": [48], "recoveryAction": "none"}, {}])
            unhealthy(node)
            assert is_so(node, lambda: annotation(node, NAMES.gpu_faults) is None)


class TestProbes:
    """What a look at the GPU finds."""

    @pytest.mark.parametrize(
        ("gpu", "why"),
        [
            ({"rowRemapFailure": True}, "a bad row of memory could not be replaced"),
            ({"recoveryAction": "reboot"}, "the driver wants the node rebooted"),
            ({"lost": True}, "the GPU has fallen off the bus"),
        ],
    )
    def test_a_gpu_with_a_lasting_trouble_gets_no_new_pods(self, gpu: dict[str, Any], why: str) -> None:
        with Node(config=QUICK) as node:
            node.write_gpus([{}, gpu])
            unhealthy(node, 1)
            assert why in detail(node, 1)

    def test_memory_errors_count_when_they_grow_and_not_for_being_there(self) -> None:
        with Node(config=QUICK, plugin=False) as node:
            node.write_gpus([{"uncorrectedEcc": 7}, {}])
            node.start_plugin()
            unhealthy(node)
            node.write_gpus([{"uncorrectedEcc": 9}, {}])
            assert told(node, "GPUUnhealthy", "2 more uncorrected memory errors")
            assert told(node, "GPUHealthy", f"GPU 0 ({uuid(0)})")
            unhealthy(node)

    def test_a_row_that_waits_for_a_reset_is_no_reason_unless_configured(self) -> None:
        with Node(config="health: {cleanProbes: 1, rowRemapPending: reset}") as node:
            node.write_gpus([{"rowRemapPending": True}, {}])
            unhealthy(node, 0)
            node.stop_plugin()
            node.configure(QUICK)
            annotate(node, gpu_faults=None)
            node.start_plugin()
            unhealthy(node)

    def test_a_gpu_whose_driver_hangs_takes_no_pods_and_holds_up_none_of_the_others(self) -> None:
        with Node(config=QUICK, patience=0.2) as node:
            node.write_gpus([{"hang": True}, {}])
            unhealthy(node, 0)
            assert "NVML has not answered for 0.2 s" in detail(node, 0)
            # and the other one is still cared for
            node.write_gpus([{"hang": True}, {"xids": [79]}])
            unhealthy(node, 0, 1)
            node.write_gpus([{}, {"xids": [79]}])
            unhealthy(node, 1)

    @pytest.mark.parametrize("mortal", [False, True], ids=["", "with MPS daemons that would end with the plugin"])
    def test_looks_that_can_read_no_gpu_do_not_count_as_looks(self, *, mortal: bool) -> None:
        """So /healthz fails after a while, since NVML may read them after a new start."""
        fake = Path(sys.executable).parent / "cotenant-fake-mps-control"
        folder = Path(tempfile.mkdtemp(prefix="mps-"))
        mps = f"gpus: [{{indices: [0], mode: mps}}]\nmps: {{control: {fake}, root: {folder}, shm: /dev/shm}}"
        with Node(config=f"{QUICK}\n{mps if mortal else ''}") as node:
            unhealthy(node)
            before = self.looked_at_while_all_fail(node, 999)
            assert mortal == (self.looked_at_while_all_fail(node, 998) > before)
            node.write_gpus([{}, {}])
            unhealthy(node)
            assert self.looked_at(node) > before
        shutil.rmtree(folder)

    def looked_at_while_all_fail(self, node: Node, code: int) -> float:
        node.write_gpus([{"fail": f"{{nvmlDeviceGetUUID: {code}}}"}] * 2)
        node.wait_published(f"failing with {code}", lambda i: all(f"(code {code})" in gpu.detail for gpu in i.gpus))
        return self.looked_at(node)

    @staticmethod
    def looked_at(node: Node) -> float:
        assert node.plugin is not None
        # what /healthz makes of it takes half a minute
        return node.plugin._looks._looked_at

    def test_an_unlicensed_vgpu_is_labelled_and_unhealthy_only_by_configuration(self) -> None:
        guest = {"virtualization": 2, "model": "GRID T4-4C", "memory": "80GiB"}
        with Node(config="health: {cleanProbes: 1, unlicensedGrace: 0.2}") as node:
            node.write_gpus([{**guest, "licensed": False}, {**guest, "licensed": True}])
            unhealthy(node, 0)
            assert "the vGPU has no licence" in detail(node, 0)
            assert "false" == label(node)
            node.write_gpus([{**guest, "licensed": True}, {**guest, "licensed": True}])
            unhealthy(node)
            assert is_so(node, lambda: label(node) == "true")
            node.stop_plugin()
            node.configure(QUICK)
            node.write_gpus([{**guest, "licensed": False}, {}])
            node.start_plugin()
            assert is_so(node, lambda: label(node) == "false")
            unhealthy(node)


class TestCordon:
    """An administrator keeps single GPUs from new pods."""

    def test_cordoned_gpus_get_no_new_pods_until_the_annotation_goes(self) -> None:
        with Node() as node:
            running = node.add_pod("running", container_grant(gpus=[1], units=8))
            node.running(running)
            annotate(node, gpu_cordon=uuid(1))
            unhealthy(node, 1, held=8)
            assert "cordoned by the node's annotation cotenant.io/gpu-cordon" == detail(node, 1)
            assert told(node, "GPUCordoned", f"GPU 1 ({uuid(1)}) gets no new pods: cordoned")
            annotate(node, gpu_cordon=f"{uuid(0)}, {uuid(1)}")
            unhealthy(node, 0, 1, held=8)
            annotate(node, gpu_cordon=None)
            unhealthy(node)
            assert "Running" == node.kubelet.phase(running)

    def test_what_pods_hold_of_a_cordoned_gpu_is_not_taken_from_the_others(self) -> None:
        with Node() as node:
            pods = [node.add_pod(name, container_grant(gpus=[0], units=40)) for name in ("first", "second")]
            for pod in pods:
                node.running(pod)
            annotate(node, gpu_cordon=uuid(0))
            # kube-scheduler subtracts the pods' 80 from this sum, and 80 are free on the other GPU
            unhealthy(node, 0, held=80)
            node.kubelet.finish(pods[0])
            unhealthy(node, 0, held=40)

    def test_a_kubelet_that_does_not_tell_who_holds_what_changes_nothing(self) -> None:
        with Node() as node:
            node.running(node.add_pod("p", container_grant(gpus=[0], units=40)))
            annotate(node, gpu_cordon=uuid(0))
            unhealthy(node, 0, held=40)
            node.kubelet.pod_resources.stop()
            annotate(node, gpu_cordon=f"{uuid(0)},{uuid(1)}")
            unhealthy(node, 0, 1, held=40)

    def test_what_cannot_be_read_of_it_is_told_and_the_rest_is_followed(self) -> None:
        with Node() as node:
            annotate(node, gpu_cordon=f"0,{uuid(1)},\x00nonsense")
            unhealthy(node, 1)
            assert told(node, "BadGPUCordon", "'0' is an index, which can move")
            assert told(node, "BadGPUCordon", "'\\x00nonsense' is no UUID")

    def test_it_holds_from_the_start_of_the_plugin_on(self) -> None:
        with Node(plugin=False) as node:
            annotate(node, gpu_cordon=uuid(0))
            node.start_plugin()
            unhealthy(node, 0)


def test_the_extender_stops_using_an_ill_gpu_at_once_keeps_what_pods_hold_of_it_and_uses_it_again_when_well(
    tmp_path: Path,
) -> None:
    with Node(config=QUICK) as node, Running(node.api, tmp_path) as extender:
        # 48 of one GPU of 80 units, and as the other is as empty, either
        first = submit(node.api, a_pod().named("first").asking(48))
        assert [NODE] == extender.fitting(first, NODE)
        assert "" == extender.bind(first, NODE)
        node.running(first["metadata"]["uid"])
        hold = extender.ledger.hold(first["metadata"]["uid"])
        assert hold is not None
        (taken,) = hold.charges
        index = [uuid(0), uuid(1)].index(taken)
        big = submit(node.api, a_pod().named("big").asking(70))
        small = submit(node.api, a_pod().named("small").asking(10))
        assert [NODE] == extender.fitting(big, NODE)

        # the one with the pod on it falls ill: 70 still fit on the other
        node.write_gpus([{"xids": [48], "recoveryAction": "reset"} if n == index else {} for n in range(2)])
        unhealthy(node, index, held=48)
        assert eventually(lambda: not usable(extender, taken))
        assert "" == extender.bind(big, NODE)
        node.running(big["metadata"]["uid"])
        assert [1 - index] == [[uuid(0), uuid(1)].index(one) for one in held(extender, big)]
        # 10 are free on each, but on the ill one they cannot be had, and on the other they can
        assert "" == extender.bind(small, NODE)
        assert held(extender, small) == held(extender, big)
        # what is left of the ill one would do, and is refused
        last = submit(node.api, a_pod().named("last").asking(20))
        assert [] == extender.fitting(last, NODE)
        assert "Running" == node.kubelet.phase(first["metadata"]["uid"])
        assert hold.charges == still_holds(extender, first)

        # it was reset
        node.write_gpus([{"xids": [48], "recoveryAction": "none"} if n == index else {} for n in range(2)])
        unhealthy(node)
        assert eventually(lambda: usable(extender, taken))
        assert "" == extender.bind(last, NODE)
        node.running(last["metadata"]["uid"])
        assert [taken] == held(extender, last)


def usable(extender: Running, gpu: str) -> bool:
    view = extender.ledger.view(NODE)
    return view is not None and gpu in {state.gpu.uuid for state in view.healthy}


def still_holds(extender: Running, pod: dict[str, Any]) -> dict[str, int]:
    hold = extender.ledger.hold(pod["metadata"]["uid"])
    return {} if hold is None else dict(hold.charges)


def held(extender: Running, pod: dict[str, Any]) -> list[str]:
    return list(still_holds(extender, pod))


def label(node: Node) -> str | None:
    found = node.api.node(NODE)
    assert found is not None
    text: str | None = found["metadata"].get("labels", {}).get(NAMES.vgpu_licensed)
    return text


class Driver:
    """Tells of one trouble after the other, where *failures* are at an end: of a wait, then of a new set of events."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    def events(self) -> "Driver":
        if self.failures == 1:
            self.fail()
        return self

    def follow(self, _index: int, _uuid: str) -> None:
        pass

    def wait(self, _milliseconds: int) -> GPUEvent:
        if self.failures:
            self.fail()
        return GPUEvent("GPU-0", 79)

    def close(self) -> None:
        pass

    def fail(self) -> None:
        self.failures -= 1
        raise EventsError("the GPU is lost")


def heard(driver: Any, handle: Callable[[GPUEvent], None]) -> Listener:
    """Have what a driver tells handled."""
    listener = Listener(driver, handle, retry_seconds=0.01)
    listener.follow([PhysicalGPU(uuid="GPU-0", index=0, model="A", total_bytes=1, reserved_bytes=0)])
    listener.start()
    return listener


def test_events_of_the_driver_are_heard_again_after_one_that_could_not_be_handled() -> None:
    again = threading.Event()
    handled = iter([False, True])

    def handle(_: GPUEvent) -> None:
        if not next(handled, True):
            raise ZeroDivisionError("nobody foresaw it")
        again.set()

    listener = heard(Driver(), handle)
    assert again.wait(SECONDS)
    listener.stop()


def test_events_of_the_driver_are_heard_again_after_it_failed_to_wait_and_then_to_begin_anew() -> None:
    again = threading.Event()

    listener = heard(Driver(failures=2), lambda _: again.set())

    assert again.wait(SECONDS)
    listener.stop()
