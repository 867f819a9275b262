"""The main job: a model file in, a rewritten one out, with what it cost and gained."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..graph.errors import InputError, about
from ..graph.ffn import find_ffn_blocks
from ..graph.hashes import InputHash
from ..graph.model import Model
from ..graph.places import check_file
from ..graph.save import Staged
from ..graph.store import read_model
from ..graph.weights import StoredValues
from ..runtime import Drift, Feeds, Limit, Variant, compare, race, synthetic_feeds
from ..runtime.limits import LOGITS_METRICS
from ..runtime.specs import input_specs
from .base import PassResult
from .fitting.kept_fits import Fits
from .fitting.resume import Resume
from .plan import Plan
from .proof.contributions import Contributions
from .proof.exact_part import ExactPart, moved
from .proof.per_block import drift_per_block
from .proof.verification import BLOCK_FEEDS, Verification, spread
from .provenance import Provenance
from .runner import run_plan
from .split import Split, divide, load_split

_MADE_UP, _MADE_UP_TO_FIT = 4, 36  # synthetic feeds, where they only report and where two thirds of them are fitted to
BLOCK_SECONDS = 60.0
"""About how long all blocks together are compared for a report; where that takes longer, on fewer feeds, but one."""


@dataclass(frozen=True)
class Job:
    """What ``optimize`` is asked to do.

    Attributes:
        model, output: files.
        plan: passes to run.
        data: feeds, or None; synthetic: make some up instead.
        provider, threads: how ONNX Runtime runs.
        use_tf32, allow_cpu: on CUDA, round to TF32; accept nodes that compute on the CPU.
        limits: on the drift; logits: outputs that are logits, besides one called ``logits``.
        strict: write nothing where a limit is missed.
        verify: measure drift (where there are feeds) and speed.
        detailed: also the drift of each block, and the time of each run.
        by_pass: also what each pass contributed.
        cache: where moments are kept, so that the same job, killed and started again, goes on from there; None: nowhere.
        external: weights in a data file; None: as the input has them.
        split: the feeds at ``data``, divided already; None: as the plan needs them.
        fits: fits of single blocks that other plans have made, on the same feeds; None: none.
    """

    model: Path
    output: Path
    plan: Plan
    data: Path | None = None
    synthetic: bool = False
    provider: str = "cpu"
    threads: int | None = None
    use_tf32: bool = False
    allow_cpu: bool = False
    limits: Sequence[Limit] = field(default_factory=tuple)
    logits: Sequence[str] = ()
    strict: bool = False
    verify: bool = True
    detailed: bool = False
    by_pass: bool = False
    cache: Path | None = None
    external: bool | None = None
    split: Split | None = None
    fits: Fits | None = None


def optimize_file(job: Job, progress: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Do ``job``.

    Returns:
        The contract's object of ``optimize``, and ``notes``: sentences for people. Where it was to be ``detailed`` and there
        are feeds, ``details`` holds ``drift``, ``verify``'s object with its blocks, and ``timing``, ``bench``'s object with
        ``times_ms``; and with ``by_pass`` the rows of :meth:`Contributions.measure` as ``contributions``.

    Raises:
        InputError: bad input; nothing is written then.
    """
    check_places(job)
    progress(f"reading {job.model}")
    model = Model.load(job.model)
    check_apart(job.output, model)
    split = _feeds(job, model)
    with contextlib.closing(InputHash(job.model, model.stored.values())) as fingerprint:
        return _rewrite(job, model, split, fingerprint, progress)


def _rewrite(job: Job, model: Model, split: Split | None, fingerprint: InputHash,
             progress: Callable[[str], None]) -> dict[str, Any]:
    fitting = split if job.plan.needs_feeds else None
    exact = ExactPart(model, job.plan, compared=split is not None and job.verify)
    shares = Contributions(model) if job.by_pass and split is not None and job.verify else None
    resume = _resume(job, fitting, fingerprint)

    def after(done: int) -> None:
        exact.after(done)
        if shares is not None:
            shares.after(done)

    results = run_plan(model, job.plan, fit=fitting.fit if fitting else None, choose=fitting.choose if fitting else None,
                       provider=job.provider, threads=job.threads, progress=progress, resume=resume,
                       after=after, fits=job.fits)
    fired = sum(result.fired for result in results)
    progress(f"writing {job.output}")
    if fired:
        model.metadata = Provenance(fingerprint).then(job.plan, fitting)
        with about(job.model, job.output):
            staged = model.stage(job.output, external=job.external)
    else:
        staged = _copy(model, job)
    with staged:
        report = _measure(job, model, results, exact, staged, split, progress)
        if shares is not None and split is not None:
            report["contributions"] = shares.measure(
                job.model, results, spread(split.report), progress, provider=job.provider, threads=job.threads,
                use_tf32=job.use_tf32, allow_cpu=job.allow_cpu)
        report["notes"] += [f"{result.name}: {note}" for result in results for note in result.notes]
        report["notes"] += _notes(job, split, fired, report)
        if report["ok"] or not job.strict:
            staged.commit()
        else:
            report["notes"].append(f"{job.output} was not written (--strict)")
    if resume is not None:
        resume.done()
    return report


def _resume(job: Job, fitting: Split | None, fingerprint: InputHash) -> Resume | None:
    if job.cache is None or fitting is None:
        return None
    identity = {**fingerprint.entries(), "plan": job.plan.to_yaml(), "provider": job.provider, "threads": job.threads}
    return Resume(job.cache, identity, [fitting.fit, fitting.choose])


