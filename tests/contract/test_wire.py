"""The inventory and the grant as they go over the wire; what version 1 is stands in tests/golden and never changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.grant import Grant
from cotenant.contract.inventory import Inventory
from cotenant.contract.versions import MAX_LENGTH
from tests.contract.examples import GRANT, INVENTORY
from tests.contract.strategies import inventories as any_inventory
from tests.contract.strategies import pod_grants as any_grant

GOLDEN = Path(__file__).parent.parent / "golden"

Json = dict[str, Any]


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8").removesuffix("\n")


def changed(name: str, change: Callable[[Json], object]) -> str:
    """Give a golden text with one thing changed."""
    value = msgspec.json.decode(golden(name))
    change(value)
    return msgspec.json.encode(value).decode()


class TestGolden:
    """Nodes and pods of an older release stay readable: version 1 is these bytes."""

    def test_the_inventory_is_written_as_version_1_stands(self) -> None:
        assert golden("inventory_v1.json") == inventories.encode(INVENTORY)

    def test_the_inventory_of_version_1_is_read_as_it_was_meant(self) -> None:
        assert INVENTORY == inventories.decode(golden("inventory_v1.json"))

    def test_the_grant_is_written_as_version_1_stands(self) -> None:
        assert golden("grant_v1.json") == grants.encode(GRANT)

    def test_the_grant_of_version_1_is_read_as_it_was_meant(self) -> None:
        assert GRANT == grants.decode(golden("grant_v1.json"))

    def test_a_client_of_mps_says_as_whom_it_runs_where_its_pod_does(self) -> None:
        watch = msgspec.structs.replace(GRANT.containers[1], user=1000)
        grant = msgspec.structs.replace(GRANT, containers=(watch,))

        assert golden("grant_v1_user.json") == grants.encode(grant)
        assert grant == grants.decode(golden("grant_v1_user.json"))

    def test_fields_may_stand_in_any_order(self) -> None:
        backwards = dict(reversed(msgspec.json.decode(golden("grant_v1.json")).items()))

        assert GRANT == grants.decode(msgspec.json.encode(backwards).decode())


class TestRoundTrip:
    """Whatever one program writes, the other reads as the same value."""

    @given(any_inventory())
    def test_an_inventory_survives_the_wire(self, inventory: Inventory) -> None:
        assert inventory == inventories.decode(inventories.encode(inventory))

    @given(any_grant())
    def test_a_grant_survives_the_wire(self, grant: Grant) -> None:
        assert grant == grants.decode(grants.encode(grant))

    @given(any_grant())
    def test_the_same_grant_is_always_written_alike(self, grant: Grant) -> None:
        text = grants.encode(grant)

        assert text == grants.encode(grants.decode(text))
        assert text.startswith('{"version":1,')


UNREADABLE = [
    ("is not versioned JSON", ""),
    ("is not versioned JSON", "not json"),
    ("is not versioned JSON", "[]"),
    ("is not versioned JSON", "null"),
    ("is not versioned JSON", "{}"),
    ("is not versioned JSON", '{"version":"1"}'),
    ("is not versioned JSON", '{"version":true}'),
    ("is not versioned JSON", '{"version":1.5}'),
    ("is not versioned JSON", '{"version":1'),
    ("is not versioned JSON", '{"version":1}}'),
    ("is not versioned JSON", '{"version":1,"\ud800":1}'),
    ("is not versioned JSON", '{"version":1,"gpus":' + "[" * 100_000 + "]" * 100_000 + "}"),
    ("has version 2, but this Cotenant reads version 1", '{"version":2,"what":"ever"}'),
    ("has version 0, but this Cotenant reads version 1", '{"version":0}'),
    ("has version -1, but this Cotenant reads version 1", '{"version":-1}'),
    ("is longer than the 262144 characters that Kubernetes allows", '{"version":1}' + " " * MAX_LENGTH),
]
UNREADABLE_IDS = [text[:24].encode("unicode_escape").decode() or "empty" for _, text in UNREADABLE]


class TestRefusals:
    """What cannot be read is refused with a sentence that says whose annotation it is and why."""

    @pytest.mark.parametrize(("why", "text"), UNREADABLE, ids=UNREADABLE_IDS)
    def test_an_inventory_that_is_none_is_refused(self, why: str, text: str) -> None:
        with pytest.raises(inventories.InventoryError, match=rf"^the node's inventory {why}"):
            inventories.decode(text)

    @pytest.mark.parametrize(("why", "text"), UNREADABLE, ids=UNREADABLE_IDS)
    def test_a_grant_that_is_none_is_refused(self, why: str, text: str) -> None:
        with pytest.raises(grants.GrantError, match=rf"^the pod's grant {why}"):
            grants.decode(text)

    @pytest.mark.parametrize(
        ("why", "change"),
        [
            ("unknown field `colour`", lambda it: it.update(colour="blue")),
            ("unknown field `colour`", lambda it: it["gpus"][0].update(colour="blue")),
            ("missing required field `generation`", lambda it: it.pop("generation")),
            ("missing required field `uuid`", lambda it: it["gpus"][0].pop("uuid")),
            ("GPU-0.* is listed 2 times", lambda it: it["gpus"].append(it["gpus"][0])),
            ("not whole units", lambda it: it["gpus"][0].update(usable=79 * (1 << 30) + 1)),
            ("usable of", lambda it: it["gpus"][0].update(usable=1 << 40)),
            ("Expected `int` >= 0", lambda it: it["gpus"][0].update(usable=-1)),
            ("Expected `int` <= 17592186044416", lambda it: it["gpus"][0].update(total=1 << 61)),
            ("Expected `int`", lambda it: it["gpus"][0].update(total="80GiB")),
            ("length >= 1", lambda it: it["gpus"][0].update(uuid="")),
            ("length <= 256", lambda it: it["gpus"][0].update(uuid="G" * 257)),
            ("Invalid enum value 'vgpu'", lambda it: it["gpus"][0].update(family="vgpu")),
            ("mode exclusive, which only a grant can have", lambda it: it["gpus"][0].update(mode="exclusive")),
            ("family memory cannot have mode mig", lambda it: it["gpus"][0].update(mode="mig")),
            ("family mig-static cannot have mode mps", lambda it: it["gpus"][3].update(mode="mps")),
            ("Expected `int` >= 1048576", lambda it: it.update(unit=1)),
            ("Expected `array`", lambda it: it.update(gpus=None)),
        ],
    )
    def test_an_inventory_with_one_thing_wrong_is_refused_whole(
        self, why: str, change: Callable[[Json], object]
    ) -> None:
        with pytest.raises(inventories.InventoryError, match=rf"^the node's inventory is not valid: .*{why}"):
            inventories.decode(changed("inventory_v1.json", change))

    @pytest.mark.parametrize(
        ("why", "change"),
        [
            ("unknown field `colour`", lambda it: it.update(colour="blue")),
            ("unknown field `colour`", lambda it: it["containers"][0]["gpus"][0].update(colour="blue")),
            ("container fetch is granted 2 times", lambda it: it["containers"].append(it["containers"][0])),
            ("names a GPU twice", lambda it: it["containers"][0]["gpus"].append(it["containers"][0]["gpus"][0])),
            ("'Fetch' is not a container name", lambda it: it["containers"][0].update(name="Fetch")),
            ("length >= 1", lambda it: it.update(containers=[])),
            ("length >= 1", lambda it: it["containers"][0].update(gpus=[])),
            ("Expected `int` >= 1", lambda it: it["containers"][0]["gpus"][0].update(bytes=0)),
            ("Expected `int` <= 1152921504606846976", lambda it: it["containers"][0]["gpus"][0].update(bytes=1 << 61)),
            ("Expected `int` <= 100", lambda it: it["containers"][0].update(threads=101)),
            ("79 units of container train do not split over 2 GPUs", lambda it: it["containers"][2].update(units=79)),
            ("mode mig has no MIG placement", lambda it: it["containers"][3].pop("mig")),
            ("Invalid enum value 'ephemeral'", lambda it: it["containers"][0].update(role="ephemeral")),
            ("missing required field `isolation`", lambda it: it["containers"][0].pop("isolation")),
        ],
    )
    def test_a_grant_with_one_thing_wrong_is_refused_whole(self, why: str, change: Callable[[Json], object]) -> None:
        with pytest.raises(grants.GrantError, match=rf"^the pod's grant is not valid: .*{why}"):
            grants.decode(changed("grant_v1.json", change))

    @given(st.text(max_size=40) | st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists).map(str))
    def test_nothing_but_a_grant_error_ever_comes_of_any_text(self, text: str) -> None:
        with pytest.raises(grants.GrantError):
            grants.decode(text)

    @given(st.data())
    def test_a_grant_cut_short_or_struck_somewhere_is_the_same_or_refused(self, data: st.DataObject) -> None:
        text = golden("grant_v1.json")
        at = data.draw(st.integers(0, len(text) - 1))
        struck = text[:at] + data.draw(st.text(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
        try:
            read = grants.decode(struck)
        except grants.GrantError:
            return
        # still a grant, so with every rule of one
        assert grants.decode(grants.encode(read)) == read
