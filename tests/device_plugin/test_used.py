"""How much is in use of a node's GPUs is noted on the node: coarsely, seldom, and not where it is switched off."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract import used as notes_of_use
from cotenant.contract.units import GIB, MIB
from cotenant.contract.used import UsedMemory
from cotenant.standins.api_rules import NODES
from device_plugin.cluster.notes import NodeMetadata
from device_plugin.nvml import PhysicalGPU
from device_plugin.nvml.vitals import Vitals
from device_plugin.used import UsedNote, is_notable
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, uuid


def noted(node: Node) -> dict[str, int] | None:
    found = node.api.node(NODE)
    assert found is not None
    text = found["metadata"].get("annotations", {}).get(NAMES.used)
    return None if text is None else dict(notes_of_use.decode(text).used)


def soon(node: Node, wanted: Mapping[str, int] | None) -> bool:
    return bool(node.api.wait_until(lambda: noted(node) == wanted, SECONDS))


def use(node: Node, *amounts: str) -> None:
    node.write_gpus([{"processes": f"[{{pid: 1, memory: {amount}}}]"} if amount else {} for amount in amounts])


class Clocked:
    """A note whose clock and whose node stand still until they are told to go on."""

    def __init__(self, interval: float = 60.0, before: str | None = None) -> None:
        self.now = 1000.0
        self.wanted: list[str | None] = []
        self.note = UsedNote(interval, NAMES, lambda _: self, clock=lambda: self.now)  # type: ignore[arg-type,return-value]
        annotations = {} if before is None else {NAMES.used: before}
        self.note.noticed(NodeMetadata(name=NODE, annotations=annotations))

    def seen(self, node: NodeMetadata | None) -> None:
        """Take the node, as NodeNotes does."""

    def annotate(self, key: str, text: str | None) -> None:
        assert NAMES.used == key
        self.wanted.append(text)

    def look(self, used: int | None, after: float = 10.0) -> None:
        self.now += after
        gpu = PhysicalGPU(
            index=0, uuid="GPU-a", model="T", total_bytes=80 * GIB, reserved_bytes=0, vitals=Vitals(used_bytes=used)
        )
        self.note.looked([gpu])

    @property
    def told(self) -> list[int | None]:
        """What was written, one after the other."""
        return [None if text is None else notes_of_use.decode(text).used.get("GPU-a") for text in self.wanted]


def a_note(used: int) -> str:
    return notes_of_use.encode(UsedMemory(used={"GPU-a": used}))


class TestOnANode:
    """The plugin as it runs."""

    def test_what_is_used_stands_on_the_node_and_what_one_takes_away_is_written_again(self) -> None:
        with Node(config="usedMemoryInterval: 0.1") as node:
            assert soon(node, {uuid(0): 0, uuid(1): 0})
            use(node, "", "9GiB")
            assert soon(node, {uuid(0): 0, uuid(1): 9 * GIB})
            node.api.patch(NODES, NODE, {"metadata": {"annotations": {NAMES.used: None}}})
            assert soon(node, {uuid(0): 0, uuid(1): 9 * GIB})

    def test_a_plugin_that_is_switched_off_takes_away_what_one_before_it_wrote(self) -> None:
        with Node() as node:
            assert soon(node, {uuid(0): 0, uuid(1): 0})
            node.stop_plugin()
            node.configure("usedMemoryInterval: 0")
            node.start_plugin()
            assert soon(node, None)


class TestHowSeldom:
    """80 GiB in all: a twentieth is 4 GiB."""

    def test_what_is_hardly_seen_is_not_written(self) -> None:
        node = Clocked()
        for used in (10 * GIB, 13 * GIB, 7 * GIB, 10 * GIB):
            node.look(used, after=100)
        assert [10 * GIB] == node.told

    def test_what_drifts_is_measured_from_what_was_written(self) -> None:
        node = Clocked()
        for used in (10, 12, 14, 16, 18):
            node.look(used * GIB, after=100)
        assert [10 * GIB, 14 * GIB, 18 * GIB] == node.told

    def test_the_first_process_and_the_last_are_seen_however_small(self) -> None:
        node = Clocked()
        for used in (0, 500 * MIB, 20 * MIB):
            node.look(used, after=100)
        assert [0, 500 * MIB, 20 * MIB] == node.told

    def test_once_an_interval_at_most_and_then_the_newest(self) -> None:
        node = Clocked(interval=60)
        for gib in range(1, 80, 10):  # every 10 s
            node.look(gib * GIB)
        # at 10 s, and 60 s later
        assert [1 * GIB, 61 * GIB] == node.told

    def test_a_plugin_that_starts_anew_writes_nothing_that_stands_there(self) -> None:
        node = Clocked(before=a_note(10 * GIB))
        node.look(11 * GIB)
        assert [a_note(10 * GIB)] == node.wanted
        node.look(30 * GIB)
        assert [10 * GIB, 30 * GIB] == node.told

    @pytest.mark.parametrize("before", ["", "{", '{"version":2}', '{"version":1,"used":{"GPU-a":-1}}'])
    def test_a_note_that_cannot_be_read_is_written_anew(self, before: str) -> None:
        node = Clocked(before=before)
        node.look(1 * GIB)
        assert [1 * GIB] == node.told

    def test_a_gpu_that_tells_nothing_is_left_out_and_a_node_of_such_has_no_note(self) -> None:
        node = Clocked()
        node.look(None)
        assert [] == node.told
        node.look(5 * GIB)
        node.look(None, after=100)
        assert [5 * GIB, None] == node.told
        assert '{"version":1}' == node.wanted[-1]

    def test_without_an_interval_nothing_is_written(self) -> None:
        node = Clocked(interval=0)
        node.look(5 * GIB)
        assert [] == node.wanted


@given(st.integers(0, 80 * GIB), st.integers(0, 80 * GIB))
def test_what_is_not_written_is_wrong_by_less_than_a_twentieth_of_the_gpu(written: int, used: int) -> None:
    total = 80 * GIB
    if not is_notable({"a": written}, {"a": (total, used)}):
        assert abs(used - written) < total / 20


@given(st.text() | st.builds(lambda n: f'{{"version":1,"used":{{"a":{n}}}}}', st.integers()))
def test_whatever_stands_there_is_read_or_refused_with_a_sentence(text: str) -> None:
    try:
        told = notes_of_use.decode(text)
    except ValueError as error:
        sentence = str(error)
        assert sentence.startswith("the node's note of used memory ")
    else:
        assert told == notes_of_use.decode(notes_of_use.encode(told))
