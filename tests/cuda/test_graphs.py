"""Sessions and races on CUDA: what is bound where, CUDA graphs, TF32, types that NumPy lacks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_models import D_MODEL, branching, everything, reshaped, with_shape_arithmetic
from ffn_graphs import Sketch, drift
from ffnfold.graph.errors import InputError
from ffnfold.runtime import Feeds, Variant, open_session, race
from ffnfold.runtime.entrant import Entrant

pytestmark = pytest.mark.cuda


def xs(*shapes, dtype=np.float32):
    random = np.random.default_rng(1)
    return Feeds.of([{"x": random.standard_normal((*shape, D_MODEL)).astype(dtype)} for shape in shapes])


def entrant(path, feeds, provider="cuda", cuda_graph=False, **settings):
    return Entrant(Variant(path), feeds, provider=provider, threads=None, cuda_graph=cuda_graph, use_tf32=False, warm_up=2,
                   allow_cpu=False, **settings)


def test_what_a_bound_run_gives_is_what_a_plain_one_gives(tmp_path, provider, dtype):
    path = everything(dtype).save(tmp_path / "model.onnx")
    feeds = xs((2, 3), (1, 5), dtype=dtype)
    racer, session = entrant(path, feeds, provider), open_session(path, provider=provider)
    for number, feed in enumerate(feeds):
        assert drift(session.run(feed), racer.outputs(number, graph=False)) < 1e-6


def test_a_cuda_graph_gives_what_the_run_without_it_gives(tmp_path, dtype):
    path = everything(dtype).save(tmp_path / "model.onnx")
    feeds = xs((2, 3), (1, 5), (2, 3), dtype=dtype)
    racer, session = entrant(path, feeds, cuda_graph=True), open_session(path, provider="cuda")
    for _ in range(2):
        for number, feed in enumerate(feeds):
            expected = session.run(feed)
            for graph in (True, False):
                assert drift(expected, racer.outputs(number, graph=graph)) < 1e-6


def test_shapes_computed_on_the_cpu_do_not_hinder_a_cuda_graph(tmp_path):
    path = with_shape_arithmetic().save(tmp_path / "model.onnx")
    feeds = xs((2, 3), (1, 5))
    racer, session = entrant(path, feeds, cuda_graph=True), open_session(path, provider="cuda")
    for number, feed in enumerate(feeds):
        assert drift(session.run(feed), racer.outputs(number, graph=True)) < 1e-6


def test_a_model_with_an_if_has_no_cuda_graph(tmp_path):
    path = branching().save(tmp_path / "model.onnx")
    feeds = xs((3,))
    assert race([path], feeds, provider="cuda", seconds=0, min_rounds=2)["models"]
    with pytest.raises(InputError, match=r"model\.onnx: ONNX Runtime cannot load it: .*control flow") as caught:
        race([path], feeds, provider="cuda", cuda_graph=True, seconds=0, min_rounds=2)
    assert "\n" not in str(caught.value)


def test_an_input_that_only_the_cpu_reads_is_bound_there(tmp_path):
    path = reshaped().save(tmp_path / "model.onnx")
    session = open_session(path, provider="cuda")
    assert {name: session.device_of(name) for name in ("x", "shape", "y")} == {"x": "cuda", "shape": "cpu", "y": "cuda"}
    feed = {"x": np.ones((3, D_MODEL), np.float32), "shape": np.asarray([1, 3 * D_MODEL])}
    racer = entrant(path, Feeds.of([feed]))
    assert (racer.outputs(0, graph=False)["y"] == 2).all()
    assert racer.placement.copies == 0


def test_without_tf32_cuda_multiplies_as_exactly_as_the_cpu(tmp_path):
    s = Sketch(19)
    s.op("MatMul", s.input("x", ["n", 512]), s.weight(s.numbers(512, 512)), out=s.output("y", ["n", 512]))
    path = s.save(tmp_path / "model.onnx")
    feed = {"x": np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)}
    exact = open_session(path).run(feed)
    assert drift(exact, open_session(path, provider="cuda").run(feed)) < 2e-6
    assert 1e-5 < drift(exact, open_session(path, provider="cuda", use_tf32=True).run(feed)) < 2e-3


def test_bfloat16_is_bound_to_the_device(tmp_path):
    s = Sketch(19, dtype=ml_dtypes.bfloat16)
    s.op("Add", s.input("x", ["n", 3]), "x", out=s.output("y", ["n", 3]))
    path = s.save(tmp_path / "model.onnx")
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    given = open_session(path, provider="cuda").run({"x": x})["y"]
    np.testing.assert_array_equal(given.astype(np.float32), 2 * x.astype(np.float32))
    found = race([path, path], Feeds.of([{"x": x}]), provider="cuda", cuda_graph=True, seconds=0, min_rounds=3)
    assert found["models"][0]["nodes_by_provider"] == {"CUDAExecutionProvider": 1}


def test_an_empty_input_is_bound_to_the_device(tmp_path, provider):
    s = Sketch(19)
    past, x = s.input("past", ["batch", "past", 4]), s.input("x", ["batch", "tokens", 4])
    s.op("Concat", past, x, out=s.output("y", ["batch", "all", 4]), axis=1)
    feed = {"past": np.zeros((2, 0, 4), np.float32), "x": np.ones((2, 3, 4), np.float32)}
    path = s.save(tmp_path / "model.onnx")
    given = entrant(path, Feeds.of([feed]), provider).outputs(0, graph=False)["y"]
    assert given.shape == (2, 3, 4)
    assert (open_session(path, provider=provider).run(feed)["y"] == given).all()


def test_a_session_configuration_entry_reaches_the_cuda_session(tmp_path):
    s = Sketch(21, dtype=np.float16)
    whole, scale = s.weight(s.random.integers(-127, 127, (64, 64)).astype(np.int8)), s.weight(np.full(64, 0.01, np.float16))
    product = s.op("MatMul", s.input("x", ["n", 64]), s.op("DequantizeLinear", whole, scale, axis=1))
    s.op("Relu", product, out=s.output("y", ["n", 64]))
    path = s.save(tmp_path / "model.onnx")
    feeds = xs((2,), dtype=np.float16)
    found = race([Variant(path, "as it is"), Variant(path, "folded", {"session.disable_quant_qdq": "1"})], feeds, provider="cuda",
                 seconds=0, min_rounds=2)
    assert [each["model"] for each in found["models"]] == ["as it is", "folded"]
    assert all(each["fallback_nodes"] == [] for each in found["models"])
