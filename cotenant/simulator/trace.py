"""Traces: nodes and pods from CSV files with the columns of Alibaba's openb trace, and the order pods arrive in."""

import csv
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from random import Random

import msgspec

from extender.policies.mix import PodClass

MILLI = 1000
# Above any machine there is, so that a slipped decimal point is told from a large node.
_MOST = {"cpu_milli": 4_096_000, "memory_mib": 1 << 26, "gpu": 64, "num_gpu": 64, "gpu_milli": MILLI}
_MOST |= dict.fromkeys(("creation_time", "scheduled_time", "deletion_time"), 10_000_000_000)
# Ten times the largest trace that was ever published for this.
_MOST_ROWS = 1_000_000

_NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
_POD_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")


class TraceError(ValueError):
    """Say what is wrong with a trace: file, line, column and what was expected."""

    def __init__(self, path: Path, line: int, column: str, expected: str) -> None:
        # kept as they came, so that it survives the way from another process
        super().__init__(path, line, column, expected)

    def __str__(self) -> str:
        path, line, column, expected = self.args
        return f"{path}, line {line}, column {column}: {expected}"


class TraceNode(msgspec.Struct, frozen=True):
    """Hold a node: *gpus* GPUs of one *model*, each of 1000 milli."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str

    @property
    def marked_model(self) -> str:
        """Give the model so that it is part of no other one: a pod that may have an A10 may not have an A100."""
        return f"<{self.model}>"


class TracePod(msgspec.Struct, frozen=True):
    """Hold a pod: *gpus* GPUs, *share_milli* of each, on one of *models*, on any where none is named."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    share_milli: int
    models: tuple[str, ...] = ()

    @property
    def wished_models(self) -> tuple[str, ...]:
        """Give the models as wishes, each of which the marked model of that name alone fulfils."""
        return tuple(f"<{escape(model)}>" for model in self.models)

    @property
    def milli(self) -> int:
        """Count all GPU milli together."""
        return self.gpus * self.share_milli

    @property
    def kind(self) -> str:
        """Name its kind for reports: cpu, share, or its number of whole GPUs."""
        if not self.gpus:
            return "cpu"
        return "share" if self.share_milli < MILLI else str(self.gpus)

    @property
    def pod_class(self) -> PodClass:
        """Say which pods it is like."""
        return PodClass(self.cpu_milli, self.gpus, self.share_milli, self.wished_models)


class Order(msgspec.Struct, frozen=True):
    """Hold in which order pods arrive, and which node comes first where a policy holds several for equal.

    *arrivals* are indices of the pods; *ranks* are by node in the order of their names, the smaller comes first.
    """

    arrivals: tuple[int, ...]
    ranks: tuple[int, ...]


def read_nodes(path: Path) -> list[TraceNode]:
    """Read a CSV of nodes, sorted by name: sn, cpu_milli, memory_mib, gpu, model; raise TraceError for a bad one."""
    nodes: dict[str, TraceNode] = {}
    for line, row in _rows(path, _NODE_COLUMNS):
        name, gpus = row["sn"], _number(path, line, row, "gpu")
        if not name or name in nodes:
            raise TraceError(path, line, "sn", f"expected a name that no other node has, not {name!r}")
        if bool(gpus) != bool(row["model"]):
            raise TraceError(path, line, "model", f"expected {'a' if gpus else 'no'} model for {gpus} GPUs")
        nodes[name] = TraceNode(
            name=name,
            cpu_milli=_number(path, line, row, "cpu_milli"),
            memory_mib=_number(path, line, row, "memory_mib"),
            gpus=gpus,
            model=row["model"],
        )
    return [nodes[name] for name in sorted(nodes)]


def read_pods(path: Path, nodes: list[TraceNode]) -> list[TracePod]:
    """Read a CSV of pods: name, cpu_milli, memory_mib, num_gpu, gpu_milli and, where it is there, gpu_spec.

    gpu_spec lists models as in V100M16|V100M32. Other columns are not read. Raises TraceError for a bad file, and for a
    pod that is larger than any of *nodes*.
    """
    pods: list[TracePod] = []
    names: set[str] = set()
    known = {node.model for node in nodes if node.model}
    largest = {
        "cpu_milli": max((node.cpu_milli for node in nodes), default=0),
        "memory_mib": max((node.memory_mib for node in nodes), default=0),
        "num_gpu": max((node.gpus for node in nodes), default=0),
    }
    for line, row in _rows(path, _POD_COLUMNS):
        amounts = {column: _number(path, line, row, column) for column in _POD_COLUMNS[1:]}
        for column, most in largest.items():
            if amounts[column] > most:
                raise TraceError(
                    path, line, column, f"expected at most {most}, what the largest node has, not {amounts[column]}"
                )
        if bool(amounts["num_gpu"]) != bool(amounts["gpu_milli"]):
            raise TraceError(path, line, "gpu_milli", f"expected 0 for 0 GPUs and 1 to {MILLI} for others")
        models = tuple(model for model in (row.get("gpu_spec") or "").split("|") if model)
        for model in models:
            if model not in known:
                raise TraceError(
                    path,
                    line,
                    "gpu_spec",
                    f"expected models that a node has ({', '.join(sorted(known))}), not {model!r}",
                )
        if not row["name"] or row["name"] in names:
            raise TraceError(path, line, "name", f"expected a name that no other pod has, not {row['name']!r}")
        names.add(row["name"])
        pods.append(
            TracePod(
                name=row["name"],
                cpu_milli=amounts["cpu_milli"],
                memory_mib=amounts["memory_mib"],
                gpus=amounts["num_gpu"],
                share_milli=amounts["gpu_milli"],
                models=models if amounts["num_gpu"] else (),
            )
        )
    return pods


