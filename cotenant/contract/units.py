"""Amounts of memory at the border: quantities, units, and the ids that stand for units at the kubelet."""

import hashlib
import re
from decimal import ROUND_CEILING, Context, Decimal, Inexact, InvalidOperation
from functools import lru_cache

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# No GPU, node or pod comes near an exbibyte. The bound keeps "1e999999" from becoming a million digits.
MAX_BYTES = 1 << 60
_LONGEST_QUANTITY = 40

# ASCII: \d alone would take the digits of every script
_QUANTITY = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:([eE][+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i))?", re.ASCII)
# Decimal's own 28 digits would round "1.00000000000000000000000000001" to a whole number.
_EXACT = Context(prec=100, traps=[InvalidOperation, Inexact])
_SPACE_BEFORE_SUFFIX = re.compile(r"(?<=\d) +(?=[A-Za-z])")
_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
} | {f"{letter}i": Decimal(1 << 10 * (power + 1)) for power, letter in enumerate("KMGTPE")}


def parse_quantity(text: str | int) -> int:
    """Read a whole Kubernetes quantity such as "8", "2k" or "80Gi".

    Raises ValueError with a sentence for anything else: fractions of one, other signs, other suffixes, more than 2**60.
    Grammar: apimachinery/pkg/api/resource/quantity.go.
    """
    value = _exact(text)
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def count_of(amount: str | int | None) -> int:
    """Read how many of a resource a node has; 0 where it says nothing, or what is no number."""
    try:
        return parse_quantity(amount if amount is not None else 0)
    except ValueError:
        return 0


@lru_cache(maxsize=4096)
def parse_milli(text: str | int) -> int:
    """Read a Kubernetes quantity such as "250m" or "1.5" as thousandths, rounded up as kube-scheduler does.

    Raises ValueError with a sentence for anything that is no quantity, or is more than 2**60 of them.
    """
    return int((_exact(text) * 1000).to_integral_value(ROUND_CEILING))


def _exact(text: str | int) -> Decimal:
    if isinstance(text, int):
        if abs(text) > MAX_BYTES:
            raise ValueError(f"a number above {MAX_BYTES} is more than any GPU has")
        text = str(text)
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_QUANTITY else None
    if match is None:
        raise ValueError(f"{text[:_LONGEST_QUANTITY]!r} is not a quantity such as 8, 2k or 80Gi")
    number, exponent, suffix = match.groups()
    try:
        value = _EXACT.multiply(Decimal(number + (exponent or "")), _SUFFIXES.get(suffix, Decimal(1)))
    except (InvalidOperation, Inexact) as error:
        raise ValueError(f"{text!r} is not a quantity such as 8, 2k or 80Gi") from error
    if abs(value) > MAX_BYTES:
        raise ValueError(f"{text!r} is more than any GPU has")
    return value


def parse_bytes(text: str | int) -> int:
    """Read an amount of memory written by a person: bytes, "256MiB", "80Gi" or "80GiB".

    Raises ValueError with a sentence when it is not one, or is negative.
    """
    plain = text.strip().removesuffix("B").rstrip() if isinstance(text, str) else text
    amount = parse_quantity(_SPACE_BEFORE_SUFFIX.sub("", plain) if isinstance(plain, str) else plain)
    if amount < 0:
        raise ValueError(f"{text!r} is negative")
    return amount


def format_bytes(amount: int) -> str:
    """Write *amount* bytes for a person, exact where it is a whole number of a unit, else with one digit."""
    for size, suffix in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(amount) >= size:
            return f"{amount // size} {suffix}" if amount % size == 0 else f"{amount / size:.1f} {suffix}"
    return f"{amount} B"


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: "1 pod", "2 pods"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def usable_bytes(*, total: int, reserved: int, reserve_per_gpu: int, unit_bytes: int) -> int:
    """Floor what pods may be given of one GPU to whole units, in bytes; never negative.

    *total* and *reserved* are nvmlDeviceGetMemoryInfo_v2's, *reserve_per_gpu* the configuration's.
    """
    return max(0, total - reserved - reserve_per_gpu) // unit_bytes * unit_bytes


def id_prefix(uuid: str) -> str:
    """Name a GPU in device ids by 8 hexadecimal digits that depend on nothing but its UUID.

    Not the index, which moves when another GPU is lost, and not a cut of the UUID, which two GPUs may share.
    """
    return hashlib.blake2s(uuid.encode(), digest_size=4).hexdigest()


def device_ids(uuid: str, count: int) -> list[str]:
    """Make the *count* ids that stand for the units of one GPU, "<prefix>-<n>": 12 characters where others use 42."""
    prefix = id_prefix(uuid)
    return [f"{prefix}-{n}" for n in range(count)]
