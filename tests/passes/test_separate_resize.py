"""separate-resize: two products give what the Resize gave, for all sizes, and what they cannot give is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from onnx import TensorProto, helper
from rewriting import Branch, in_branch, rewrite

CHANNELS, HEIGHT, WIDTH = 8, 9, 7
BATCH = 2
SIZES = [(4, 5), (9, 7), (13, 7), (9, 20), (31, 3), (1, 1)]
INT = TensorProto.INT64


def integers(s: Sketch, *values: int) -> str:
    return s.weight(np.asarray(values, np.int64))


def floats(s: Sketch, *values: float) -> str:
    return s.weight(np.asarray(values, np.float32))


def by_sizes(opset: int = 17, *, shape: Any = (BATCH, CHANNELS, HEIGHT, WIDTH), dtype: Any = np.float32, **attrs: Any) -> Sketch:
    """y: x resized to the height and width in the input ``size``."""
    s = Sketch(opset, dtype=dtype)
    x, size = s.input("x", shape), s.input("size", [2], INT)
    target = s.op("Concat", integers(s, BATCH, CHANNELS), size, axis=0)
    empty = floats(s) if opset < 13 else ""
    s.op("Resize", x, empty, empty, target, out=s.output("y", None), **{"mode": "cubic", **attrs})
    return s


def by_scales(opset: int = 17, **attrs: Any) -> Sketch:
    s = Sketch(opset)
    x, scale = s.input("x", ["b", CHANNELS, "h", "w"]), s.input("scale", [2])
    target = s.op("Concat", floats(s, 1, 1), scale, axis=0)
    s.op("Resize", x, floats(s) if opset < 13 else "", target, out=s.output("y", None), **{"mode": "cubic", **attrs})
    return s


def feed(batch: int = BATCH, height: int = HEIGHT, width: int = WIDTH, **others: Any) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).normal(size=(batch, CHANNELS, height, width)).astype(np.float32), **others}


def check(s: Sketch, folder: Any, feeds: list[dict[str, Any]], bound: float = 1e-5) -> Model:
    model, [result] = rewrite(s, folder, "separate-resize")
    assert (result.fired, result.refused, result.exact) == (1, [], True)
    for each in feeds:
        assert drift(run(s.model(), each), run(model, each)) < bound
    return model


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 19, 21])
def test_sizes_that_are_computed(tmp_path, opset):
    s = by_sizes(opset)
    check(s, tmp_path, [feed(size=np.asarray(size)) for size in SIZES])


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_scales_that_are_computed(tmp_path, opset):
    s = by_scales(opset)
    scales = [(0.5, 0.7), (1.0, 2.3), (2.0, 1.0), (3.3, 0.4)]
    check(s, tmp_path, [feed(batch, 11, 8, scale=np.asarray(scale, np.float32)) for scale in scales for batch in (1, 3)])


@pytest.mark.parametrize("attrs", [
    {"coordinate_transformation_mode": "align_corners"}, {"coordinate_transformation_mode": "asymmetric"},
    {"coordinate_transformation_mode": "pytorch_half_pixel"}, {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}])
def test_the_ways_to_resize(tmp_path, attrs):
    check(by_sizes(**attrs), tmp_path, [feed(size=np.asarray(size)) for size in SIZES])


def test_antialiasing(tmp_path):
    check(by_sizes(18, antialias=1), tmp_path, [feed(size=np.asarray(size)) for size in SIZES])


@pytest.mark.parametrize("axes", [[2, 3], [-2, -1]])
def test_axes_that_are_named(tmp_path, axes):
    s = Sketch(18)
    x, size = s.input("x", ["b", CHANNELS, "h", "w"]), s.input("size", [2], INT)
    s.op("Resize", x, "", "", size, out=s.output("y", None), mode="cubic", axes=axes)
    check(s, tmp_path, [feed(size=np.asarray(size)) for size in SIZES])


def test_images_whose_size_is_computed(tmp_path):
    s = Sketch()
    size = s.input("size", [2], INT)
    table = s.weight(s.numbers(1, HEIGHT * WIDTH, 16))
    side = s.op("Cast", s.op("Sqrt", floats(s, HEIGHT * HEIGHT)), to=INT)
    images = s.op("Transpose", s.op("Reshape", table, s.op("Concat", integers(s, 1), side, integers(s, WIDTH, 16), axis=0)),
                  perm=[0, 3, 1, 2])
    s.op("Resize", images, "", "", s.op("Concat", integers(s, 1, 16), size, axis=0), out=s.output("y", None), mode="cubic")
    model = check(s, tmp_path, [{"size": np.asarray(size)} for size in SIZES])
    assert ops(model).count("Resize") == 2


def test_only_small_images_are_resized(tmp_path):
    model, _ = rewrite(by_sizes(), tmp_path, "separate-resize")
    proto = model.to_proto()[0]
    small = [node.output[0] for node in proto.graph.node if node.op_type == "Resize"]
    assert len(small) == 2
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in small)
    found = run(proto, feed(size=np.asarray((4, 5))), small)
    assert [found[name].shape for name in small] == [(1, 1, WIDTH, 5), (1, 1, 4, HEIGHT)]


def test_what_else_reads_the_images_and_the_result(tmp_path):
    s = by_sizes()
    s.op("Neg", "x", out=s.output("z", None))
    s.op("Abs", "y", out=s.output("w", None))
    model, [result] = rewrite(s, tmp_path, "separate-resize")
    assert result.fired == 1
    given = feed(size=np.asarray((5, 12)))
    assert drift(run(s.model(), given), run(model, given)) < 1e-5


def refusal(s: Any, folder: Any, provider: str = "cpu") -> str:
    model = Model.load(s.save(folder / "model.onnx"))
    before = ops(model)
    [result] = run_plan(model, Plan.parse(["separate-resize"]), threads=1, provider=provider)
    assert result.fired == 0
    assert ops(model) == before
    return "; ".join(each.reason for each in result.refused)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_other_modes_are_left_alone_without_a_word(tmp_path, mode):
    assert refusal(by_sizes(mode=mode), tmp_path) == ""


@pytest.mark.parametrize(("s", "said"), [
    (lambda: by_sizes(18, keep_aspect_ratio_policy="not_larger"), "one side follows from the other"),
    (lambda: by_sizes(shape=(1, 7, HEIGHT, WIDTH)), "as much as the 7 that there are"),
    (lambda: by_sizes(shape=(1, 8, 513, 4)), "images of 513×4 would cost more"),
], ids=["aspect", "few", "large"])
def test_what_is_refused(tmp_path, s, said):
    assert said in refusal(s(), tmp_path)


def test_crops_are_refused(tmp_path):
    s = Sketch()
    x, size = s.input("x", [1, 8, 9, 9]), s.input("size", [4], INT)
    s.op("Resize", x, floats(s, 0, 0, 0, 0, 1, 1, 0.5, 0.5), "", size, out=s.output("y", None), mode="cubic",
         coordinate_transformation_mode="tf_crop_and_resize")
    assert refusal(s, tmp_path) == "it crops as well"


def test_two_axes_are_refused(tmp_path):
    s = Sketch()
    s.op("Resize", s.input("x", [9, 9]), "", "", s.input("size", [2], INT), out=s.output("y", None), mode="cubic")
    assert refusal(s, tmp_path) == "it does not resize the last two of four axes"


def test_a_branch_of_unknown_size_is_refused(tmp_path):
    then = Branch()
    resized = then.op("Resize", then.op("Abs", "x"), "", "", then.op("Shape", "x"), mode="cubic")
    assert refusal(in_branch(then, resized, ["b", 8, "h", "w"]), tmp_path) == "the size of the images is not known"


def test_a_branch_of_known_size(tmp_path):
    then = Branch()
    resized = then.op("Resize", then.weight(then.numbers(1, 8, 5, 4)), "", "", then.op("Shape", "x"), mode="cubic")
    s = in_branch(then, resized, ["b", 8, "h", "w"])
    model, [result] = rewrite(s, tmp_path, "separate-resize")
    assert result.fired == 1
    given = {"x": np.zeros((1, 8, 11, 3), np.float32), "wanted": np.asarray(True)}
    assert drift(run(s.model(), given), run(model, given)) < 1e-5
