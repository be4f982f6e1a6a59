from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.configuration import (
    ConfigurationError,
    DevicePluginConfiguration,
    ExtenderConfiguration,
    Placement,
    convert,
    is_address,
    load,
)
from cotenant.contract.units import GIB, MIB

KINDS = [ExtenderConfiguration, DevicePluginConfiguration]


class TestDefaults:
    """Without a file, or with an empty one, everything has a default."""

    @pytest.mark.parametrize("text", ["", "---\n", "{}", "# nothing yet\n", "~"])
    def test_an_empty_file_is_the_defaults(self, text: str) -> None:
        assert ExtenderConfiguration() == convert(text, ExtenderConfiguration)

    def test_no_file_is_the_defaults(self) -> None:
        assert ExtenderConfiguration() == load(None, ExtenderConfiguration)

    def test_both_programs_agree_on_unit_and_names(self) -> None:
        assert GIB == ExtenderConfiguration().unit_bytes == DevicePluginConfiguration().unit_bytes
        assert ExtenderConfiguration().names == DevicePluginConfiguration().names


class TestReading:
    """Keys are camelCase, amounts are written as people do."""

    def test_a_file_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "extender.yaml"
        path.write_text("unit: 256MiB\nplacement: decide\ntls: {certFile: a.crt, keyFile: a.key}\nbindTimeout: 4\n")

        found = load(path, ExtenderConfiguration)

        assert (256 * MIB, Placement.DECIDE, 4.0) == (found.unit_bytes, found.placement, found.bind_timeout)
        assert found.tls is not None
        assert "a.key" == found.tls.key_file

    def test_a_number_of_bytes_is_an_amount(self) -> None:
        assert 8 * MIB == convert("reservePerGpu: 8388608", DevicePluginConfiguration).reserve_per_gpu_bytes

    @pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:9480", "[::1]:65535", "[::]:9480", "0.0.0.0:9480"])
    def test_an_address_is_host_and_port(self, address: str) -> None:
        assert is_address(address)


