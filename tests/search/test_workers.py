"""Drift measured in other processes is the same drift, and a worker that dies costs what it was at."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import ffnfold.search.scoring as scoring
import ffnfold.search.workers as workers_module
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.search.candidates import Candidate
from ffnfold.search.delivery import pack, unpacked
from ffnfold.search.scoring import Bench, Setting, bench_of, score_several
from ffnfold.search.workers import cluster, local_pool, run_tasks, tasks_of

WANTED = {unit: [Candidate(form="int8"), Candidate(64), Candidate(0), Candidate(ratio=0.5)] for unit in range(3)}
DEADLY = """
import os, pathlib
marker = pathlib.Path(__file__).with_name("died")
def once(ours, theirs, feed):
    try:
        marker.touch(exist_ok={always})
    except FileExistsError:
        return 0.0
    os._exit(7)
"""


@pytest.fixture
def setting(model, feeds) -> Setting:
    return Setting(model, feeds, "cpu", 1)


@pytest.fixture
def alone(setting):
    """What one process measures."""
    bench = Bench(setting)
    return {(unit, each): measured(bench.score(unit, each)) for unit, several in WANTED.items() for each in several}


def measured(scored):
    """Without the time that it took."""
    assert scored["seconds"] >= scored["moments"] >= 0
    return {key: value for key, value in scored.items() if key not in ("seconds", "moments")}


def collect(setting, tasks, pool):
    found = {}
    run_tasks(tasks, setting, pool, lambda unit, each, scored: found.update({(unit, each): measured(scored)}))
    return found


def assert_same(found, alone, rel=1e-6):
    """The same numbers, up to the rounding of other numbers of threads in the linear algebra (Dask's workers have one)."""
    if isinstance(alone, dict):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            assert_same(found[key], value, rel)
    else:
        assert found == (pytest.approx(alone, rel=rel) if isinstance(alone, float) else alone)


@pytest.mark.parametrize(("workers", "parts"), [(1, 3), (3, 3), (4, 6), (7, 6), (12, 12), (100, 12)])
def test_there_is_work_for_every_worker_and_every_candidate_once(workers, parts):
    tasks = tasks_of(WANTED, workers)
    assert len(tasks) == parts
    assert sorted((unit, str(each)) for unit, several in tasks for each in several) == sorted(
        (unit, str(each)) for unit, several in WANTED.items() for each in several)


@pytest.mark.timeout(200)
def test_processes_measure_what_one_process_measures(setting, alone):
    assert collect(setting, tasks_of(WANTED, 2), lambda: local_pool(2)) == alone


@pytest.mark.timeout(200)
def test_what_a_dead_process_was_at_runs_again(setting, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY.format(always=False))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = {unit: several[:1] for unit, several in WANTED.items()}
    dying = Setting(setting.model, setting.data, "cpu", 1, score="deadly:once")
    opened: list[ProcessPoolExecutor] = []

    def pool():
        opened.append(local_pool(2))
        return opened[-1]

    found = collect(dying, tasks_of(wanted, 2), pool)
    assert set(found) == {(unit, each) for unit, several in wanted.items() for each in several}
    assert (tmp_path / "died").exists()
    assert len(opened) == 2


@pytest.mark.timeout(200)
def test_what_kills_every_process_is_given_up_in_one_line(setting, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY.format(always=True))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    dying = Setting(setting.model, setting.data, "cpu", 1, score="deadly:once")
    with pytest.raises(InputError, match="workers die at block 0"):
        collect(dying, [(0, [Candidate(form="int8")])], lambda: local_pool(1))


def test_a_worker_gives_up_moments_that_are_late_and_what_comes_after(setting, monkeypatch):
    """By its own clock, from when it began."""
    bench_of(setting)
    clock = itertools.count(1000.0)  # a second each time that it is looked at: before each candidate, and after each feed
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(clock))
    several = [Candidate(form="int8"), Candidate(0), Candidate(64)]
    assert [each for each, _ in score_several(setting, 1, several, 4.5)] == several[:1]
    assert [each for each, _ in score_several(setting, 1, several, 1.5)] == several[:1]  # no moments to begin
    assert score_several(setting, 1, several, 0.5) == []
    assert [each for each, _ in score_several(setting, 1, several)] == several


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_what_ends_soon_after_the_limit_counts_and_nothing_begins_after_it(setting, monkeypatch, at_once):
    """Task 0 ends at 45 of 40 seconds, those beside it later."""
    clock, begun, measured = [0.0], [], []
    all_begun, told = threading.Barrier(at_once or 3), threading.Event()

    def slow(setting, unit, several, left):
        begun.append((unit, left))
        all_begun.wait(30)
        if unit:
            told.wait(30)
            time.sleep(0.2)
        clock[0] = 45.0
        return [(each, {}) for each in several]

    def done(unit, each, scored):
        measured.append(unit)
        told.set()

    monkeypatch.setattr(workers_module, "score_several", slow)
    monkeypatch.setattr(workers_module.time, "monotonic", lambda: clock[0])
    run_tasks([(unit, [Candidate(0)]) for unit in range(3)], setting, lambda: ThreadPoolExecutor(3), done, 40.0,
              None if at_once is None else lambda: at_once)
    assert sorted(measured) == list(range(at_once or 3))
    assert sorted(begun) == [(unit, 40.0) for unit in range(at_once or 3)]


