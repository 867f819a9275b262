"""The models of the plans on the front: kept in a folder, found again, nothing else left there."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import ffnfold.passes.optimize as optimize
import ffnfold.search.latency as latency
import pytest
from feed_files import write_feeds
from ffn_graphs import transformer
from ffnfold.passes.plan import Plan
from ffnfold.runtime import parse_limit
from ffnfold.search import SearchJob, search_file
from ffnfold.search.front_models import FrontModels
from ffnfold.search.run import Search


def test_what_a_killed_search_left_with_its_front_is_removed_by_the_next(tmp_path):
    code = ("import sys; from pathlib import Path; from ffnfold.search.front_models import FrontModels; "
            "models = FrontModels(Path(sys.argv[1]), 'search', {}, None); print('begun', flush=True); sys.stdin.read()")
    killed, alive = (subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                     for _ in range(2))
    for process in (killed, alive):
        assert process.stdout.readline() == b"begun\n"
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    models = FrontModels(tmp_path, "search", {}, None)
    assert len(list(tmp_path.iterdir())) == 2
    models.close()
    assert len(list(tmp_path.iterdir())) == 1
    alive.communicate()
    FrontModels(tmp_path, "search", {}, None).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_models_on_the_front_are_kept(tmp_path, monkeypatch):
    """Those that optimize would write, under names that a second search finds them by."""
    monkeypatch.setattr(latency, "_MOST_ROUNDS", 15)
    monkeypatch.setattr(optimize, "race", partial(optimize.race, seconds=0.1))
    model, data = transformer(1, 64, 256, activation="gelu").save(tmp_path / "model.onnx"), tmp_path / "feeds"
    write_feeds(data, 6, (4, 32, 64))
    job = SearchJob(model, tmp_path / "out.onnx", data, threads=1, cache=tmp_path / "cache", minutes=2,
                    front=tmp_path / "front", limits=[parse_limit("cosine_mean=0.97")])
    front = search_file(job)["front"]
    files = sorted(Path(point["model"]) for point in front)
    assert len(files) > 1
    assert sorted((tmp_path / "front").iterdir()) == files
    for point in front:
        plan = Plan.from_entries(point["plan"])
        optimize.optimize_file(optimize.Job(model, tmp_path / "again.onnx", plan, data=data, threads=1, verify=False))
        assert Path(point["model"]).read_bytes() == (tmp_path / "again.onnx").read_bytes()

    times = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    monkeypatch.setattr(Search, "over", True)
    assert search_file(job)["measured"] == 0
    assert files[0].exists()
    assert all(path.stat().st_mtime_ns == times[path] for path in files[1:])
