import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.names import Names, is_dns_label
from cotenant.standins.api_rules import PODS, validate

labels = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


class TestWireNames:
    """Every name on the wire comes from one domain, and Kubernetes accepts each of them."""

    def test_the_names_of_the_default_domain_are_those_of_the_documentation(self) -> None:
        names = Names()

        assert ("cotenant.io/gpu-mem", "cotenant.io/managed") == (names.gpu_mem, names.managed)
        assert ("cotenant.io/gpus", "cotenant.io/grant") == (names.inventory, names.grant)
        assert "visible-devices.cotenant.io/train" == names.visible_devices("train")
        assert "mps-memory.cotenant.io/train" == names.mps_memory("train")
        assert "mps-threads.cotenant.io/train" == names.mps_threads("train")
        assert "mps-pipe.cotenant.io/train" == names.mps_pipe("train")

    def test_the_prefixes_are_what_the_annotations_of_containers_begin_with(self) -> None:
        assert (
            "visible-devices.gpu.example/",
            "mps-memory.gpu.example/",
            "mps-threads.gpu.example/",
            "mps-pipe.gpu.example/",
        ) == Names("gpu.example").env_prefixes()

    @pytest.mark.parametrize(
        "domain", ["", ".", "Cotenant.io", "cotenant_io", "-a.io", "a-.io", "a..io", "a/b", "a.io\n", "é.io", "a" * 238]
    )
    def test_a_domain_that_kubernetes_would_refuse_is_refused(self, domain: str) -> None:
        with pytest.raises(ValueError, match="is not a DNS subdomain of at most 237 lower-case characters"):
            Names(domain)

    @given(st.lists(labels, min_size=1, max_size=3).map(".".join).filter(lambda d: len(d) <= 237), labels)
    def test_every_annotation_under_a_good_domain_is_a_good_key(self, domain: str, container: str) -> None:
        names = Names(domain)
        keys = [names.inventory, names.grant, names.policy, names.isolation, names.gpu_model, names.gpu_uuid]
        keys += [names.gpu_count, names.compute_percent, *(prefix + container for prefix in names.env_prefixes())]

        # the stand-in's rules are kube-apiserver's (apimachinery/pkg/api/validation)
        validate(PODS, {"metadata": {"name": "p", "annotations": dict.fromkeys(keys, "")}})


class TestContainerNames:
    """A container's name becomes part of annotation keys, so it must be a DNS label."""

    @given(labels)
    def test_a_label_is_one(self, label: str) -> None:
        assert is_dns_label(label)

    @pytest.mark.parametrize("name", ["", "A", "a_b", "a.b", "-a", "a-", "a" * 64, "a\n", "a/b"])
    def test_anything_else_is_none(self, name: str) -> None:
        assert not is_dns_label(name)