def test_a_task_begins_with_the_seconds_that_are_left_then(setting, monkeypatch):
    clock, begun = [0.0], []

    def slow(setting, unit, several, left):
        begun.append((unit, left))
        clock[0] += 15.0
        return []

    monkeypatch.setattr(workers_module, "score_several", slow)
    monkeypatch.setattr(workers_module.time, "monotonic", lambda: clock[0])
    run_tasks([(unit, [Candidate(0)]) for unit in range(4)], setting, lambda: ThreadPoolExecutor(1), lambda *found: None, 40.0,
              lambda: 1)
    assert begun == [(0, 40.0), (1, 25.0), (2, 10.0)]


def test_what_does_not_end_is_left_behind(setting, monkeypatch):
    monkeypatch.setattr(workers_module, "_GRACE", 0.05)
    going, measured = threading.Event(), []

    def slow(setting, unit, several, left):
        if unit:
            going.wait(30)
        return [(each, {}) for each in several]

    class Leaving(ThreadPoolExecutor):
        def __exit__(self, *error):
            going.set()  # here run_tasks no longer waits
            return super().__exit__(*error)

    monkeypatch.setattr(workers_module, "score_several", slow)
    run_tasks([(unit, [Candidate(0)]) for unit in range(2)], setting, lambda: Leaving(2),
              lambda unit, each, scored: measured.append(unit), time.monotonic() + 0.5)
    assert measured == [0]


def test_nobody_at_the_address_is_one_line(setting):
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="nobody answers there"), cluster("tcp://127.0.0.1:1", setting):
        pass


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cluster_of_which_a_worker_is_killed_measures_what_one_process_measures(setting, alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=4, threads_per_worker=1, processes=True, dashboard_address=None,
                                  local_directory=str(tmp_path / "dask")) as local:
        victim = next(iter(local.workers.values())).process.pid
        with cluster(local.scheduler_address, setting) as (pool, workers, sent):
            assert workers() == 4
            killed = threading.Timer(3.0, os.kill, (victim, signal.SIGKILL))
            killed.start()
            assert_same(collect(sent, tasks_of(WANTED, 12), pool), alone)
            killed.join()
        limit = time.monotonic() + 60
        while Path(f"/proc/{victim}").exists() and time.monotonic() < limit:
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_that_see_no_files_get_them(setting, alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                  local_directory=str(tmp_path / "dask")) as local, \
            distributed.Client(local.scheduler_address) as client:
        archive = pack(setting.model, setting.data, tmp_path)
        client.upload_file(str(archive), load=False)
        workers = list(client.scheduler_info()["workers"])
        assert len(workers) == 2
        for worker in workers:
            task = client.submit(unpacked, archive.name, setting.model.name, workers=[worker], pure=False)
            model, feeds = task.result()
            assert model.read_bytes() == setting.model.read_bytes()
            assert {file.name: file.read_bytes() for file in feeds.iterdir()} == {
                file.name: file.read_bytes() for file in setting.data.iterdir()}
        away = Setting(tmp_path / "nowhere" / "model.onnx", tmp_path / "nowhere" / "feeds", "cpu", 1, archive=archive.name)
        assert_same(collect(away, tasks_of(WANTED, 2), client.get_executor), alone)
