"""The functions of the public Python API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .graph.hashes import InputHash
from .graph.model import Model
from .passes.base import PassResult
from .passes.plan import Plan
from .passes.provenance import Provenance
from .passes.runner import run_plan
from .passes.split import divide, load_split
from .runtime import Drift, Feeds, compare, load_feeds, parse_limit
from .runtime.specs import input_specs

AnyPath = str | PathLike[str]


def load(path: AnyPath) -> Model:
    """The model in ``path``; its weights stay in the file.

    Raises:
        InputError: no such file, not an ONNX model, damaged, or external data missing.
    """
    return Model.load(path)


def optimize(model: Model, plan: Plan | Sequence[str] | AnyPath, feeds: Feeds | Sequence[Mapping[str, Any]] | AnyPath |
             None = None, *, provider: str = "cpu", threads: int | None = None,
             progress: Callable[[str], None] = lambda message: None) -> list[PassResult]:
    """Rewrite ``model`` in place; ``model.save(path)`` writes it, with what the command line puts into its metadata.

    Args:
        plan: a Plan, the path of a plan file, or pass texts such as ``"quantize-ffn:blocks=0+3-5"``.
        feeds: real inputs for passes that fit or choose: input name → array, in a sequence, or where such files lie. They
            are divided so that choosing and fitting use different ones.

    Returns:
        What each pass did: how often it fired, and what it refused and why.

    Raises:
        InputError: an unknown pass or option, a block that is not there, or feeds that are missing or do not fit.
    """
    if isinstance(plan, (str, PathLike)):
        plan = Plan.load(Path(plan))
    elif not isinstance(plan, Plan):
        plan = Plan.parse(plan)
    split = None
    if isinstance(feeds, (str, PathLike)):
        split = load_split(Path(feeds), input_specs(model), bool(plan.needs_feeds))
    elif feeds is not None:
        split = divide(feeds if isinstance(feeds, Feeds) else Feeds.of(feeds), bool(plan.needs_feeds))
    known = model.metadata if isinstance(model.metadata, Provenance) else Provenance(InputHash(model.path, model.stored.values()))
    results = run_plan(model, plan, fit=split.fit if split else None, choose=split.choose if split else None,
                       provider=provider, threads=threads, progress=progress)
    if any(result.fired for result in results):
        model.metadata = known.then(plan, split)
    return results


def verify(reference: AnyPath | Model, candidate: AnyPath | Model, feeds: Feeds | Sequence[Mapping[str, Any]] | AnyPath, *,
           max_drift: Sequence[str] = (), logits: Sequence[str] = (), provider: str = "cpu",
           threads: int | None = None) -> Drift:
    """How far ``candidate`` moved from ``reference`` on ``feeds``; true where every limit is met.

    Args:
        max_drift: limits such as ``"cosine_mean=0.999"`` or ``"rel_l2@logits=0.01"``.
        logits: outputs to give KL divergence and top-1 and top-5 agreement for.

    Raises:
        InputError: the two or the feeds do not fit each other, or no feed has a row that is no padding.
    """
    model = reference if isinstance(reference, Model) else Model.load(reference)
    if isinstance(feeds, (str, PathLike)):
        feeds = load_feeds(feeds, input_specs(model))
    elif not isinstance(feeds, Feeds):
        feeds = Feeds.of(feeds)
    drift = compare(reference, candidate, feeds, provider=provider, threads=threads, logits=logits,
                    limits=[parse_limit(text) for text in max_drift])
    drift.check_rows()
    return drift
