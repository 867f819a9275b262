"""Drift block by block: alone, in the chain, and which block is the worst."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, transformer
from ffnfold import InputError, Model, optimize, verify
from ffnfold.passes.proof.per_block import drift_per_block, ranked
from ffnfold.runtime import Feeds, open_session
from onnx import numpy_helper

SHAPE = (2, 6, 8)


@pytest.fixture
def feeds():
    random = np.random.default_rng(3)
    return Feeds.of([{"x": random.standard_normal(SHAPE).astype(np.float32)} for _ in range(3)])


def rewritten(path, plan, feeds=None):
    model = Model.load(path)
    optimize(model, plan, feeds)
    model.save(path.parent / "out.onnx")
    return Model.load(path.parent / "out.onnx")


def outputs_of(model, feeds, name="y"):
    session = open_session(model)
    return np.concatenate([session.run(feed)[name].reshape(-1) for feed in feeds]).astype(np.float64)


def rel_l2(before, after):
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def by_block(path, candidate, feeds, **options):
    return {each.block: each for each in drift_per_block(Model.load(path), candidate, feeds, **options)}


def test_a_block_alone_is_the_model_with_that_block_rewritten(tmp_path, feeds):
    path = transformer(4, activation="gelu").save(tmp_path / "model.onnx")
    before = outputs_of(path, feeds)
    found = by_block(path, rewritten(path, ["quantize-ffn"]), feeds)
    for index in range(4):
        expected = rel_l2(before, outputs_of(rewritten(path, [f"quantize-ffn:blocks={index}"]), feeds))
        assert found[index].alone["y"]["rel_l2"] == pytest.approx(expected, rel=0.02)


def test_the_chain_is_the_model_rewritten_so_far_and_ends_at_the_whole(tmp_path, feeds):
    path = transformer(4, activation="gelu").save(tmp_path / "model.onnx")
    before = outputs_of(path, feeds)
    candidate = rewritten(path, ["quantize-ffn"])
    found = by_block(path, candidate, feeds)
    for index in range(4):
        expected = rel_l2(before, outputs_of(rewritten(path, [f"quantize-ffn:blocks=0-{index}"]), feeds))
        assert found[index].chain["y"]["rel_l2"] == pytest.approx(expected, rel=0.02)
    assert found[0].alone["y"]["rel_l2"] == found[0].chain["y"]["rel_l2"]
    assert sum(each.added["y"] for each in found.values()) == pytest.approx(found[3].chain["y"]["rel_l2"])
    assert found[3].chain["y"]["rel_l2"] == pytest.approx(rel_l2(before, outputs_of(candidate, feeds)), rel=1e-3)


def test_what_was_not_rewritten_has_not_moved_at_all(tmp_path, feeds):
    path = transformer(3, activation="gelu").save(tmp_path / "model.onnx")
    found = by_block(path, rewritten(path, ["quantize-ffn:blocks=1"]), feeds)
    for index in (0, 2):
        assert (found[index].own["max_abs"], found[index].alone["y"]["max_abs"], found[index].added["y"]) == (0, 0, 0)
    assert found[1].alone["y"]["max_abs"] > 0
    assert found[2].chain["y"] == found[1].chain["y"]


@pytest.mark.parametrize("worst", [0, 2, 4])
def test_a_damaged_block_ranks_first(tmp_path, feeds, worst):
    path = transformer(5, activation="gelu").save(tmp_path / "model.onnx")
    rewritten(path, [f"quantize-ffn:blocks={'+'.join(str(each) for each in range(5) if each != worst)}"])
    damaged = onnx.load(tmp_path / "out.onnx")
    name = next(node.input[1] for node in damaged.graph.node if node.name == f"/layer.{worst}/ffn/down/MatMul")
    tensor = next(each for each in damaged.graph.initializer if each.name == name)
    weight = numpy_helper.to_array(tensor)
    noise = 0.1 * weight.std() * np.random.default_rng(0).standard_normal(weight.shape)
    tensor.CopyFrom(numpy_helper.from_array((weight + noise).astype(np.float32), name))
    onnx.save(damaged, tmp_path / "damaged.onnx")
    entries = ranked(drift_per_block(Model.load(path), Model.load(tmp_path / "damaged.onnx"), feeds))
    assert [each["block"] for each in entries] == [0, 1, 2, 3, 4]
    assert sorted(each["rank"] for each in entries) == [1, 2, 3, 4, 5]
    assert next(each["block"] for each in entries if each["rank"] == 1) == worst


@pytest.mark.parametrize("blocks", ["1", "1+2", "0+3", "0-3"])
@pytest.mark.parametrize("keep", ["nothing", "mean"])
def test_blocks_that_were_taken_out(tmp_path, feeds, blocks, keep):
    path = transformer(4).save(tmp_path / "model.onnx")
    before = outputs_of(path, feeds)
    candidate = rewritten(path, [f"remove-ffn:blocks={blocks},keep={keep}"], feeds)
    found, total = by_block(path, candidate, feeds), outputs_of(candidate, feeds)
    gone = {int(each) for each in blocks.split("+")} if "-" not in blocks else {0, 1, 2, 3}
    for index in range(4):
        if index in gone and keep == "nothing":
            expected = rel_l2(before, outputs_of(rewritten(path, [f"remove-ffn:blocks={index},keep=nothing"]), feeds))
            assert found[index].alone["y"]["rel_l2"] == pytest.approx(expected, rel=1e-4)
        assert (found[index].alone["y"]["rel_l2"] > 0.1) == (index in gone)
    assert found[3].chain["y"]["rel_l2"] == pytest.approx(rel_l2(before, total), rel=1e-4)


def test_a_norm_folded_into_the_block_belongs_to_it(tmp_path, feeds):
    path = transformer(3, activation="gelu").save(tmp_path / "model.onnx")
    found = by_block(path, rewritten(path, ["clean-up", "fold-norm"]), feeds)
    assert all(0 <= each.alone["y"]["rel_l2"] < 1e-6 for each in found.values())


def test_a_block_whose_output_the_model_gives_out(tmp_path, feeds):
    sketch = transformer(2, activation="gelu")
    sketch.output("stream_0", ["batch", "tokens", 8])
    path = sketch.save(tmp_path / "model.onnx")
    found = by_block(path, rewritten(path, ["quantize-ffn"]), feeds)
    assert found[0].alone["stream_0"]["rel_l2"] == pytest.approx(found[0].own["rel_l2"], rel=1e-3)
    assert found[1].alone["stream_0"]["max_abs"] == 0
    assert found[1].chain["stream_0"]["rel_l2"] == found[0].chain["stream_0"]["rel_l2"]


def attended(blocks, seed=0):
    """Blocks in parallel with something that mixes tokens."""
    s = Sketch(seed=seed)
    x = s.input("x", ["batch", "tokens", 8])
    for number in range(blocks):
        normed = s.norm(x, 8)
        mixed = s.linear(s.op("ReduceMean", normed, axes=[1], keepdims=1), 8, 8)
        both = s.op("Add", mixed, s.ffn(normed, 8, 32, activation="gelu", name=f"/layer.{number}/ffn"))
        x = s.op("Add", x, both)
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", 8]))
    return s


def test_blocks_in_parallel_with_attention(tmp_path, feeds):
    path = attended(3).save(tmp_path / "model.onnx")
    before = outputs_of(path, feeds)
    found = by_block(path, rewritten(path, ["quantize-ffn"]), feeds)
    assert len(found) == 3
    for index in range(3):
        expected = rel_l2(before, outputs_of(rewritten(path, [f"quantize-ffn:blocks={index}"]), feeds))
        assert found[index].alone["y"]["rel_l2"] == pytest.approx(expected, rel=0.02)


def test_experts_that_share_an_exit_are_told_apart(tmp_path, feeds):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", 8])
    experts = [s.ffn(x, 8, 32, activation="gelu", name=f"/expert.{number}") for number in range(3)]
    total = s.op("Add", s.op("Add", experts[0], experts[1]), experts[2])
    s.op("Add", x, total, out=s.output("y", ["batch", "tokens", 8]))
    path = s.save(tmp_path / "model.onnx")
    found = by_block(path, rewritten(path, ["quantize-ffn:blocks=1"]), feeds)
    assert [found[index].alone["y"]["rel_l2"] > 0 for index in range(3)] == [False, True, False]


def test_a_float16_candidate(tmp_path, feeds):
    path = transformer(2, activation="relu").save(tmp_path / "model.onnx")
    half = onnx.load(path)
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    first = half.graph.input[0].name
    for node in half.graph.node:
        for index, name in enumerate(node.input):
            if name == first:
                node.input[index] = "x_half"
        for index, name in enumerate(node.output):
            if name == "y":
                node.output[index] = "y_half"
    half.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["x_half"], to=onnx.TensorProto.FLOAT16))
    half.graph.node.append(onnx.helper.make_node("Cast", ["y_half"], ["y"], to=onnx.TensorProto.FLOAT))
    onnx.save(half, tmp_path / "half.onnx")
    found = by_block(path, Model.load(tmp_path / "half.onnx"), feeds)
    for each in found.values():
        assert 1e-6 < each.alone["y"]["rel_l2"] < 1e-2


def test_blocks_that_cannot_be_found_in_the_candidate_say_so(tmp_path, feeds):
    path = transformer(2).save(tmp_path / "model.onnx")
    renamed = onnx.load(path)
    for node in renamed.graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                if name not in ("x", "y") and all(name != each.name for each in renamed.graph.initializer):
                    values[index] = f"other_{name}"
    onnx.save(renamed, tmp_path / "other.onnx")
    entries = ranked(drift_per_block(Model.load(path), Model.load(tmp_path / "other.onnx"), feeds))
    assert entries[0]["rank"] is None
    assert "has no value 'stream_0'" in entries[0]["reason"]


def test_a_block_of_another_shape_leaves_the_others(tmp_path, feeds):
    path = transformer(3).save(tmp_path / "model.onnx")
    other = onnx.load(path)
    node = next(node for node in other.graph.node if list(node.output) == ["stream_0"])
    node.output[0] = "before"
    other.graph.node.append(onnx.helper.make_node("Unsqueeze", ["before", "zero"], ["stream_0"]))
    other.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "zero"))
    reader = next(node for node in other.graph.node if "y" in node.output)
    reader.input[0] = "flat"
    other.graph.node.append(onnx.helper.make_node("Squeeze", ["stream_2", "zero"], ["flat"]))
    onnx.save(other, tmp_path / "other.onnx")
    entries = ranked(drift_per_block(Model.load(path), Model.load(tmp_path / "other.onnx"), feeds))
    assert [each["rank"] for each in entries] == [None, None, None]
    assert "the candidate [1, 2, 6, 8]" in entries[0]["reason"]


def test_a_block_that_gives_infinities_ranks_first(tmp_path, feeds):
    path = transformer(3).save(tmp_path / "model.onnx")
    broken = onnx.load(path)
    name = next(node.input[1] for node in broken.graph.node if node.name == "/layer.1/ffn/down/MatMul")
    tensor = next(each for each in broken.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.full((32, 8), np.inf, np.float32), name))
    onnx.save(broken, tmp_path / "broken.onnx")
    entries = ranked(drift_per_block(Model.load(path), Model.load(tmp_path / "broken.onnx"), feeds))
    assert [each["rank"] for each in entries] == [2, 1, 3]
    assert entries[1]["alone"]["y"]["rel_l2"] is None


def test_no_feeds_is_said(tmp_path):
    path = transformer(1).save(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="no feeds"):
        drift_per_block(Model.load(path), Model.load(path), Feeds.of([]))


def test_the_whole_drift_is_that_of_verify(tmp_path, feeds):
    path = transformer(3, activation="gelu").save(tmp_path / "model.onnx")
    candidate = rewritten(path, ["quantize-ffn"])
    total = verify(path, candidate, feeds).outputs["y"]["rel_l2"]
    assert by_block(path, candidate, feeds)[2].chain["y"]["rel_l2"] == pytest.approx(total, rel=1e-3)
