"""Where drift is measured: in this process, in processes beside it, or on a Dask cluster; all the same code.

Tasks go to whatever has the interface of ``concurrent.futures``. A worker that dies costs the tasks that were on it, which run
again; a task that brings down every worker it meets is given up after a few.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from .candidates import Candidate
from .delivery import pack
from .scoring import Scored, Setting, score_several

Task = tuple[int, list[Candidate]]
_ATTEMPTS = 4


def run_tasks(tasks: Sequence[Task], setting: Setting, pool: Callable[[], Executor],
              done: Callable[[int, Candidate, Scored], None], enough: Callable[[], bool] = lambda: False) -> None:
    """Run ``tasks``, and tell what each candidate gave as soon as its task is over.

    Args:
        pool: opens an executor; called again where all its workers are gone.
        enough: whether what has not begun may be left undone.

    Raises:
        InputError: a task failed again and again.
    """
    attempts = [0] * len(tasks)
    waiting = list(range(len(tasks)))
    while waiting and not enough():
        with pool() as executor:
            futures: dict[Future[Any], int] = {executor.submit(score_several, setting, *tasks[number]): number
                                               for number in waiting}
            waiting = []
            for future in _completed(list(futures)):
                number = futures[future]
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
                    waiting.append(number)
                if enough():
                    for other in futures:
                        other.cancel()
                    return


def _completed(futures: list[Future[Any]]) -> Iterator[Future[Any]]:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from sorted(finished, key=futures.index)


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
def cluster(address: str, setting: Setting) -> Iterator[tuple[Callable[[], Executor], int, Setting]]:
    """A Dask cluster: how to open an executor on it, how many workers it has, and the setting for them.

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
        yield client.get_executor, len(there), setting
    finally:
        client.close()
