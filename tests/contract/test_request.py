import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract import environment
from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, MIGPlacement, Role
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import Names
from cotenant.contract.reasons import Reason
from cotenant.contract.request import ContainerRequest, PodRequest, RequestError, Wishes, parse
from cotenant.contract.units import GIB, MIB
from tests.builders import PodBuilder, a_pod, request_of

NAMES = Names()
MEMORY = NAMES.gpu_mem


def read(pod: PodBuilder, unit_bytes: int = GIB) -> PodRequest | None:
    return parse(pod.build(), NAMES, unit_bytes)


class TestReading:
    """A request is read from limits and wishes, container by container in start order."""

    def test_a_pod_that_asks_nothing_of_ours_is_none_of_our_business(self) -> None:
        assert read(a_pod()) is None
        assert read(a_pod().with_container({"cpu": "4", "nvidia.com/gpu": "1"})) is None

    def test_wishes_alone_ask_for_nothing_however_wrong_they_are(self) -> None:
        assert read(a_pod().wishing(isolation="armoured", gpu_count="-3")) is None

    def test_eight_units_are_eight_times_the_unit(self) -> None:
        assert (ContainerRequest(name="main-0", role=Role.MAIN, units=8, share_bytes=8 * GIB),) == request_of(
            a_pod().asking("8")
        ).containers

    def test_the_unit_is_the_clusters(self) -> None:
        request = read(a_pod().asking("8"), unit_bytes=256 * MIB)

        # 8 x 256 MiB = 2 GiB
        assert request is not None
        assert 2 * GIB == request.containers[0].share_bytes

    def test_memory_is_split_equally_over_the_gpus_asked_for(self) -> None:
        container = request_of(a_pod().asking("80").wishing(gpu_count=2)).containers[0]

        # 80 units in all, 40 of each GPU
        assert (80, 40 * GIB) == (container.units, container.share_bytes)

    def test_a_quantity_with_a_suffix_counts_units_not_bytes(self) -> None:
        assert 2000 == request_of(a_pod().asking("2k")).containers[0].units

    def test_a_request_without_a_limit_is_read(self) -> None:
        assert 4 == request_of(a_pod().with_container(None, {MEMORY: "4"})).containers[0].units

    def test_limit_and_request_may_be_the_same_number_in_other_words(self) -> None:
        assert 2000 == request_of(a_pod().with_container({MEMORY: "2k"}, {MEMORY: "2000"})).containers[0].units

    def test_containers_stand_in_the_order_the_kubelet_starts_them(self) -> None:
        request = request_of(a_pod().asking("1").with_sidecar("2").with_init("3"))

        assert [(Role.SIDECAR, 2), (Role.INIT, 3), (Role.MAIN, 1)] == [(c.role, c.units) for c in request.containers]

    def test_containers_that_ask_nothing_are_left_out(self) -> None:
        request = request_of(a_pod().with_container({"cpu": "1"}).asking("1"))

        assert ["main-1"] == [container.name for container in request.containers]

    def test_wishes_are_read_from_the_annotations(self) -> None:
        wishes = request_of(
            a_pod()
            .asking("8")
            .wishing(
                gpu_count=2,
                isolation="strict",
                gpu_model=" H100, A100 ,",
                gpu_uuid="GPU-1",
                policy="best-fit",
                compute_percent=25,
            )
        ).wishes

        assert wishes == Wishes(
            gpu_count=2,
            isolation=Isolation.STRICT,
            models=("H100", "A100"),
            uuids=("GPU-1",),
            policy="best-fit",
            threads=25,
        )

    def test_a_pod_whose_init_containers_ask_is_placed_whole_by_its_peak(self) -> None:
        request = request_of(a_pod().with_sidecar("2").with_init("9").asking("4").asking("3"))

        assert request.whole
        # the larger of 2 + 9 and 2 + 4 + 3
        assert 11 * GIB == request.whole_bytes

    def test_a_pod_with_only_sidecars_before_it_is_not_placed_whole(self) -> None:
        assert not request_of(a_pod().with_sidecar("2").asking("4")).whole

    def test_a_request_describes_itself_to_people(self) -> None:
        assert "8 GiB + 4 GiB" == request_of(a_pod().asking(8).asking(4)).describe()
        assert "2 x 40 GiB" == request_of(a_pod().asking(80).wishing(gpu_count=2)).describe()

    def test_pods_alike_in_all_but_names_have_one_shape(self) -> None:
        one = a_pod().named("a").with_container({MEMORY: "8"}, name="x")
        other = a_pod().named("b").with_container({MEMORY: "8"}, name="y")

        assert request_of(one).shape == request_of(other).shape
        assert request_of(one).shape != request_of(other.wishing(gpu_uuid="GPU-1")).shape
        assert request_of(one).shape != request_of(other.asking("1")).shape


