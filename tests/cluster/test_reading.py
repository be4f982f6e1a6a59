import msgspec
import pytest

from cotenant.cluster.errors import Unreachable
from cotenant.cluster.leases import Lease
from cotenant.cluster.nesting import decoded
from cotenant.cluster.reading import NotJSONError, Reader, Unreadable, answered
from cotenant.contract.pods import Pod

# What the API server takes; msgspec gives up at 1,000, as deep as Python recurses.
DEEPEST = 10_000
DEEP = b'{"f:a":' * DEEPEST + b'"}{\\"]["' + b"}" * DEEPEST


def deep(**fields: object) -> bytes:
    """Build a pod that is nested deeply where nobody looks, and has *fields*."""
    metadata = {"name": "deep", "namespace": "team", "uid": "u-deep", "annotations": {"a": '{"\\'}, "managedFields": 0}
    text = msgspec.json.encode({"metadata": metadata, **fields})
    return text.replace(b'"managedFields":0', b'"managedFields":[{"fieldsV1":' + DEEP + b"}]")


class TestDepth:
    """An object that is nested as deeply as the API server takes it is an object like any other."""

    def test_one_of_a_list_is_read_with_the_others(self) -> None:
        plain = msgspec.json.encode({"metadata": {"name": "plain", "uid": "u-plain"}})
        items = b",".join([plain, deep(spec={"nodeName": "node-1"})])
        body = b'{"metadata":{"resourceVersion":"5","continue":"more"},"items":[' + items + b"]}"

        page = Reader(Pod).page(body)

        assert [("u-plain", None), ("u-deep", "node-1")] == [(pod.uid, pod.spec.node_name) for pod in page.objects]
        assert ([], "5", "more") == (page.unreadable, page.version, page.continue_)
        assert {"a": '{"\\'} == page.objects[1].annotations

    def test_one_that_changes_is_read(self) -> None:
        event = Reader(Pod).event(b'{"type":"MODIFIED","object":' + deep() + b"}")

        assert isinstance(event.told, Pod)
        assert ("MODIFIED", "u-deep") == (event.change, event.told.uid)

    def test_one_that_does_not_decode_besides_is_named(self) -> None:
        bad = deep(spec={"nodeName": 7})
        reader = Reader(Pod)

        page = reader.page(b'{"metadata":{"resourceVersion":"5"},"items":[' + bad + b"]}")
        event = reader.event(b'{"type":"ADDED","object":' + bad + b"}")

        assert isinstance(event.told, Unreadable)
        found = [(one.namespace, one.name, one.uid) for one in [*page.unreadable, event.told]]
        assert 2 * [("team", "deep", "u-deep")] == found

    def test_where_something_is_to_be_read_depth_is_an_error_like_any_other(self) -> None:
        bad = b'{"metadata":{"name":"deep","uid":"u-deep"},"spec":{"nodeName":' + DEEP + b"}}"

        page = Reader(Pod).page(b'{"metadata":{},"items":[' + bad + b"]}")

        assert ["u-deep"] == [one.uid for one in page.unreadable]

    @pytest.mark.parametrize("end", [1, len(DEEP) // 2, len(DEEP) // 2 + 3])
    def test_half_a_line_is_none(self, end: int) -> None:
        with pytest.raises(NotJSONError):
            Reader(Pod).event(b'{"type":"ADDED","object":' + deep()[:-end])

    def test_lists_are_cut_off_as_well(self) -> None:
        body = b'{"a":' + b"[" * DEEPEST + b'"]"' + b"]" * DEEPEST + b',"b":1}'

        assert 1 == decoded(msgspec.json.decode, body)["b"]


def test_an_answer_that_is_something_else_leaves_open_what_was_done() -> None:
    with pytest.raises(Unreachable, match="the API server's answer is no Lease") as told:
        answered(msgspec.json.Decoder(Lease), b"<html>502 Bad Gateway</html>")

    assert told.value.outcome_unknown
