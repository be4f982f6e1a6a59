"""Many replays at once: over all cores, or on a Dask cluster; each answer is kept, so that what was ended goes on."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from cotenant import __version__

R = TypeVar("R", covariant=True)  # noqa: PLC0105 - a Protocol's own
A = TypeVar("A", bound=msgspec.Struct)


class Errand(Protocol[R]):
    """Be one piece of work that can be sent to another process or machine."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Name the files that it reads."""

    @property
    def title(self) -> str:
        """Name it, as the beginning of its answer's file name; everything that makes it another is in `sign`."""

    @property
    def sign(self) -> str:
        """Say what else decides the answer."""

    def at(self, inputs: Mapping[Path, Path]) -> "Errand[R]":
        """Give the same errand on copies of its files."""

    def work(self) -> R:
        """Do it."""


class Kept(Generic[A]):
    """Keep answers in a folder, whole or not at all."""

    def __init__(self, folder: Path, kind: type[A]) -> None:
        self._folder = folder
        self._kind = kind
        self._contents: dict[Path, bytes] = {}

    def find(self, errand: Errand[A]) -> A | None:
        """Give the answer that was kept of an errand on the same files, None for none or half of one."""
        try:
            return msgspec.json.decode(self.target(errand).read_bytes(), type=self._kind)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def keep(self, errand: Errand[A], answer: A) -> None:
        """Keep an answer, whenever this program is ended."""
        target = self.target(errand)
        unfinished = target.with_suffix(".part")
        unfinished.write_bytes(msgspec.json.encode(answer))
        unfinished.replace(target)

    def target(self, errand: Errand[A]) -> Path:
        """Name the file of an answer; other inputs give another name, so that no stale one is taken for it."""
        digest = blake2b(errand.sign.encode(), digest_size=6)
        for path in errand.inputs:
            digest.update(self._digest(path))
        return self._folder / f"{errand.title}-{digest.hexdigest()}.json"

    def _digest(self, path: Path) -> bytes:
        if path not in self._contents:
            self._contents[path] = blake2b(path.read_bytes()).digest()
        return self._contents[path]


def run(
    errands: Sequence[Errand[A]],
    kept: Kept[A],
    *,
    workers: int,
    scheduler: str | None,
    progress: Callable[[int], None],
) -> list[A]:
    """Do what has no answer yet, and give all answers in the order of *errands*; raise what an errand raises.

    *scheduler* is the address of a Dask scheduler, whose workers then do it; raises ImportError where Dask is missing,
    and OSError where it does not answer or its workers have another version of Cotenant.
    """
    found: dict[int, A] = {}
    missing = []
    for n, errand in enumerate(errands):
        answer = kept.find(errand)
        if answer is None:
            missing.append(n)
        else:
            found[n] = answer
            progress(1)
    if missing:
        wanted = {n: errands[n] for n in missing}
        with _elsewhere(wanted, scheduler) if scheduler else _here(wanted, workers) as answers:
            for n, answer in answers:
                kept.keep(errands[n], answer)
                found[n] = answer
                progress(1)
    return [found[n] for n in range(len(errands))]


@contextmanager
def _here(errands: Mapping[int, Errand[A]], workers: int) -> Iterator[Iterator[tuple[int, A]]]:
    # Read by the processes to come. The arrays are small: more threads would only get in each other's way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(min(workers, len(errands)), get_context("spawn")) as pool:
        waiting = {pool.submit(errand.work): n for n, errand in errands.items()}
        try:
            yield ((waiting[done], done.result()) for done in as_completed(waiting))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _elsewhere(errands: Mapping[int, Errand[A]], scheduler: str) -> Iterator[Iterator[tuple[int, A]]]:
    from distributed import Client  # noqa: PLC0415 - optional, and slow to import
    from distributed import as_completed as finished  # noqa: PLC0415

    with Client(scheduler, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        others = {version for version in client.run(_version).values() if version != __version__}
        if others:
            raise OSError(
                f"the workers of {scheduler} have Cotenant {', '.join(sorted(map(str, others)))}, and this is"
                f" {__version__}: install the same there"
            )
        sent: dict[tuple[Path, ...], Any] = {}
        for errand in errands.values():
            if errand.inputs not in sent:
                sent[errand.inputs] = client.scatter([path.read_bytes() for path in errand.inputs])
        waiting = {
            client.submit(_with_copies, errand, sent[errand.inputs], pure=False): n for n, errand in errands.items()
        }
        done = finished(list(waiting), loop=client.loop)  # type: ignore[no-untyped-call]
        yield ((waiting[one], one.result()) for one in done)


def _version() -> str:
    return __version__


def _with_copies(errand: Errand[A], contents: Sequence[bytes]) -> A:
    """Do an errand where its files are not, on copies of them."""
    with TemporaryDirectory() as folder:
        copies = {}
        for n, (path, content) in enumerate(zip(errand.inputs, contents, strict=True)):
            copies[path] = Path(folder) / f"{n}-{path.name}"
            copies[path].write_bytes(content)
        return errand.at(copies).work()
