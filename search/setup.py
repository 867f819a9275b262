"""What a search begins with: the shapes that matter, and what its measurements are kept under."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence

from .. import __version__
from ..graph.errors import InputError
from ..graph.hashes import InputHash
from ..graph.model import Model
from ..passes.fitting.resume import hash_feed
from ..passes.provenance import Provenance
from ..runtime import Feeds, synthetic_feeds
from ..runtime.grid import parse_grid, shape_text
from ..runtime.machine import machine
from ..runtime.specs import input_specs
from .candidates import MEANING
from .job import SearchJob
from .latency import Traffic
from .scoring import Bench

_TIMED = 2  # feeds


def traffic_of(job: SearchJob, model: Model, feeds: Feeds) -> list[Traffic]:
    """The shapes that the latency counts at.

    Raises:
        InputError: a shape that is none, or that the model does not take.
    """
    if not job.shapes:
        return [Traffic("feeds", feeds[:_TIMED])]
    weights, plain = parse_shapes(job.shapes)
    specs = input_specs(model)
    found = []
    for number, point in enumerate(parse_grid(plain)):
        made = synthetic_feeds(specs, point, model=model, provider=job.target)
        found.append(Traffic(shape_text(point), made, weights[number % len(weights)]))
    return found


def parse_shapes(texts: Sequence[str]) -> tuple[list[float], list[str]]:
    """``NAME=8x128*3``: weights in the order of the shapes of the first input, and the texts without them."""
    weights: list[float] = []
    plain = []
    first = ""
    for text in texts:
        found = re.fullmatch(r"(.*?)(?:\*([0-9.]+))?", text, re.DOTALL)
        assert found is not None
        name = found[1].rpartition("=")[0]
        first = first or name
        try:
            weight = float(found[2] or 1)
        except ValueError:
            weight = 0.0
        if weight <= 0:
            raise InputError(f"--shape {text}: the weight behind * must be a number above 0")
        if name == first:
            weights += [weight] * len(parse_grid([found[1]]))
        plain.append(found[1])
    return weights, plain


def identity_of(job: SearchJob, bench: Bench) -> tuple[str, str, Provenance]:
    """The machine in one line, a hash of all that measured drift depends on beside the candidate, and the input itself."""
    facts = machine(job.target, job.threads, False)
    here = " ".join(str(facts[key]) for key in ("cpu", "cores", "gpu", "onnxruntime", "numpy"))
    model = bench.workshop.original
    with contextlib.closing(InputHash(job.model, model.stored.values())) as fingerprint:
        entries = fingerprint.entries()
    depends = (__version__, MEANING, here, sorted(entries.items()), job.target, job.threads, job.perplexity, job.score,
               sorted(bench.yardstick.logits), job.seed)
    digest = hashlib.sha256(repr(depends).encode())
    for feeds in (bench.split.fit, bench.split.choose):
        digest.update(repr(len(feeds)).encode())
        for feed in feeds:
            hash_feed(digest, feed)
    return here, digest.hexdigest()[:32], Provenance(fingerprint)
