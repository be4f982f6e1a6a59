"""What namespaces hold and may hold, as rows for people. Pure."""

from collections.abc import Mapping

from extender.inspect.rows import NamespacePage, NamespaceRow
from extender.ledger import Use
from extender.placement.tenants import Tenants


def tenancy(uses: Mapping[str, Use], tenants: Tenants, *, limit: int, after: str, query: str) -> NamespacePage:
    """List namespaces that have limits or whose pods hold anything, by name, those whose name contains *query*."""
    names = sorted(one for one in {*uses, *tenants.named} if query.lower() in one and one > after)
    page = names[:limit]
    return NamespacePage(
        items=tuple(_row(name, uses.get(name, Use()), tenants) for name in page),
        remaining=len(names) - len(page),
        continue_=page[-1] if len(names) > len(page) else "",
    )


def _row(name: str, use: Use, tenants: Tenants) -> NamespaceRow:
    limits = tenants.of(name)
    return NamespaceRow(
        namespace=name,
        pods=use.pods,
        held_bytes=use.bytes,
        limit_bytes=limits.gpu_memory_bytes if limits else None,
        gpus=use.gpus,
        gpu_limit=limits.gpus if limits else None,
        models=limits.models if limits else (),
        isolations=limits.isolations if limits else (),
    )
