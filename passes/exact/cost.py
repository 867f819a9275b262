"""What a rewrite costs or frees in the file."""

from __future__ import annotations

from ...graph.linear import Linear


def released_bytes(*linears: Linear) -> int:
    """Bytes of the weights that nothing reads any more once ``linears`` are gone."""
    sources = {id(linear.source): linear.source for linear in linears if linear.source is not None}
    freed = 0
    for source in sources.values():
        readers = list(source.outputs)
        own = sum(linear.source is source for linear in linears)
        if len(readers) <= own:
            freed += source._values.nbytes
    return freed