def check_places(job: Job) -> None:
    """Check before the work that the output can be written, and that there are the feeds that the job needs.

    Raises:
        InputError: it cannot, or there are none.
    """
    check_file(job.output, "the model", [job.data])
    if job.limits and job.data is None and not job.synthetic:
        raise InputError("--max-drift needs inputs to measure on: give --data FEEDS (or --synthetic)")
    for limit in job.limits:
        if limit.metric in LOGITS_METRICS and limit.output not in (None, "logits", *job.logits):
            raise InputError(f"limit on {limit.metric}: it is for outputs that are logits: name them with "
                             f"--logits {limit.output}")
    if job.plan.needs_feeds and job.data is None and job.split is None and not job.synthetic:
        raise InputError(f"the pass '{job.plan.needs_feeds[0]}' needs real inputs with these options: "
                         "give them with --data FEEDS (or --synthetic, to fit to made-up ones)")


def check_apart(output: Path, model: Model) -> None:
    """Check that ``output`` is none of the files that the weights of ``model`` lie in, the model itself aside.

    Raises:
        InputError: it is one.
    """
    if os.path.exists(output) and any(os.path.samefile(output, path) for path in model.data_files):
        raise InputError(f"{output}: holds weights of {model.path}: choose another place for the model")


def _feeds(job: Job, model: Model) -> Split | None:
    if job.split is not None:
        return job.split
    if job.data is not None:
        return load_split(job.data, input_specs(model), bool(job.plan.needs_feeds))
    if job.synthetic:
        fits = bool(job.plan.needs_feeds)
        count = _MADE_UP_TO_FIT if fits else _MADE_UP
        return divide(synthetic_feeds(input_specs(model), model=model, count=count, provider=job.provider), fits)
    return None


def _copy(model: Model, job: Job) -> Staged:
    """The input under another name: byte for byte where its weights are inside."""
    if model.external or job.external:
        return model.stage(job.output, external=job.external)
    staged = Staged(job.output)
    try:
        staged.copy(job.model)
    except BaseException:
        staged.discard()
        raise
    return staged


def _measure(job: Job, model: Model, results: list[PassResult], exact: ExactPart, staged: Staged, split: Split | None,
             progress: Callable[[str], None]) -> dict[str, Any]:
    before = _bytes_on_disk(model)
    after = read_model(staged.temporary).nbytes
    report: dict[str, Any] = {
        "model": str(job.model), "output": str(job.output), "plan": job.plan.entries(),
        "passes": [result.to_json() for result in results], "bytes": {"before": before, "after": after},
        "feeds": split.fit.kind if split is not None and job.plan.needs_feeds else None,
        "drift": None, "speed": None, "ok": True, "equivalence": None, "notes": []}
    if split is None or not job.verify:
        report["equivalence"] = exact.report(job.model, staged.temporary, None)
        return report
    feeds: Feeds = split.report
    report["feeds"] = feeds.kind
    progress("measuring the drift")
    start = time.perf_counter()
    drift = compare(job.model, staged.temporary, feeds, provider=job.provider, threads=job.threads, limits=job.limits,
                    use_tf32=job.use_tf32, allow_cpu=job.allow_cpu,
                    logits=job.logits)
    drift.check_rows()
    each = (time.perf_counter() - start) / len(feeds)
    report["drift"], report["ok"] = drift.to_json(), bool(drift)
    report["notes"] += [f"a limit was missed: {sentence}" for sentence in drift.missed]
    progress("comparing before and after the exact passes")
    report["equivalence"] = exact.report(job.model, staged.temporary, feeds, provider=job.provider, threads=job.threads)
    report["notes"] += moved(report["equivalence"])
    progress("timing")
    variants = [Variant(job.model), Variant(staged.temporary, name=str(job.output))]
    timing = race(variants, feeds, keep_times=job.detailed, provider=job.provider, threads=job.threads, use_tf32=job.use_tf32,
                  allow_cpu=job.allow_cpu)
    report["speed"] = timing["ratios"][-1]
    report["machine"] = timing["machine"]
    if job.detailed:
        report["details"] = {"drift": _by_block(job, staged.temporary, feeds, drift, each, progress), "timing": timing}
    return report


def _by_block(job: Job, candidate: Path, feeds: Feeds, drift: Drift, seconds: float,
              progress: Callable[[str], None]) -> dict[str, Any]:
    """``verify``'s object with its blocks; ``seconds``: what comparing the outputs took for each feed."""
    reference = Model.load(job.model)
    each = seconds * max(1, len(find_ffn_blocks(reference)))
    some = spread(feeds, max(1, min(BLOCK_FEEDS, int(BLOCK_SECONDS / each))))
    blocks = drift_per_block(reference, Model.load(candidate), some, provider=job.provider, threads=job.threads,
                             use_tf32=job.use_tf32, progress=lambda done, total: progress(f"block {done} of {total}"))
    return Verification(drift, blocks, len(some)).to_json()


def _bytes_on_disk(model: Model) -> int:
    """Size of the file that ``model`` was loaded from and of the external data that its tensors use."""
    outside = [each for each in model.stored.values() if isinstance(each, StoredValues) and each.source.path != model.path]
    return os.path.getsize(model.path) + sum(each.nbytes for each in outside)


def _notes(job: Job, split: Split | None, fired: int, report: dict[str, Any]) -> list[str]:
    notes = []
    if not fired:
        notes.append("nothing to do: no pass fired, the model was copied as it is")
    if split is None and job.verify:
        notes.append("no feeds: drift and speed were not measured (give --data FEEDS, or --synthetic)")
    if split is not None and not split.disjoint:
        notes.append("one feed only: what was fitted on it is also reported on it")
    if report["feeds"] == "synthetic":
        notes.append("synthetic feeds: the drift on real inputs may be quite another")
        if job.plan.needs_feeds:
            notes.append("what was fitted to synthetic feeds is right for those: fit to real ones (--data FEEDS) what you ship")
    return notes

