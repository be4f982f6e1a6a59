"""The complete examples whose wire form stands in tests/golden: each field of version 1 at least once."""

from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, MIGPlacement, Role
from cotenant.contract.inventory import GPU, MIG, Family, Foreign, Health, Inventory, MIGInstance, MIGProfile, Mode
from cotenant.contract.units import GIB, MIB

TOTAL = 81_559 * MIB  # what NVML says of an H100 with "80 GB"

INVENTORY = Inventory(
    generation=42,
    unit_bytes=GIB,
    serving=False,
    gpus=(
        GPU(
            uuid="GPU-00000000-0000-0000-0000-000000000000",
            index=0,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=79 * GIB,
        ),
        GPU(
            uuid="GPU-11111111-1111-1111-1111-111111111111",
            index=1,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=79 * GIB,
            mode=Mode.MPS,
            health=Health.UNHEALTHY,
            detail="XID 79: the GPU has fallen off the bus",
            max_clients=48,
            mps_pipe="/run/cotenant/mps/1",
        ),
        GPU(
            uuid="GPU-22222222-2222-2222-2222-222222222222",
            index=2,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=TOTAL,
            family=Family.REPLICAS,
        ),
        GPU(
            uuid="GPU-33333333-3333-3333-3333-333333333333",
            index=3,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=TOTAL,
            family=Family.MIG_STATIC,
            mode=Mode.MIG,
            mig=MIG(
                instances=(
                    MIGInstance(profile="3g.40gb", start=4, size=4, uuid="MIG-44444444-4444-4444-4444-444444444444"),
                )
            ),
        ),
        GPU(
            uuid="GPU-55555555-5555-5555-5555-555555555555",
            index=4,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=TOTAL,
            family=Family.MIG_DYNAMIC,
            mode=Mode.MIG,
            mig=MIG(
                profiles=(
                    MIGProfile(
                        name="1g.10gb",
                        profile_id=19,
                        bytes=9_856 * MIB,
                        compute_slices=1,
                        max_instances=7,
                        size=1,
                        starts=(0, 1, 2, 3, 4, 5, 6),
                    ),
                    MIGProfile(
                        name="7g.80gb",
                        profile_id=0,
                        bytes=81_007 * MIB,
                        compute_slices=7,
                        max_instances=1,
                        size=8,
                        starts=(0,),
                    ),
                ),
                unexplained=(MIGInstance(profile="1g.10gb", start=6, size=1),),
            ),
        ),
        GPU(
            uuid="GPU-66666666-6666-6666-6666-666666666666",
            index=5,
            model="NVIDIA H100 80GB HBM3",
            total_bytes=TOTAL,
            usable_bytes=79 * GIB,
            foreign=Foreign(bytes=3 * GIB, fenced=True, detail="held by pod default/train as nvidia.com/gpu"),
        ),
    ),
)

GRANT = Grant(
    containers=(
        ContainerGrant(
            name="fetch",
            role=Role.INIT,
            family=Family.MEMORY,
            mode=Mode.TIME_SLICING,
            gpus=(GPUShare(uuid="GPU-00000000-0000-0000-0000-000000000000", bytes=4 * GIB),),
            units=4,
            isolation=IsolationRecord(asked=Isolation.NONE, given=Isolation.NONE, enforced_by="nothing"),
        ),
        ContainerGrant(
            name="watch",
            role=Role.SIDECAR,
            family=Family.MEMORY,
            mode=Mode.MPS,
            gpus=(GPUShare(uuid="GPU-11111111-1111-1111-1111-111111111111", bytes=2 * GIB),),
            units=2,
            threads=25,
            mps_pipe="/run/cotenant/mps/1",
            isolation=IsolationRecord(
                asked=Isolation.LIMITED, given=Isolation.LIMITED, enforced_by="MPS memory limit, per process"
            ),
        ),
        ContainerGrant(
            name="train",
            role=Role.MAIN,
            family=Family.MEMORY,
            mode=Mode.EXCLUSIVE,
            gpus=(
                GPUShare(uuid="GPU-66666666-6666-6666-6666-666666666666", bytes=79 * GIB),
                GPUShare(uuid="GPU-77777777-7777-7777-7777-777777777777", bytes=79 * GIB),
            ),
            units=80,
            isolation=IsolationRecord(
                asked=Isolation.EXCLUSIVE, given=Isolation.EXCLUSIVE, enforced_by="no other pod on the GPU"
            ),
        ),
        ContainerGrant(
            name="serve",
            role=Role.MAIN,
            family=Family.MIG_DYNAMIC,
            mode=Mode.MIG,
            gpus=(GPUShare(uuid="GPU-55555555-5555-5555-5555-555555555555", bytes=9_856 * MIB),),
            units=1,
            mig=MIGPlacement(profile="1g.10gb", start=0, size=1),
            isolation=IsolationRecord(asked=Isolation.STRICT, given=Isolation.STRICT, enforced_by="MIG partition"),
        ),
    ),
)
