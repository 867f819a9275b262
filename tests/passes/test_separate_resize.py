"""separate-resize: which Resize becomes two products, and which stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import EXACT_PLAN, Plan
from ffnfold.passes.runner import run_plan
from onnx import TensorProto
from rewriting import Branch, feeds_of, in_branch, rewrite

C, H, W = 12, 7, 9
SIZES = [(3, 5), (12, 20), (1, 1), (H, 4), (12, W), (H, W), (1, 30)]
COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
X = feeds_of((2, C, H, W))[0]


def resize(s: Sketch, x: str, *, sizes: str = "", scales: Sequence[float] | str = (), out: Any = None, **attrs: Any) -> str:
    """A cubic Resize; before opset 13 its roi and scales must be there."""
    empty = "" if s.opset >= 13 else s.weight(np.zeros(0, np.float32))
    named = scales if isinstance(scales, str) else s.weight(np.asarray(scales, np.float32)) if scales else empty
    inputs = [x, empty, named, sizes] if sizes else [x, empty, named]
    return s.op("Resize", *inputs, out=out, **{"mode": "cubic", **attrs})


def computed(opset: int = 17, shape: Sequence[int | str] = ("batch", C, H, W), dtype: Any = np.float32, **attrs: Any) -> Sketch:
    """x resized to the size of the two last axes of the input ``like``, as exporters compute it."""
    s = Sketch(opset, dtype=dtype)
    x = s.input("x", shape)
    like = s.input("like", ["rows", "columns"])
    outer = s.op("Slice", s.op("Shape", x), *(s.weight(np.asarray([each])) for each in (0, 2, 0)))
    resize(s, x, sizes=s.op("Concat", outer, s.op("Shape", like), axis=0), out=s.output("y"), **attrs)
    return s


def fixed(size: Sequence[int], *, opset: int = 17, x: Sequence[int | str] = ("batch", C, H, W), **attrs: Any) -> Sketch:
    """x resized to constant sizes."""
    s = Sketch(opset)
    resize(s, s.input("x", x), sizes=s.weight(np.asarray(size, np.int64)), out=s.output("y"), **attrs)
    return s


def scaled(height: float, width: float, *, opset: int = 17, **attrs: Any) -> Sketch:
    """x resized by constant scales."""
    s = Sketch(opset)
    resize(s, s.input("x", ["batch", C, H, W]), scales=[1, 1, height, width], out=s.output("y"), **attrs)
    return s


def like(height: int, width: int, dtype: Any = np.float32) -> dict[str, Any]:
    return {"x": X["x"].astype(dtype), "like": np.zeros((height, width), dtype)}


def fires(s: Sketch, folder: Path, feeds: Sequence[dict[str, Any]] = (X,), tolerance: float = 1e-6) -> Model:
    """It fires once, and nothing moves beyond rounding."""
    model, [result] = rewrite(s, folder, "separate-resize")
    assert (result.fired, result.refused) == (1, [])
    for feed in feeds:
        assert drift(run(s.model(), feed), run(folder / "after.onnx", feed)) < tolerance
    return model


def stays(s: Sketch, folder: Path, words: str | None = None) -> PassResult:
    """Nothing fires; ``words`` are in the reason, or there is none."""
    model, [result] = rewrite(s, folder, "separate-resize")
    assert result.fired == 0
    assert ops(model) == ops(s.model())
    assert [words in each.reason for each in result.refused] == ([] if words is None else [True])
    return result


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_sizes_that_the_graph_computes(tmp_path, opset, coordinates):
    model = fires(computed(opset, coordinate_transformation_mode=coordinates), tmp_path, [like(*size) for size in SIZES])
    assert ops(model).count("MatMul") == 2
    assert "x" not in [node.inputs[0].name for node in model.graph.nodes if node.op == "Resize"]


@pytest.mark.parametrize("coordinates", ["half_pixel_symmetric", "tf_half_pixel_for_nn"])
def test_coordinates_seldom_seen(tmp_path, coordinates):
    fires(computed(19, coordinate_transformation_mode=coordinates), tmp_path, [like(*size) for size in SIZES])
    fires(scaled(0.43, 2.4, opset=19, coordinate_transformation_mode=coordinates), tmp_path)


@pytest.mark.parametrize("attrs", [{"exclude_outside": 1}, {"cubic_coeff_a": -0.5},
                                   {"exclude_outside": 1, "cubic_coeff_a": -1.0}])
def test_the_attributes_count(tmp_path, attrs):
    fires(computed(**attrs), tmp_path, [like(*size) for size in SIZES])
    feed = like(5, 4)
    assert drift(run(computed().model(), feed), run(tmp_path / "after.onnx", feed)) > 1e-3


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("size", [(3, 5), (12, 20), (1, 2)])
def test_constant_sizes(tmp_path, opset, coordinates, size):
    model = fires(fixed([2, C, *size], opset=opset, coordinate_transformation_mode=coordinates), tmp_path)
    assert ops(model).count("MatMul") == 2
    assert set(optimized_ops(tmp_path / "after.onnx", tmp_path)) == {"MatMul"}, "the matrices are made when it is loaded"


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("scales", [(0.5, 0.7), (1.75, 2.4), (0.43, 3), (1.3, 0.2)])
def test_constant_scales(tmp_path, opset, coordinates, scales):
    """A scale that does not divide: pixels lie where the scale says, and not where the sizes would."""
    fires(scaled(*scales, opset=opset, coordinate_transformation_mode=coordinates), tmp_path)


@pytest.mark.parametrize("s", [fixed([2, C, H, 4]), fixed([2, C, 4, W]), scaled(1, 0.5), scaled(0.5, 1)])
def test_an_axis_that_keeps_its_size_needs_no_product(tmp_path, s):
    assert ops(fires(s, tmp_path)).count("MatMul") == 1


@pytest.mark.parametrize("s", [fixed([2, C, H, W]), scaled(1, 1), scaled(1.01, 1.02)])
def test_a_copy_stays(tmp_path, s):
    stays(s, tmp_path)


@pytest.mark.parametrize("scales", [(1.05, 0.5), (2, 1.05)])
def test_a_scale_that_leaves_one_size_as_it_is_stays(tmp_path, scales):
    """ONNX Runtime interpolates both axes then, but would copy an identity."""
    stays(scaled(*scales), tmp_path, "leaves a size as it is")


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [3]])
@pytest.mark.parametrize("how", ["computed", "sizes", "scales"])
def test_axes_that_are_named(tmp_path, axes, how):
    s = Sketch(18)
    x = s.input("x", ["batch", C, H, W])
    wanted = {2: 4, 3: 15}
    listed = [wanted[axis % 4] for axis in axes]
    if how == "scales":
        resize(s, x, scales=[{2: 0.6, 3: 1.7}[axis % 4] for axis in axes], axes=axes, out=s.output("y"))
    else:
        given = s.input("given", [len(axes)], TensorProto.INT64) if how == "computed" else s.weight(np.asarray(listed))
        resize(s, x, sizes=given, axes=axes, out=s.output("y"))
    feed = {**X, "given": np.asarray(listed)} if how == "computed" else X
    assert ops(fires(s, tmp_path, [feed])).count("MatMul") == len(axes)


def embedding() -> Sketch:
    """A position embedding as DINOv2 exports it: a weight reshaped by arithmetic on its length, and on a width read from x."""
    s = Sketch(14)
    x = s.input("x", ["batch", "tokens", C])
    first = s.weight(np.asarray([0]))
    edges = [s.op("Unsqueeze", s.op("Cast", s.op("Pow", s.number(49), s.number(0.5)), to=TensorProto.INT64), first)
             for _ in range(2)]
    width = s.op("Unsqueeze", s.op("Gather", s.op("Shape", x), s.weight(np.asarray(2)), axis=0), first)
    shape = s.op("Concat", s.weight(np.asarray([1])), *edges, width, axis=0)
    grid = s.op("Cast", s.op("Transpose", s.op("Reshape", s.weight(s.numbers(1, 49, C)), shape), perm=[0, 3, 1, 2]),
                to=TensorProto.FLOAT)
    size = s.op("Concat", s.op("Slice", s.op("Shape", grid), *(s.weight(np.asarray([each])) for each in (0, 2, 0))),
                s.input("size", [2], TensorProto.INT64), axis=0)
    rows = s.op("Transpose", resize(s, grid, sizes=size), perm=[0, 2, 3, 1])
    s.op("Add", x, s.op("Reshape", rows, s.weight(np.asarray([1, -1, C]))), out=s.output("y"))
    return s


@pytest.mark.parametrize("size", [(3, 2), (7, 7), (9, 8)])
def test_a_position_embedding(tmp_path, size):
    feed = {**feeds_of((2, size[0] * size[1], C))[0], "size": np.asarray(size)}
    fires(embedding(), tmp_path, [feed])
    assert (tmp_path / "after.onnx").stat().st_size < (tmp_path / "before.onnx").stat().st_size + 4096


def test_half_precision_is_rounded_once(tmp_path):
    """Not further from the numbers in float64 than the Resize of float16 itself."""
    s = computed(dtype=np.float16)
    feed = like(12, 20, np.float16)
    fires(s, tmp_path, [feed], tolerance=1e-3)
    exact = run(computed().model(), {name: value.astype(np.float32) for name, value in feed.items()})
    given = run(tmp_path / "after.onnx", feed)
    assert given["y"].dtype == np.float16
    assert drift(exact, given) < 1.01 * drift(exact, run(s.model(), feed))


def test_an_output_that_others_read_keeps_its_name(tmp_path):
    s = computed()
    s.op("Relu", "y", out=s.output("z"))
    s.op("Neg", "y", out=s.output("w"))
    fires(s, tmp_path, [like(4, 5)])


def test_two_of_one_value(tmp_path):
    s = fixed([2, C, 3, 4])
    resize(s, "x", sizes=s.weight(np.asarray([2, C, 15, 4])), out=s.output("z"))
    model, [result] = rewrite(s, tmp_path, "separate-resize")
    assert result.fired == 2
    assert drift(run(s.model(), X), run(tmp_path / "after.onnx", X)) < 1e-6
    assert ops(model).count("MatMul") == 4


def test_inside_an_if(tmp_path):
    inner = Branch()
    grown = resize(inner, "x", sizes=inner.weight(np.asarray([2, C, 4, 5])))
    back = resize(inner, grown, sizes=inner.weight(np.asarray([2, C, H, W])))
    s = in_branch(inner, back, [2, C, H, W])
    model, [result] = rewrite(s, tmp_path, "separate-resize")
    assert result.fired == 1
    assert ["not known" in each.reason for each in result.refused] == [True]
    for wanted in (True, False):
        feed = {**X, "wanted": np.asarray(wanted)}
        assert drift(run(s.model(), feed), run(tmp_path / "after.onnx", feed)) < 1e-6
    assert [node.op for _, graph in model.graphs() for node in graph.nodes].count("MatMul") == 2


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_other_modes_stay(tmp_path, mode):
    stays(fixed([2, C, 3, 4], mode=mode), tmp_path)


def test_a_crop_stays(tmp_path):
    s = Sketch(17)
    roi, sizes = s.weight(np.asarray([0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8], np.float32)), s.weight(np.asarray([2, C, 4, 4]))
    s.op("Resize", s.input("x", [2, C, H, W]), roi, "", sizes, mode="cubic", out=s.output("y"),
         coordinate_transformation_mode="tf_crop_and_resize")
    stays(s, tmp_path, "crop")


@pytest.mark.parametrize(("attrs", "words"), [
    ({"antialias": 1}, "antialias"), ({"keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]}, "keep_aspect_ratio_policy")])
def test_attributes_it_does_not_separate(tmp_path, attrs, words):
    stays(fixed([4, 4] if "axes" in attrs else [2, C, 4, 4], opset=18, **attrs), tmp_path, words)


def test_scales_that_are_computed_stay(tmp_path):
    s = Sketch()
    resize(s, s.input("x", ["batch", C, H, W]), scales=s.input("scales", [4], TensorProto.FLOAT), out=s.output("y"))
    stays(s, tmp_path, "scales are computed")


@pytest.mark.parametrize("scales", [(float("nan"), 2), (float("inf"), 2), (0, 2), (-1, 0.5), (1e-3, 0.5)])
def test_scales_of_which_nothing_comes_stay(tmp_path, scales):
    path = scaled(*scales).save(tmp_path / "m.onnx")
    [result] = run_plan(Model.load(path), Plan.parse(["separate-resize"]), threads=1)
    assert (result.fired, result.refused) == (0, [])


def test_scales_that_the_caller_may_override_stay(tmp_path):
    s = scaled(0.5, 0.5)
    [name] = s.initializers
    s.input(name, [4], TensorProto.FLOAT)
    stays(s, tmp_path, "scales are computed")


def test_sizes_that_the_caller_may_override_are_followed(tmp_path):
    s = fixed([2, C, 3, 4])
    [name] = s.initializers
    s.input(name, [4], TensorProto.INT64)
    fires(s, tmp_path, [X, {**X, name: np.asarray([2, C, 8, 5])}])


@pytest.mark.parametrize("shape", [["batch", C, "rows", W], ["batch", C, H, "columns"], ["batch", "channels", H, W], None])
def test_a_shape_that_is_not_known_stays(tmp_path, shape):
    stays(fixed([2, C, 3, 4], x=shape), tmp_path, "not known")


def test_one_image_of_two_axes_stays(tmp_path):
    stays(fixed([3, 4], x=[H, W]), tmp_path)


@pytest.mark.parametrize("shape", [("batch", 7, 4, 4), ("batch", C, 30, 30)])
def test_sizes_that_are_computed_for_few_channels_stay(tmp_path, shape):
    stays(computed(shape=shape), tmp_path, "too few or too large")


def test_a_batch_that_is_known_counts(tmp_path):
    fires(computed(shape=(2, 7, 4, 4)), tmp_path,
          [{**feeds_of((2, 7, 4, 4))[0], "like": np.zeros(size, np.float32)} for size in ((3, 9), (4, 4))])


def test_little_of_a_large_image_stays(tmp_path):
    stays(fixed([2, C, 8, 8], x=[2, C, 512, 512]), tmp_path, "multiply-adds")
    stays(fixed([2, C, 512, 512], x=[2, C, 2048, 16]), tmp_path, "larger than")


def test_a_constant_that_is_resized_to_constant_sizes_stays(tmp_path):
    """ONNX Runtime does it once, when it loads the model."""
    s = Sketch()
    y = resize(s, s.weight(s.numbers(1, C, H, W)), sizes=s.weight(np.asarray([1, C, 3, 4])))
    s.op("Add", s.input("x", ["batch", C, 3, 4]), y, out=s.output("y"))
    stays(s, tmp_path)


def test_on_cuda_it_stays(tmp_path):
    path = fixed([2, C, 3, 4]).save(tmp_path / "m.onnx")
    [result] = run_plan(Model.load(path), Plan.parse(["separate-resize"]), provider="cuda")
    assert result.fired == 0
    assert ["CPU" in each.reason for each in result.refused] == [True]


def test_the_exact_plan_holds_it(tmp_path):
    s = embedding()
    onnx.save_model(s.model(), tmp_path / "m.onnx")
    results = run_plan(Model.load(tmp_path / "m.onnx"), Plan.parse(EXACT_PLAN), threads=1)
    assert {each.name: each.fired for each in results}["separate-resize"] == 1