class TestErrors:
    """Whatever is wrong is refused with the path of its key and what was expected there."""

    @pytest.mark.parametrize(
        ("expected", "text"),
        [
            ("colour: unknown key", "colour: blue"),
            ("scheduler_name: unknown key", "scheduler_name: mine"),
            ("tls.colour: unknown key", "tls: {certFile: a, keyFile: b, colour: c}"),
            ("tls.keyFile: missing, but required", "tls: {certFile: a}"),
            ("tls: expected object | null, got int", "tls: 3"),
            ("tls.certFile: expected str, got int", "tls: {certFile: 3, keyFile: b}"),
            ("nominate: expected bool, got str", "nominate: 'yes'"),
            ("namespaces.b.gpus: expected int", "namespaces: {a: {gpus: 1}, b: {gpus: '1'}, c: {gpus: '1'}}"),
            ("namespaces.b.models[1]: expected str", "namespaces: {a: {}, b: {models: [T4, 1]}}"),
            ("namespaces.a.b.gpu: unknown key", "namespaces: {a.b: {gpu: 1}}"),
            ("profilePolicies.$[...]: expected str", "profilePolicies: {a: b, '$[...]': 1}"),
            ("placement: unknown value 'best'", "placement: best"),
            ("bindTimeout: expected float > 0.0", "bindTimeout: 0"),
            ("bindTimeout: expected float > 0.0", "bindTimeout: .nan"),
            ("bindTimeout: expected float <= 600.0", "bindTimeout: .inf"),
            ("policy: expected str, got null", "policy: ~"),
            ("unit: 'much' is not a quantity such as 8, 2k or 80Gi", "unit: much"),
            ("unit: expected int | str, got float", "unit: 1.5"),
            ("unit: expected int | str, got date", "unit: 2026-01-01"),
            ("unit: expected whole MiB from 1MiB to 1TiB, got 512 KiB", "unit: 512KiB"),
            ("unit: expected whole MiB from 1MiB to 1TiB, got 2 TiB", "unit: 2TiB"),
            ("unit: expected whole MiB from 1MiB to 1TiB, got 0 B", "unit: 0"),
            ("unit: '-1GiB' is negative", "unit: -1GiB"),
            ("unit: a number above 1152921504606846976 is more than any GPU has", "unit: 1" + "0" * 400),
            ("domain: 'Cotenant.io' is not a DNS subdomain", "domain: Cotenant.io"),
            ("listen: expected HOST:PORT, such as 127.0.0.1:9480, got 'here'", "listen: here"),
            ("serve: expected HOST:PORT, such as 127.0.0.1:9480, got '[::1]:65536'", "serve: '[::1]:65536'"),
            ("serve: expected HOST:PORT, such as 127.0.0.1:9480, got ':80'", "serve: ':80'"),
            ("schedulerName: default-scheduler is the cluster's own", "schedulerName: default-scheduler"),
            ("expected object, got array", "- unit: 1GiB"),
            ("expected object, got str", "unit=1GiB"),
            ("is not valid YAML: the key 'unit' stands twice", "unit: 1GiB\nunit: 2GiB"),
            ("is not valid YAML: the key 'certFile' stands twice", "tls: {certFile: a, certFile: b}"),
            ("is not valid YAML: the key 1 is no text", "1: 2"),
            ("is not valid YAML: the key ['a'] is no text", "? [a]\n: 1"),
            ("is not valid YAML: while parsing a flow", "tls: {"),
            ("is not valid YAML: could not determine a constructor", "unit: !!python/object:os.system {}"),
            ("is not valid YAML: could not determine a constructor", "base: &b {unit: 1GiB}\n<<: *b"),
            ("is not valid YAML: found unconstructable recursive node", "&a {tls: *a}"),
            ("is not valid YAML: the value is no int", 'unit: !!int ""'),
            ("is not valid YAML: the value is no bool", "nominate: !!bool maybe"),
            ("is not valid YAML: the value is no timestamp", "unit: !!timestamp soon"),
            ("is not valid YAML: the value is no map", "unit: !!map [[a]]"),
            ("is not valid YAML: the value is no int", "unit: " + "9" * 5_000),
            ("is not valid YAML: unacceptable character", "unit: \x00"),
            ("is not valid YAML", "unit: " + "[" * 400),
        ],
        ids=lambda text: text[:40],
    )
    def test_it_says_which_key_is_wrong_and_why(self, expected: str, text: str) -> None:
        with pytest.raises(ConfigurationError) as refused:
            convert(text, ExtenderConfiguration)

        assert str(refused.value).startswith(expected)

    def test_the_plugins_reserve_is_named_too(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^reservePerGpu: '-1' is negative"):
            convert("reservePerGpu: '-1'", DevicePluginConfiguration)

    def test_the_file_is_named_before_the_key(self, tmp_path: Path) -> None:
        path = tmp_path / "extender.yaml"
        path.write_text("unit: much\n")

        with pytest.raises(ConfigurationError, match=f"^{path}: unit: 'much'"):
            load(path, ExtenderConfiguration)

    @pytest.mark.parametrize("content", [None, b"unit: \xff\xfe1GiB"])
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "extender.yaml"
        if content is not None:
            path.write_bytes(content)

        with pytest.raises(ConfigurationError, match=f"^{path}: cannot be read: "):
            load(path, ExtenderConfiguration)


keys = st.sampled_from(["unit", "domain", "tls", "certFile", "bindTimeout", "listen", "nominate", "reservePerGpu", "x"])
kinds = "int float bool null timestamp binary set omap pairs str seq map".split()  # noqa: SIM905 - to be read
tags = st.sampled_from(["", "! ", "&a ", "*a ", *(f"!!{kind} " for kind in kinds)])
scalars = st.sampled_from(["", "1GiB", "0x", "-", "1e999", "{}", "[]", "{a: 1}", "[[a]]", "~", "1:99", "=", "<<"])
lines = st.lists(st.tuples(keys, tags, scalars | st.text(max_size=10)), max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class TestFuzz:
    """No text whatever makes anything but a configuration or a ConfigurationError."""

    @given(st.sampled_from(KINDS), st.text(max_size=80))
    def test_any_text(self, kind: type[ExtenderConfiguration], text: str) -> None:
        self.converts_or_refuses(kind, text)

    @given(st.sampled_from(KINDS), st.dictionaries(keys, values, max_size=4))
    def test_any_values_under_our_keys(self, kind: type[ExtenderConfiguration], value: dict[str, object]) -> None:
        self.converts_or_refuses(kind, yaml.safe_dump(value, allow_unicode=True))

    @given(st.sampled_from(KINDS), lines)
    def test_any_tag_on_any_value(self, kind: type[ExtenderConfiguration], lines: list[tuple[str, str, str]]) -> None:
        self.converts_or_refuses(kind, "\n".join(f"{key}: {tag}{value}" for key, tag, value in lines))

    @staticmethod
    def converts_or_refuses(kind: type[ExtenderConfiguration], text: str) -> None:
        try:
            found = convert(text, kind)
        except ConfigurationError:
            return
        assert isinstance(found, kind)
