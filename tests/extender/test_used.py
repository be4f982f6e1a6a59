"""What is in use of GPUs reaches the extender by a note on the node, is shown, and changes nothing that is decided."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from cotenant.cluster import connect
from cotenant.contract import used as notes
from cotenant.contract.units import GIB
from cotenant.contract.used import UsedMemory
from cotenant.standins.api_rules import NODES, PODS
from cotenant.standins.api_server import ApiServer
from extender.cluster.feed import Feed
from extender.ledger import Ledger, Node
from extender.used import Used
from tests.builders import NAMES, Json, a_node, a_pod
from tests.extender.running import Running, eventually, submit


def note(**gib: int) -> str:
    """Say so many GiB of the GPUs of n1, by index: _0=3."""
    return notes.encode(UsedMemory(used={f"GPU-n1-{key.lstrip('_')}": amount * GIB for key, amount in gib.items()}))


def put(api: ApiServer, text: str | None) -> None:
    api.patch(NODES, "n1", {"metadata": {"annotations": {NAMES.used: text}}})


def shown(extender: Running) -> list[int | None]:
    """Give what /v1 says of the GPUs of n1."""
    items: list[Json] = extender.get("/v1/nodes?filter=n1").json["items"]
    return [gpu["usedBytes"] for gpu in items[0]["gpus"]]


def test_what_a_plugin_notes_is_shown_until_it_notes_something_else(api: ApiServer, extender: Running) -> None:
    before = shown(extender)
    assert {None} == set(before)
    put(api, note(_0=3))
    assert eventually(lambda: shown(extender)[0] == 3 * GIB)
    assert [3 * GIB, 1] == [extender.get("/v1/nodes").json["cluster"][key] for key in ("usedBytes", "usedGpus")]
    line = extender.get("/v1/nodes?as=table&filter=n1").body.decode().splitlines()[1]
    assert ["0/10Gi", "(0%)", "3Gi", "10Gi"] == line.split()[-7:-3]
    assert extender.get("/v1/nodes?as=csv&filter=n1").body.decode().splitlines()[1].endswith(f",{3 * GIB},0")
    put(api, "nothing that can be read")
    assert eventually(lambda: shown(extender) == before)
    put(api, note(_0=4))
    assert eventually(lambda: shown(extender)[0] == 4 * GIB)
    put(api, None)
    assert eventually(lambda: shown(extender) == before)


class Gone:
    """Note who goes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def node_seen(self, name: str, annotations: Mapping[str, str] | None) -> None:
        pass

    def pod_seen(self, uid: str, key: str, annotations: Mapping[str, str] | None) -> None:
        pass

    def node_gone(self, name: str) -> None:
        self.names.add(name)

    def pod_gone(self, uid: str) -> None:
        self.names.add(uid)


def test_of_what_went_while_no_watch_could_tell_those_who_look_on_hear_by_the_next_list(tmp_path: Path) -> None:
    with ApiServer() as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        api.add_node("n1", annotations={NAMES.used: note(_0=3)})
        uid = api.add_pod("p", spec={"nodeName": "n1"})["metadata"]["uid"]
        used, gone = Used(NAMES), Gone()
        feed = Feed(cluster, Ledger(NAMES, GIB), lambda *_: None, gone, used)
        feed.start()
        assert eventually(lambda: feed.synced() and api.watching == 2)
        assert (3 * GIB, 1) == used.sums("n1")

        api.freeze_watches()
        api.store.delete(PODS, ("default", "p"), grace=0)
        api.store.delete(NODES, ("", "n1"))
        api.compact()
        api.cut_watches()
        api.freeze_watches(frozen=False)

        assert eventually(lambda: gone.names == {uid, "n1"})
        assert (0, 0) == used.sums("n1")
        feed.stop()


def test_of_what_went_and_did_not_decode_those_who_look_on_hear_as_well(tmp_path: Path) -> None:
    with ApiServer() as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        api.add_node("n1")
        uid = api.add_pod("p", spec={"nodeName": "n1"})["metadata"]["uid"]
        gone = Gone()
        feed = Feed(cluster, Ledger(NAMES, GIB), lambda *_: None, gone, gone)
        feed.start()
        assert eventually(lambda: feed.synced() and api.watching == 2)

        api.patch(PODS, "p", {"status": {"phase": 9}}, namespace="default", subresource="status")
        api.patch(NODES, "n1", {"status": {"allocatable": 3}}, subresource="status")
        api.store.delete(PODS, ("default", "p"), grace=0)
        api.store.delete(NODES, ("", "n1"))

        assert eventually(lambda: gone.names == {uid, "n1"})
        feed.stop()


def test_a_gpu_in_full_use_takes_pods_by_its_grants_alone(api: ApiServer, extender: Running) -> None:
    put(api, note(_0=10))
    assert eventually(lambda: shown(extender)[0] == 10 * GIB)
    assert "" == extender.bind(submit(api, a_pod().asking(10)), "n1")


def test_what_was_judged_of_a_node_is_not_judged_anew_when_it_is_used_more() -> None:
    ledger, node = Ledger(NAMES, GIB), a_node("n1").with_gpu()
    ledger.observe_node(node.build())
    view, changes = ledger.view("n1"), ledger.changed_so_far()
    annotations = {**(node.build().metadata.annotations or {}), NAMES.used: note(_0=3)}
    ledger.observe_node(
        msgspec.convert(node.as_json() | {"metadata": {"name": "n1", "annotations": annotations}}, Node)
    )
    assert ledger.view("n1") is view
    assert changes == ledger.changed_so_far()


def test_a_node_that_is_gone_is_forgotten() -> None:
    used = Used(NAMES)
    used.node_seen("n1", {NAMES.used: note(_0=3, _1=4)})
    assert (7 * GIB, 2) == used.sums("n1")
    assert {"GPU-n1-0": 3 * GIB, "GPU-n1-1": 4 * GIB} == used.of("n1")
    used.node_gone("n1")
    assert ((0, 0), {}) == (used.sums("n1"), used.of("n1"))