class TestRefusals:
    """What cannot be is refused with its reason and a sentence that names the container or the annotation."""

    @pytest.mark.parametrize(
        ("sentence", "amount"),
        [
            (f"container main-0 asks {MEMORY}: 0; ask for 1 unit or more", "0"),
            (f"container main-0 asks {MEMORY}: -1; ask for 1 unit or more", "-1"),
            (f"container main-0 asks {MEMORY}: '0.5' is not a whole number", "0.5"),
            (f"container main-0 asks {MEMORY}: '500m' is not a whole number", "500m"),
            (f"container main-0 asks {MEMORY}: 'lots' is not a quantity", "lots"),
            (f"container main-0 asks {MEMORY}: '' is not a quantity", ""),
            (f"container main-0 asks {MEMORY}: '8GiB' is not a quantity", "8GiB"),
            (f"container main-0 asks {MEMORY}: '1e999' is more than any GPU has", "1e999"),
            (f"container main-0 asks {MEMORY}: '2Ei' is more than any GPU has", "2Ei"),
            (f"container main-0 asks {MEMORY}: a number above 1152921504606846976 is more than any", 10**400),
        ],
        ids=str,
    )
    def test_an_amount_that_cannot_be_is_refused(self, sentence: str, amount: str | int) -> None:
        with pytest.raises(RequestError) as refused:
            read(a_pod().asking(amount))

        assert Reason.BAD_REQUEST is refused.value.reason
        assert sentence in str(refused.value)

    def test_a_limit_that_differs_from_the_request_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"has limit 8 and request 4 of cotenant.io/gpu-mem; make them equal"):
            read(a_pod().with_container({MEMORY: "8"}, {MEMORY: "4"}))

    @pytest.mark.parametrize(
        "alias", ["aliyun.com/gpu-mem", "volcano.sh/vgpu-memory", "nvidia.com/gpumem", "nvidia.com/gpu-memory"]
    )
    def test_an_alias_that_admission_has_not_rewritten_is_refused(self, alias: str) -> None:
        with pytest.raises(RequestError, match=f"asks {alias}, which admission rewrites to {MEMORY}"):
            read(a_pod().asking("8", of=alias))

    @pytest.mark.parametrize(
        "other", ["nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb", "cotenant.io/mig-1g.10gb"]
    )
    def test_a_container_that_asks_two_families_is_refused(self, other: str) -> None:
        with pytest.raises(RequestError, match=f"container main-0 asks both {MEMORY} and {other}") as refused:
            read(a_pod().with_container({MEMORY: "8", other: "1"}))

        assert Reason.TWO_FAMILIES is refused.value.reason

    def test_two_families_in_two_containers_are_allowed(self) -> None:
        request = request_of(a_pod().asking("8").with_container({"nvidia.com/gpu": "1"}))

        assert ["main-0"] == [container.name for container in request.containers]

    def test_memory_that_does_not_split_over_its_gpus_is_refused_with_the_way_out(self) -> None:
        with pytest.raises(RequestError, match=r"asks cotenant.io/gpu-mem: 7, .* ask for a multiple of 2"):
            read(a_pod().asking("7").wishing(gpu_count=2))

    def test_an_init_container_cannot_ask_beside_several_gpus(self) -> None:
        with pytest.raises(RequestError, match=r"init container init-0 asks .* in a pod with cotenant.io/gpu-count: 2"):
            read(a_pod().with_init("2").asking("2").wishing(gpu_count=2))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("gpu_count", "0"),
            ("gpu_count", "-1"),
            ("gpu_count", "65"),
            ("gpu_count", "02"),
            ("gpu_count", "1.0"),
            ("gpu_count", " 2"),
            ("gpu_count", "٢"),
            ("gpu_count", ""),
            ("gpu_count", "9" * 10_000),
            ("compute_percent", "0"),
            ("compute_percent", "101"),
            ("compute_percent", "50%"),
            ("isolation", "Strict"),
            ("isolation", ""),
            ("isolation", "paranoid"),
            ("isolation", "x" * 10_000),
        ],
        ids=lambda value: value[:20],
    )
    def test_a_wish_that_means_nothing_is_refused_by_its_key(self, key: str, value: str) -> None:
        with pytest.raises(RequestError) as refused:
            read(a_pod().asking("64").wishing(**{key: value}))

        assert Reason.BAD_REQUEST is refused.value.reason
        assert str(refused.value).startswith(f"cotenant.io/{key.replace('_', '-')}: ")
        # it becomes the text of an Event and of a pod's condition
        assert 200 > len(str(refused.value))

    @pytest.mark.parametrize("key", ["gpu_model", "gpu_uuid"])
    @pytest.mark.parametrize("value", ["*a," * 65, "a" * 257])
    def test_endless_wishes_are_refused_before_every_gpu_is_compared_to_them(self, key: str, value: str) -> None:
        with pytest.raises(RequestError, match="lists more than 64 names, or one of more than 256 letters"):
            read(a_pod().asking("8").wishing(**{key: value}))

    def test_patterns_that_would_hold_up_the_pods_of_others_are_refused_before_they_are_compiled(self) -> None:
        most = ",".join(f"*{n:02}-" + "*b" * 30 for n in range(16))  # 16 x 64 letters

        assert 16 == len(request_of(a_pod().asking("8").wishing(gpu_model=most)).wishes.models)
        with pytest.raises(RequestError, match=r"cotenant.io/gpu-model has more than 1024 letters; name fewer models"):
            read(a_pod().asking("8").wishing(gpu_model=f"{most},*"))

    def test_a_pod_of_thousands_of_asking_containers_is_refused(self) -> None:
        pod = a_pod()
        for _ in range(65):
            pod = pod.asking("1")

        with pytest.raises(RequestError, match=r"65 containers ask cotenant.io/gpu-mem; ask in 64 or fewer of them"):
            read(pod)

    @given(
        amounts=st.lists(st.text("0123456789.eEGi-", max_size=8) | st.integers(), min_size=1, max_size=3),
        wishes=st.dictionaries(
            st.sampled_from(["gpu_count", "isolation", "gpu_model", "compute_percent"]), st.text(max_size=8)
        ),
    )
    def test_any_pod_is_read_with_units_and_bytes_in_step_or_refused(
        self, amounts: list[str | int], wishes: dict[str, str]
    ) -> None:
        pod = a_pod().wishing(**wishes)
        for amount in amounts:
            pod = pod.asking(amount)
        try:
            request = request_of(pod)
        except RequestError:
            return
        count = request.wishes.gpu_count
        assert [c.units * GIB for c in request.containers] == [c.share_bytes * count for c in request.containers]