def read_lives(path: Path, pods: list[TracePod]) -> list[float]:
    """Read how many seconds each of *pods* ran: deletion_time less scheduled_time (creation_time where that is empty).

    Raises TraceError for a file without these columns, and for times that are none.
    """
    lives: dict[str, float] = {}
    for line, row in _rows(path, ("name", "creation_time", "deletion_time")):
        began = "scheduled_time" if (row.get("scheduled_time") or "").strip() else "creation_time"
        life = _number(path, line, row, "deletion_time") - _number(path, line, row, began)
        if life < 0:
            raise TraceError(path, line, "deletion_time", f"expected a time after {began}")
        lives[row["name"]] = float(life)
    return [lives[pod.name] for pod in pods]


def read_order(path: Path, *, nodes: int, pods: int) -> Order:
    """Read a sequence file: line 1 ranks of the nodes, line 2 indices of the pods as they arrive, blanks between."""
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise TraceError(path, 1, "1", "expected whole numbers with blanks between") from error
    if len(lines) < 2:  # noqa: PLR2004
        raise TraceError(path, len(lines) + 1, "1", "expected two lines: the nodes' ranks, and the pods in their order")
    ranks, arrivals = (_numbers(path, n + 1, lines[n]) for n in range(2))
    if sorted(ranks) != list(range(nodes)):
        raise TraceError(path, 1, str(len(ranks)), f"expected each of 0 to {nodes - 1} once, a rank for each node")
    for column, index in enumerate(arrivals, start=1):
        if index >= pods:
            raise TraceError(path, 2, str(column), f"expected the index of a pod, 0 to {pods - 1}, not {index}")
    if not arrivals:
        raise TraceError(path, 2, "1", "expected the index of a pod")
    return Order(arrivals=arrivals, ranks=ranks)


def draw_order(pods: list[TracePod], nodes: list[TraceNode], *, seed: int, ratio: float) -> Order:
    """Shuffle pods, and add or take away random ones until they ask *ratio* times the cluster's GPUs.

    The protocol of the FGD paper, but for its random numbers, which are Go's: read a sequence file for those.
    """
    random = Random(seed)  # noqa: S311
    target = ratio * MILLI * sum(node.gpus for node in nodes)
    arrivals = list(range(len(pods)))
    random.shuffle(arrivals)
    asked = sum(pod.milli for pod in pods)
    if not asked:
        target = 0.0
    while asked > target and len(arrivals) > 1:
        asked -= pods[arrivals.pop(random.randrange(len(arrivals)))].milli
    while asked < target:
        drawn = random.randrange(len(pods))
        asked += pods[drawn].milli
        if asked <= target:
            arrivals.append(drawn)
    ranks = list(range(len(nodes)))
    random.shuffle(ranks)
    return Order(arrivals=tuple(arrivals), ranks=tuple(ranks))


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV file row by row, with the line that each ends on."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for column in columns:
                if column not in (reader.fieldnames or ()):
                    raise TraceError(path, 1, column, f"expected the columns {', '.join(columns)}; this one is missing")
            count = 0
            for count, row in enumerate(reader, start=1):
                if count > _MOST_ROWS:
                    raise TraceError(path, reader.line_num, columns[0], f"expected at most {_MOST_ROWS} rows")
                if None in row or None in row.values():
                    where = len(row) if None in row else list(row.values()).index(None) + 1
                    raise TraceError(
                        path,
                        reader.line_num,
                        str(where),
                        f"expected {len(reader.fieldnames or ())} values, as the header has",
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise TraceError(path, reader.line_num + 1, columns[0], f"expected CSV in UTF-8: {error}") from error
    if not count:
        raise TraceError(path, 2, columns[0], "expected at least one row below the header")


def _number(path: Path, line: int, row: dict[str, str], column: str) -> int:
    text, most = row[column].strip(), _MOST[column]
    # a spreadsheet writes 12000.0
    whole = text.removesuffix(".0")
    if not (whole.isascii() and whole.isdigit()) or len(whole) > len(str(most)) or int(whole) > most:
        raise TraceError(path, line, column, f"expected a whole number from 0 to {most}, not {text[:40]!r}")
    return int(whole)


def _numbers(path: Path, line: int, text: str) -> tuple[int, ...]:
    words = text.split()
    for column, word in enumerate(words, start=1):
        if not (word.isascii() and word.isdigit() and len(word) <= len(str(_MOST_ROWS))):
            raise TraceError(path, line, str(column), f"expected whole numbers with blanks between, not {word[:40]!r}")
    return tuple(map(int, words))
