"""Where drift is measured: in this process, in processes beside it, or on a Dask cluster; all the same code.

Tasks go to whatever has the interface of ``concurrent.futures``. A worker that dies costs the tasks that were on it, which run
again; a task that brings down every worker it meets is given up after a few.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from .candidates import Candidate
from .delivery import pack
from .scoring import Scored, Setting, score_several

Task = tuple[int, list[Candidate]]
_ATTEMPTS = 4
_GRACE = 30.0  # seconds after the limit in which what is in work still counts: one candidate's, whose moments are there


def run_tasks(tasks: Sequence[Task], setting: Setting, pool: Callable[[], Executor],
              done: Callable[[int, Candidate, Scored], None], until: float = math.inf,
              at_once: Callable[[], int] | None = None) -> None:
    """Run ``tasks``, and tell what each candidate gave as soon as its task is over.

    Args:
        pool: opens an executor; called again where all its workers are gone.
        until: when the time is over, by ``time.monotonic()``: nothing more begins, what is in work ends by itself, at the next
            candidate or in the midst of its moments, and counts if that is soon.
        at_once: how many tasks may be given away, so that each begins with the seconds that are left then; None: all.

    Raises:
        InputError: a task failed again and again.
    """
    attempts = [0] * len(tasks)
    waiting = list(range(len(tasks)))
    while waiting and time.monotonic() < until:
        failed = []
        with pool() as executor:
            for number, future in _over(executor, tasks, waiting, setting, until, at_once or (lambda: len(tasks))):
                try:
                    for each, scored in future.result():
                        done(tasks[number][0], each, scored)
                except InputError:
                    raise
                except Exception as error:  # the pool's own word for a worker that is gone; each has another one
                    attempts[number] += 1
                    if attempts[number] >= _ATTEMPTS:
                        raise InputError(f"workers die at block {tasks[number][0]} ({type(error).__name__}): "
                                         "look at their memory, and run fewer in parallel") from None
                    failed.append(number)
        waiting += failed


def _over(executor: Executor, tasks: Sequence[Task], waiting: list[int], setting: Setting, until: float,
          at_once: Callable[[], int]) -> Iterator[tuple[int, Future[Any]]]:
    """Give away what is ``waiting``, first things first, and yield what is over. What could not be given away is still there."""
    futures: dict[Future[Any], int] = {}
    while True:
        room = at_once() - len(futures)
        with suppress(BrokenExecutor):  # what it has fails then
            while waiting and room > 0 and (left := until - time.monotonic()) > 0:
                futures[executor.submit(score_several, setting, *tasks[waiting[0]], left)] = waiting[0]
                del waiting[0]
                room -= 1
        late = None if until == math.inf else max(0.0, until + _GRACE - time.monotonic())
        finished, _ = wait(futures, late, return_when=FIRST_COMPLETED)
        if not finished:
            for future in futures:
                future.cancel()
            return
        for future in sorted(finished, key=lambda future: futures[future]):
            yield futures.pop(future), future


def tasks_of(wanted: dict[int, list[Candidate]], workers: int) -> list[Task]:
    """The candidates of each unit in as many parts as keep ``workers`` busy: parts of a block each need its moments anew."""
    parts = max(1, -(-workers // max(1, len(wanted))))
    tasks = []
    for unit, several in wanted.items():
        size = max(1, -(-len(several) // parts))
        tasks += [(unit, several[start:start + size]) for start in range(0, len(several), size)]
    return tasks


def local_pool(workers: int) -> ProcessPoolExecutor:
    """Processes on this machine."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def cluster(address: str, setting: Setting) -> Iterator[tuple[Callable[[], Executor], Callable[[], int], Setting]]:
    """A Dask cluster: how to open an executor on it, how many workers it has now, and the setting for them.

    Workers that do not see the files of this machine get them once, those that join later too.

    Raises:
        InputError: ``distributed`` is not installed, or nobody answers at ``address``.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise InputError("--scheduler needs Dask: pip install 'ffnfold[cluster]'") from None
    try:
        client = distributed.Client(address, timeout="15s")
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {address}: nobody answers there ({str(error)[:100]}): start one with "
                         "'dask scheduler'") from None
    try:
        there = client.run(os.path.exists, str(setting.model.absolute()))
        if not there:
            raise InputError(f"--scheduler {address}: it has no workers: start some with 'dask worker {address}'")
        setting = dataclasses.replace(setting, model=setting.model.absolute(), data=setting.data.absolute())
        if not all(there.values()):
            with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
                archive = pack(setting.model, setting.data, Path(folder))
                client.upload_file(str(archive), load=False)
                setting = dataclasses.replace(setting, archive=archive.name)

        def workers() -> int:
            try:
                return max(1, len(client.nthreads()))
            except OSError:  # nobody answers now: what is given away says so
                return len(there)

        yield client.get_executor, workers, setting
    finally:
        client.close()
