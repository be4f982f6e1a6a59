"""Rows as text: columns as kubectl prints them, and CSV with plain bytes for spreadsheets."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

from cotenant.contract.inventory import Health, Mode
from cotenant.contract.reasons import Reason
from cotenant.contract.units import counted, format_bytes
from extender.inspect.rows import (
    UNEXPLAINED,
    Expected,
    GPURow,
    MixPage,
    NamespacePage,
    NamespaceRow,
    NodePage,
    NodeRow,
    PodExplanation,
    PodPage,
    PodRow,
)

_GAP = "   "
_NODES = ("NODE", "GPU", "MODEL", "MODE", "ALLOCATED", "USED", "FREE", "PODS", "SLOTS", "HEALTH")
_NODES_WIDE = ("UUID", "HELD BY")
# pods on one GPU are that many shares of it, and so may be more than there are GPUs
_NAMESPACES = ("NAMESPACE", "PODS", "MEMORY", "GPU SHARES", "MODELS", "ISOLATION")
_MIX = ("OF PODS", "GPUS", "MEMORY", "CPU", "MODEL")
_PODS = ("NAMESPACE", "POD", "STATE", "NODE", "GPU", "MEMORY", "WHY")
_PODS_WIDE = ("UUID", "ENFORCED BY", "UID")
# as amount() writes them
_AMOUNTS = re.compile(r"(\d) ([KMGT]i)B\b")
# A name from an annotation could carry a line feed, or a sequence that moves a terminal's cursor.
_SHOWN = dict.fromkeys((*range(32), *range(127, 160)), "?")


Page = NodePage | PodPage | NamespacePage | MixPage


def written(page: Page, form: str) -> str:
    """Write a page as csv, table or wide, as *form* says."""
    wide = form == "wide"
    match page:
        case NodePage():
            return nodes_csv(page.items) if form == "csv" else nodes_table(page, wide=wide)
        case PodPage():
            return pods_csv(page.items) if form == "csv" else pods_table(page, wide=wide)
        case NamespacePage():
            return namespaces_csv(page.items) if form == "csv" else namespaces_table(page)
        case MixPage():
            return mix_csv(page.items) if form == "csv" else mix_table(page)


def nodes_table(page: NodePage, *, wide: bool) -> str:
    """Show GPUs, one a line, and the cluster's sum below them."""
    rows = [(*_NODES, *(_NODES_WIDE if wide else ()))]
    for node in page.items:
        rows += [_node_line(node, gpu, wide=wide) for gpu in node.gpus]
        if not node.gpus:
            rows.append((node.node, *("-" * (len(_NODES) - 2)), problem(node), *(("-", "-") if wide else ())))
    total = page.cluster
    sums = f"{amount(total.held_bytes)}/{amount(total.usable_bytes)} ({percent(total.held_bytes, total.usable_bytes)})"
    block = total.largest_free_block_bytes
    largest = "" if block is None else f", largest free block {amount(block)}"
    in_use = f", {amount(total.used_bytes)} in use on the {total.used_gpus} that tell it" if total.used_gpus else ""
    there, waiting = f"{counted(total.nodes, 'node')}, {counted(total.gpus, 'GPU')}", counted(total.waiting, "pod")
    lines = [
        *columns(rows),
        f"CLUSTER: {there}, {sums}{in_use}{largest}, {waiting} waiting",
        *_more(page.remaining, page.continue_, "nodes"),
    ]
    return "\n".join(lines) + "\n"


def pods_table(page: PodPage, *, wide: bool) -> str:
    """Show pods, one a line."""
    rows = [(*_PODS, *(_PODS_WIDE if wide else ())), *(_pod_line(pod, wide=wide) for pod in page.items)]
    lines = [*columns(rows), *_more(page.remaining, page.continue_, "pods")]
    return "\n".join(lines) + "\n" if page.items else "No pods found that ask for GPU memory.\n"


def namespaces_table(page: NamespacePage) -> str:
    """Show what namespaces hold of what they may, one a line."""
    if not page.items:
        return "No namespace has limits, and no pod holds GPU memory.\n"
    rows = [_NAMESPACES, *map(_namespace_line, page.items)]
    return "\n".join([*columns(rows), *_more(page.remaining, page.continue_, "namespaces")]) + "\n"


def namespaces_csv(items: Iterable[NamespaceRow]) -> str:
    """Write what namespaces hold and may hold, amounts in bytes, nothing where there is no limit."""
    rows: list[tuple[object, ...]] = [
        ("namespace", "pods", "held_bytes", "limit_bytes", "gpus", "gpu_limit", "models", "isolations")
    ]
    rows += [
        (
            *(one.namespace, one.pods, one.held_bytes, "" if one.limit_bytes is None else one.limit_bytes),
            *(one.gpus, "" if one.gpu_limit is None else one.gpu_limit),
            *(" ".join(one.models), " ".join(one.isolations)),
        )
        for one in items
    ]
    return _csv(rows)


