"""A run that was killed and started again with --cache goes on from the blocks it had, to the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from ffn_graphs import transformer
from ffnfold.cli import main
from ffnfold.passes.optimize import Job, optimize_file
from ffnfold.passes.plan import Plan
from ffnfold.runtime import Scatter
from rewriting import feeds_of

D = 8


class KilledError(Exception):
    pass


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Rows that went into moments."""
    rows: list[int] = []
    plain = Scatter.update

    def update(self, *groups, weights=None):
        rows.append(len(groups[0]))
        plain(self, *groups, weights=weights)

    monkeypatch.setattr(Scatter, "update", update)
    return rows


def write(folder: Path, seed: int = 11) -> Path:
    onnx.save_model(transformer(3).model(), folder / "model.onnx")
    feeds = folder / "feeds"
    feeds.mkdir(exist_ok=True)
    for number, feed in enumerate(feeds_of((4, 8, D), 12, seed=seed)):
        np.savez(feeds / f"{number:02d}.npz", **feed)
    return feeds


def job(folder: Path, plan: str, cache: bool = True) -> Job:
    return Job(folder / "model.onnx", folder / "out.onnx", Plan.parse([plan]), data=folder / "feeds", threads=1, verify=False,
               cache=folder / "cache" if cache else None)


def killed_at(text: str):
    def progress(message: str) -> None:
        if text in message:
            raise KilledError
    return progress


PLANS = pytest.mark.parametrize("plan", ["slim-ffn:keep=0.5,multiple=8", "linearize-ffn", "linearize-ffn:blocks=0,refine=0",
                                         "linearize-ffn:blocks=0,refine=2",
                                         "remove-ffn:keep=rank",
                                         "slim-ffn:keep=0.5,multiple=8,spread=sensitivity"])


@PLANS
def test_it_goes_on_to_the_same_bytes(tmp_path, plan, counted):
    write(tmp_path)
    optimize_file(job(tmp_path, plan, cache=False))
    whole, expected = sum(counted), (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "out.onnx").unlink()
    counted.clear()
    with pytest.raises(KilledError):
        optimize_file(job(tmp_path, plan), killed_at("block 2"))
    before = sum(counted)
    assert 0 < before < whole
    assert not (tmp_path / "out.onnx").exists()
    counted.clear()
    optimize_file(job(tmp_path, plan))
    assert sum(counted) == whole - before
    assert (tmp_path / "out.onnx").read_bytes() == expected
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_feeds_or_another_plan_begin_anew(tmp_path, counted):
    write(tmp_path)
    plan = "linearize-ffn"
    optimize_file(job(tmp_path, plan, cache=False))
    whole = sum(counted)
    with pytest.raises(KilledError):
        optimize_file(job(tmp_path, plan), killed_at("block 2"))
    counted.clear()
    optimize_file(job(tmp_path, "linearize-ffn:target=block"))
    assert sum(counted) == whole
    write(tmp_path, seed=12)
    counted.clear()
    optimize_file(job(tmp_path, plan))
    assert sum(counted) == whole
    assert len(list((tmp_path / "cache").iterdir())) == 1  # of the run that was killed


def test_what_is_damaged_is_measured_again(tmp_path, counted):
    write(tmp_path)
    optimize_file(job(tmp_path, "linearize-ffn", cache=False))
    whole, expected = sum(counted), (tmp_path / "out.onnx").read_bytes()
    with pytest.raises(KilledError):
        optimize_file(job(tmp_path, "linearize-ffn"), killed_at("block 2"))
    [run] = (tmp_path / "cache").iterdir()
    for file in run.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    counted.clear()
    optimize_file(job(tmp_path, "linearize-ffn"))
    assert sum(counted) == whole
    assert (tmp_path / "out.onnx").read_bytes() == expected


def test_from_the_command_line(tmp_path):
    write(tmp_path)
    (tmp_path / "file").write_text("")
    words = ["optimize", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.onnx"), "-p", "linearize-ffn", "--data",
             str(tmp_path / "feeds"), "--no-verify"]
    done = CliRunner().invoke(main, [*words, "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.onnx").exists()
    assert list((tmp_path / "cache").iterdir()) == []
    failed = CliRunner().invoke(main, [*words, "--cache", str(tmp_path / "file")])
    assert failed.exit_code == 2
    assert "cannot be used as a folder" in failed.output + failed.stderr
