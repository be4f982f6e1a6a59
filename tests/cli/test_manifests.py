"""Manifests keep their meaning to Kubernetes, whose YAML is another than PyYAML's."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cotenant.cli.manifests import read, written
from cotenant.contract.configuration import ConfigurationError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
WORDS = st.from_regex(r"[-+.0-9a-fxobyYnNeE_:~]{1,6}", fullmatch=True)


@pytest.mark.parametrize("text", ["y", "N", "on", "08", "1e3", "12345e67", "0o14", "0x1F", "1_000", "~", "=", ".5"])
def test_text_in_quotes_stays_in_quotes(text: str) -> None:
    assert f"'{text}': '{text}'\n" == written(read(f'{{"{text}": "{text}"}}'))


@pytest.mark.parametrize("text", ["22:22", "2024-01-01", "2024-01-01T00:00:00Z", "1.2.3", "0x", "="])
def test_what_kubernetes_takes_for_text_is_written_as_text(text: str) -> None:
    assert [{"a": text}] == read(f"a: {text}")
    assert [{"a": text}] == read(written([{"a": text}]))


@pytest.mark.parametrize(
    ("expected", "text"), [(420, "0o644"), (420, "0644"), (1000, "1e3"), (8, "08"), (True, "y"), (False, "N")]
)
def test_what_kubernetes_takes_for_a_number_or_a_truth_is_one(expected: float | bool, text: str) -> None:  # noqa: FBT001
    assert [{"a": expected}] == read(f"a: {text}")


@example("\x85")
@given(st.recursive(SCALARS | WORDS, lambda one: st.lists(one) | st.dictionaries(st.text() | WORDS, one), max_leaves=9))
def test_what_is_written_is_read_again(value: object) -> None:
    assert [one for one in [value] if one is not None] == read(written([value]))


def test_a_script_is_written_line_by_line() -> None:
    text = "args:\n- |\n  set -e\n  serve --port 8000\n"
    assert text == written(read(text))


def test_json_may_be_indented_by_tabs() -> None:
    assert [{"a": ["b", "\t"]}] == read('{\n\t"a": [\n\t\t"b",\n\t\t"\\t"\n\t]\n}\n')


def test_a_key_that_is_merged_may_be_given_again() -> None:
    assert [{"a": {"b": 1, "c": 1}, "d": {"b": 2, "c": 1}}] == read("a: &a {b: 1, c: 1}\nd: {<<: *a, b: 2}")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("line 2, column 1: the key 'a' stands twice", "a: 1\na: 2"),
        ("line 1, column 1: found unconstructable recursive node", "&a {a: *a}"),
        ("line 1, column 6: while parsing a flow sequence", "a: [b"),
        ("maximum recursion depth", "a: " + "[" * 3000),
        ("Exceeds the limit", "a: " + "9" * 5000),
        ("unhashable", "? [a]\n: 1"),
        ("", 'a: !!int ""'),
        ("", "a: !!bool maybe"),
        ("unacceptable character", "a\0"),
    ],
)
def test_what_is_no_yaml_is_a_sentence_that_says_where(said: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^is not valid YAML: .*{said}"):
        read(text)