def _namespace_line(one: NamespaceRow) -> tuple[str, ...]:
    memory = amount(one.held_bytes) + ("" if one.limit_bytes is None else f"/{amount(one.limit_bytes)}")
    gpus = str(one.gpus) + ("" if one.gpu_limit is None else f"/{one.gpu_limit}")
    return one.namespace, str(one.pods), memory, gpus, ",".join(one.models) or "any", ",".join(one.isolations) or "any"


def mix_table(page: MixPage) -> str:
    """Show the pods that policies expect, one kind a line."""
    if not page.items:
        return "No pod of ours has come yet, so policies expect nothing in particular.\n"
    rows = [_MIX, *(_expected_line(kind) for kind in page.items)]
    source = "pinned by the configuration" if page.pinned else "learned from the pods that came last"
    return "\n".join([*columns(rows), f"EXPECTED: {len(page.items)} kinds of pods, {source}"]) + "\n"


def mix_csv(kinds: Iterable[Expected]) -> str:
    """Write the pods that policies expect for a spreadsheet."""
    rows: list[tuple[object, ...]] = [("percent", "gpus", "memory_bytes", "cpu_milli", "models", "alone")]
    rows += [(k.percent, k.gpus, k.memory_bytes, k.cpu_milli, " ".join(k.models), k.alone) for k in kinds]
    return _csv(rows)


def _expected_line(kind: Expected) -> tuple[str, ...]:
    memory = "alone" if kind.alone else amount(kind.memory_bytes)
    cpu = f"{kind.cpu_milli / 1000:g}"
    return f"{kind.percent:.1f} %", str(kind.gpus), memory, cpu, ",".join(kind.models) or "any"


def explanation_table(told: PodExplanation, *, wide: bool = False) -> str:
    """Show why a pod waits: the reasons, what would help, and with *wide* every GPU."""
    pod = told.pod
    asks = f" asks {pod.asks}" if pod.asks else ""
    nowhere = bool(told.reasons) and not told.fitting
    # then the summary counts nothing but the reasons below
    fits = f", fits on none of {sum(count.nodes for count in told.reasons)} GPU nodes" if nowhere else ""
    lines = [plain(f"{pod.key}{asks}: {'simulated' if told.simulated else pod.state}{fits}")]
    if not nowhere:
        lines.append(f"  {plain(told.summary)}")
    for count in told.reasons:
        closest = "best: " if count.reason in {Reason.NO_GPU_FITS, Reason.TOO_LARGE} else ""
        best = f" ({closest}{count.best})" if count.best else ""
        lines.append(plain(f"  {count.nodes} node{'s' if count.nodes != 1 else ''}: {count.sentence}{best}"))
    if told.changes:
        lines.append("  would help:")
        lines += [f"    {plain(change.sentence)}" for change in told.changes]
    if told.kept:
        lines.append("  not to be had:")
        lines += [f"    {plain(one.sentence)}" for one in told.kept]
    if wide and told.nodes:
        rows = [("NODE", "GPU", "MODEL", "FREE", "LACKS", "REASON")]
        for node in told.nodes:
            said = str(node.reason or "fits")
            rows += [
                (node.node, str(g.index), g.model, amount(g.free_bytes), amount(g.shortfall_bytes), g.reason or said)
                for g in node.gpus
            ] or [(node.node, "-", "-", "-", "-", said)]
        lines += ["", *columns(rows), *_more(told.remaining, told.continue_, "nodes")]
    return "\n".join(lines) + "\n"


def nodes_csv(items: Iterable[NodeRow]) -> str:
    """Write GPUs, one a line, amounts in bytes."""
    names = ("node", "gpu", "uuid", "model", "mode", "usable_bytes", "held_bytes", "free_bytes", "pods", "health")
    more = ("problem", "clients", "max_clients", "slots", "used_bytes", "kept_bytes")
    rows: list[tuple[object, ...]] = [(*names, *more)]
    for node in items:
        rows += [
            (
                *(node.node, g.index, g.uuid, g.model, g.mode, g.usable_bytes, g.held_bytes, g.free_bytes),
                *(len(g.holders), g.health, node.problem or ""),
                *(g.clients, g.max_clients, " ".join(f"{one.profile}@{one.start}" for one in g.slots)),
                *("" if g.used_bytes is None else g.used_bytes, sum(one.bytes for one in g.kept)),
            )
            for g in node.gpus
        ] or [(node.node, *[""] * (len(names) - 1), node.problem or "", *[""] * (len(more) - 1))]
    return _csv(rows)