class TestRoomForTheGrant:
    """All annotations together may have 262,144 bytes, of which one container on one GPU gets 1,024 + 1,536 + 160."""

    THEIRS = 262_144 - 2_720

    def pod(self, size: int, fill: str = "x") -> PodBuilder:
        # a key of 3 bytes
        return a_pod().asking(1).annotated({"own": fill * ((size - 3) // len(fill.encode()))})

    @pytest.mark.parametrize("fill", ["x", "\u00e9"])
    def test_a_pod_that_leaves_just_enough_is_served_and_one_that_leaves_less_is_not(self, fill: str) -> None:
        assert read(self.pod(self.THEIRS - 1, fill)) is not None
        with pytest.raises(
            RequestError, match=r"annotations have 2594\d\d bytes and a grant may take 2720 more"
        ) as refused:
            read(self.pod(self.THEIRS + 3, fill))
        assert Reason.NO_ROOM_FOR_GRANT is refused.value.reason

    def test_a_pod_that_asks_nothing_of_ours_may_have_as_many_as_it_likes(self) -> None:
        assert read(a_pod().annotated({"own": "x" * 262_140})) is None

    def test_a_pod_that_is_bound_is_not_refused_for_what_it_was_bound_with(self) -> None:
        assert read(self.pod(self.THEIRS + 3_000).bound_to("n")) is not None

    @given(st.integers(1, 64), st.integers(1, 12), st.sampled_from(Mode))
    def test_a_grant_never_takes_more_than_is_kept_for_it(self, containers: int, gpus: int, mode: Mode) -> None:
        mig = mode is Mode.MIG
        pod, held = a_pod().wishing(**({} if mig else {"gpu_count": gpus})), []
        for n in range(containers):
            # names as long as they may be, amounts and users too
            name = f"{n:063}"
            pod = pod.with_container({"nvidia.com/mig-1g.10gb" if mig else MEMORY: 1 if mig else gpus}, name=name)
            shares = [GPUShare(uuid=f"GPU-{n:08}-0000-0000-0000-{k:012}", bytes=(1 << 40) - 1) for k in range(gpus)]
            held.append(
                ContainerGrant(
                    name=name,
                    role=Role.SIDECAR,
                    family=Family.MIG_STATIC if mig else Family.MEMORY,
                    mode=mode,
                    gpus=tuple(shares[:1] if mig else shares),
                    units=1 if mig else gpus,
                    mps_pipe=f"/var/run/cotenant/mps/GPU-{n:08}-0000-0000-0000-{0:012}/pipe"
                    if mode is Mode.MPS
                    else "",
                    user=(1 << 32) - 1,
                    mig=MIGPlacement(profile="1g.10gb+me", start=7, size=8, uuid=f"MIG-{0:036}") if mig else None,
                    isolation=IsolationRecord(
                        asked=Isolation.EXCLUSIVE, given=Isolation.EXCLUSIVE, enforced_by="x" * 100
                    ),
                )
            )
        request = request_of(pod)
        written = environment.annotations(Grant(containers=tuple(held)), NAMES) | {NAMES.writer: "x" * 350}
        kept = 1024 + len(request.containers) * (1536 + request.wishes.gpu_count * 160)

        assert kept >= sum(len(key) + len(value) for key, value in written.items())
