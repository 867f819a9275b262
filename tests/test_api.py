"""The Python API, as the root package gives it."""

from __future__ import annotations

import hashlib

import ffnfold
import numpy as np
import onnx
import pytest
import yaml
from feed_files import write_feeds
from ffn_graphs import run, transformer
from ffnfold.passes.optimize import Job, optimize_file

FEED = {"x": np.random.default_rng(1).standard_normal((2, 16, 8)).astype(np.float32)}


@pytest.fixture
def path(tmp_path):
    return transformer(3, activation="gelu").save(tmp_path / "model.onnx")


def test_every_public_name_is_there():
    for name in ffnfold.__all__:
        assert getattr(ffnfold, name) is not None
    assert set(ffnfold.__all__) <= set(dir(ffnfold))
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = ffnfold.optimise


def test_load_find_optimize_save_verify(tmp_path, path):
    model = ffnfold.load(path)
    blocks = ffnfold.find_ffn_blocks(model)
    assert [(block.index, block.d_model, block.d_ff, block.activation.name) for block in blocks] == [
        (index, 8, 32, "gelu") for index in range(3)]
    results = ffnfold.optimize(model, ["fold-bias", "quantize-ffn:blocks=0+2"])
    assert [result.name for result in results] == ["fold-bias", "quantize-ffn"]
    assert results[1].fired == 2
    model.save(tmp_path / "out.onnx")
    drift = ffnfold.verify(path, tmp_path / "out.onnx", [FEED], max_drift=["cosine_mean=0.99"])
    assert drift
    assert 0 < drift.outputs["y"]["rel_l2"] < 0.02


def test_the_saved_model_says_where_it_comes_from_as_that_of_the_command_line_does(tmp_path, path):
    plan = ffnfold.Plan.parse(["clean-up", "quantize-ffn:blocks=0+2"])
    optimize_file(Job(path, tmp_path / "command.onnx", plan, verify=False))
    model = ffnfold.load(path)
    ffnfold.optimize(model, plan)
    model.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "command.onnx").read_bytes()
    entries = {each.key: each.value for each in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert entries == {"ffnfold.version": ffnfold.__version__, "ffnfold.plan": plan.to_yaml(),
                       "ffnfold.input_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_plans_that_follow_each_other_are_written_in_order_with_the_first_input(tmp_path, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = ffnfold.load(path)
    for texts in (["remove-ffn:blocks=1,keep=nothing"], ["drop-neurons"], ["linearize-ffn:blocks=0"]):  # the second does nothing
        ffnfold.optimize(model, texts, ffnfold.Feeds.of([FEED] * 4, synthetic=True))
        model.save(path)
    entries = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert ffnfold.Plan.from_entries(yaml.safe_load(entries["ffnfold.plan"])) == ffnfold.Plan.parse(
        ["remove-ffn:blocks=1,keep=nothing", "linearize-ffn:blocks=0"])
    assert (entries["ffnfold.feeds"], entries["ffnfold.input_sha256"]) == ("synthetic", digest)


def test_a_model_that_no_pass_touched_is_saved_as_it_was(tmp_path, path):
    model = ffnfold.load(path)
    ffnfold.optimize(model, ["quantize-ffn:blocks=none"])
    model.save(tmp_path / "out.onnx")
    assert not onnx.load(tmp_path / "out.onnx").metadata_props


def test_paths_may_be_texts(tmp_path, path):
    model = ffnfold.load(str(path))
    ffnfold.optimize(model, ["quantize-ffn"])
    model.save(str(tmp_path / "out.onnx"))
    assert ffnfold.verify(str(path), str(tmp_path / "out.onnx"), str(write_feeds(tmp_path / "feeds", 2))).samples == 2


def test_a_model_can_be_verified_before_it_is_saved(path):
    model = ffnfold.load(path)
    ffnfold.optimize(model, ["quantize-ffn"])
    drift = ffnfold.verify(path, model, [FEED])
    assert 0 < drift.outputs["y"]["rel_l2"] < 0.02


def test_a_limit_that_is_missed_makes_it_false(path):
    model = ffnfold.load(path)
    ffnfold.optimize(model, ["remove-ffn:keep=nothing"])
    drift = ffnfold.verify(path, model, [FEED], max_drift=["cosine_mean=0.9999"])
    assert not drift
    assert "cosine_mean of 'y'" in drift.missed[0]


@pytest.mark.parametrize("kind", ["texts", "plan", "file"])
def test_a_plan_in_three_forms(tmp_path, path, kind):
    texts = ["remove-ffn:blocks=1,keep=nothing"]
    plan = ffnfold.Plan.parse(texts)
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml())
    (result,) = ffnfold.optimize(ffnfold.load(path), {"texts": texts, "plan": plan, "file": file}[kind])
    assert result.fired == 1


@pytest.mark.parametrize("kind", ["arrays", "feeds", "folder"])
def test_feeds_in_three_forms(tmp_path, path, kind):
    folder = write_feeds(tmp_path / "feeds", 8)
    model = ffnfold.load(path)
    arrays = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    feeds = {"arrays": arrays, "feeds": ffnfold.Feeds.of(arrays), "folder": folder}[kind]
    (result,) = ffnfold.optimize(model, ["linearize-ffn"], feeds)
    assert result.fired == 3


def test_errors_are_input_errors(tmp_path, path):
    with pytest.raises(ffnfold.InputError, match="no such file"):
        ffnfold.load(tmp_path / "missing.onnx")
    model = ffnfold.load(path)
    for plan, said in ((["melt-ffn"], "no pass 'melt-ffn'"), (["quantize-ffn:blocks=5"], "no block 5"),
                       (["linearize-ffn"], "needs real inputs")):
        with pytest.raises(ffnfold.InputError, match=said):
            ffnfold.optimize(model, plan)


def test_what_is_refused_before_it_runs_leaves_the_model(path):
    model = ffnfold.load(path)
    before = model.to_proto()[0].SerializeToString(deterministic=True)
    with pytest.raises(ffnfold.InputError):
        ffnfold.optimize(model, ["quantize-ffn", "remove-ffn:blocks=9,keep=nothing"])
    assert model.to_proto()[0].SerializeToString(deterministic=True) == before


def test_the_package_says_it_is_typed():
    from importlib.resources import files

    assert files("ffnfold").joinpath("py.typed").is_file()


def test_saving_over_the_input(path):
    before = run(path, FEED)
    model = ffnfold.load(path)
    ffnfold.optimize(model, ["fold-bias", "quantize-ffn"])
    model.save(path)
    after = run(path, FEED)
    assert np.abs(after["y"] - before["y"]).max() < 0.1


@pytest.mark.parametrize("none", [[], ffnfold.Feeds.of([]), None])
def test_no_feeds_at_all_are_missing_feeds(path, none):
    with pytest.raises(ffnfold.InputError, match="needs real inputs"):
        ffnfold.optimize(ffnfold.load(path), ["linearize-ffn"], none)
    assert len(ffnfold.optimize(ffnfold.load(path), ["remove-ffn:keep=nothing"], none)) == 1