def pods_csv(items: Iterable[PodRow]) -> str:
    """Write what pods hold, one line for each GPU of each, amounts in bytes."""
    rows: list[tuple[object, ...]] = [
        ("namespace", "pod", "uid", "state", "node", "gpu", "uuid", "bytes", "asks", "enforced_by", "reason")
    ]
    for pod in items:
        told = (pod.asks, pod.enforced_by, pod.reason or "")
        shares: list[tuple[object, ...]] = [("" if s.index is None else s.index, s.uuid, s.bytes) for s in pod.gpus]
        shares = shares or [("", "", "")]
        rows += [(pod.namespace, pod.name, pod.uid, pod.state, pod.node, *share, *told) for share in shares]
    return _csv(rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns, three blanks apart."""
    shown = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def slots(gpu: GPURow) -> str:
    """Say how many containers MPS serves on a GPU, or which MIG instances it has; "-" where it has neither."""
    if gpu.mode is Mode.MPS:
        return f"{gpu.clients}/{gpu.max_clients or '-'} clients"
    found = []
    for profile in dict.fromkeys(one.profile for one in gpu.slots):
        alike = [one for one in gpu.slots if one.profile == profile]
        notes = []
        if alike[0].shares > 1:
            notes.append(f"{sum(one.held for one in alike)}/{sum(one.shares for one in alike)} shares")
        elif free := sum(not one.pod and not one.detail for one in alike):
            notes.append(f"{free} free")
        if strange := sum(one.detail == UNEXPLAINED for one in alike):
            notes.append(f"{strange} unexplained")
        if ill := sum(bool(one.detail) for one in alike) - strange:
            notes.append(f"{ill} unwell")
        found.append(f"{len(alike)} x {profile}" + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(found) or "-"


def amount(of_bytes: int) -> str:
    """Write bytes as kubectl does, without a blank: 60Gi, 1.5Gi, 0."""
    return format_bytes(of_bytes).replace(" ", "").removesuffix("B")


def percent(part: int, whole: int) -> str:
    """Write a share, 0% of nothing."""
    return f"{100 * part // whole if whole else 0}%"


def problem(node: NodeRow) -> str:
    """Say what is wrong with a node, with what the plugin or the decoder said of it."""
    return f"{node.problem}: {node.detail}" if node.problem and node.detail else str(node.problem or "no GPUs")


def _node_line(node: NodeRow, gpu: GPURow, *, wide: bool) -> tuple[str, ...]:
    line = (
        node.node,
        str(gpu.index),
        gpu.model,
        str(gpu.mode),
        f"{amount(gpu.held_bytes)}/{amount(gpu.usable_bytes)} ({percent(gpu.held_bytes, gpu.usable_bytes)})",
        "-" if gpu.used_bytes is None else amount(gpu.used_bytes),
        amount(gpu.free_bytes),
        str(len(gpu.holders)),
        slots(gpu),
        problem(node) if node.problem else _state(gpu),
    )
    held = [f"{holder.pod}={amount(holder.bytes)}" for holder in gpu.holders]
    held_by = ", ".join([*held, *(f"kept for {one.pod}={amount(one.bytes)}" for one in gpu.kept)]) or "-"
    return (*line, gpu.uuid, held_by) if wide else line


def _state(gpu: GPURow) -> str:
    """Say how a GPU is, and who else has it."""
    if gpu.health is not Health.HEALTHY:
        return f"{gpu.health}: {gpu.detail}" if gpu.detail else str(gpu.health)
    if gpu.fenced:
        return f"fenced: {gpu.foreign}"
    notes = [f"{amount(gpu.foreign_bytes)} used by others"] if gpu.foreign_bytes else []
    if gpu.kept:
        notes.append(f"{amount(sum(one.bytes for one in gpu.kept))} kept for {', '.join(one.pod for one in gpu.kept)}")
    return ", ".join(["ok", *notes])


def _pod_line(pod: PodRow, *, wide: bool) -> tuple[str, ...]:
    gpus = ",".join("?" if share.index is None else str(share.index) for share in pod.gpus)
    sizes = {share.bytes for share in pod.gpus}
    each = ",".join(amount(share.bytes) for share in pod.gpus)
    memory = f"{len(pod.gpus)} x {amount(sizes.pop())}" if len(sizes) == 1 < len(pod.gpus) else each
    line = (
        pod.namespace,
        pod.name,
        str(pod.state),
        pod.node or "-",
        gpus or "-",
        memory or _AMOUNTS.sub(r"\1\2", pod.asks) or "-",
        pod.sentence or "-",
    )
    uuids = ",".join(share.uuid for share in pod.gpus)
    return (*line, uuids or "-", pod.enforced_by or "-", pod.uid) if wide else line


def _more(remaining: int, after: str, what: str) -> list[str]:
    return [plain(f"... and {remaining} more {what}: ask with continue={after}")] if remaining else []


def plain(text: str) -> str:
    """Put a question mark for each letter that would move a terminal's cursor, or begin a line."""
    return text.translate(_SHOWN)


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # a spreadsheet takes a cell that begins so for a formula
    writer.writerows(
        [f"'{cell}" if str(cell).startswith(("=", "+", "-", "@")) else cell for cell in row] for row in rows
    )
    return text.getvalue()
