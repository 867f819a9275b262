"""verify, bench and optimize with --provider cuda."""

from __future__ import annotations

import numpy as np
import pytest
from contract import BENCH, CUDA, OPTIMIZE, PLACE, RATIO, TIMES, VERIFY
from cuda_models import everything, with_shape_arithmetic, write_x
from ffn_graphs import Sketch

pytestmark = pytest.mark.cuda

ON_CUDA = "CUDAExecutionProvider"


@pytest.fixture
def affine(cli, model, feeds):
    """``model`` with a block made affine, fitted on the GPU."""
    outcome = cli("optimize", model, "-o", "affine.onnx", "-p", "linearize-ffn:blocks=1", "--data", feeds, "--provider", "cuda",
                  "--no-verify")
    assert outcome.code == 0, outcome
    return "affine.onnx"


@pytest.fixture
def for_the_cpu(cli, model):
    """``model`` in the int8 form for CPUs."""
    assert cli("optimize", model, "-o", "int8.onnx", "-p", "quantize-ffn:form=dynamic", "--no-verify").code == 0
    return "int8.onnx"


def test_verify(cli, model, affine, feeds):
    outcome = cli("verify", model, affine, "--data", feeds, "--provider", "cuda", "--json")
    assert outcome.code == 0, outcome
    found = outcome.json
    assert list(found) == [*VERIFY, "cuda"]
    assert found["provider"] == "cuda"
    assert 0 < found["outputs"]["y"]["rel_l2"] < 0.9
    assert list(found["cuda"]) == CUDA
    assert found["cuda"]["tf32"] is False
    for which in ("reference", "candidate"):
        place = found["cuda"][which]
        assert list(place) == PLACE
        assert list(place["nodes_by_provider"]) == [ON_CUDA]
        assert (place["memcpy_nodes"], place["fallback_nodes"]) == (0, [])


def test_verify_says_where_it_ran(cli, model, affine, feeds):
    out = cli("verify", model, affine, "--data", feeds, "--provider", "cuda", "--tf32").out
    assert "TF32 on" in out
    assert "reference: CUDA " in out


def test_verify_per_block(cli, model, affine, feeds):
    found = cli("verify", model, affine, "--data", feeds, "--provider", "cuda", "--per-block", "--json").json
    assert [each["block"] for each in found["blocks"]][:1] == [0]


def test_a_model_on_cuda_is_close_to_itself_on_the_cpu(cli, model, feeds):
    found = cli("verify", model, model, "--data", feeds, "--provider", "cuda", "--json").json
    assert found["outputs"]["y"]["max_abs"] == 0


def test_integer_arithmetic_on_shapes_may_stay_on_the_cpu(cli, tmp_path):
    path = with_shape_arithmetic().save(tmp_path / "shapes.onnx")
    outcome = cli("verify", path, path, "--data", write_x(tmp_path / "feeds", 2), "--provider", "cuda", "--json")
    assert outcome.code == 0, outcome
    place = outcome.json["cuda"]["reference"]
    assert place["nodes_by_provider"]["CPUExecutionProvider"] > 0
    assert place["fallback_nodes"] == []


def test_an_int8_model_for_the_cpu_is_called_out(cli, model, for_the_cpu, feeds):
    outcome = cli("verify", model, for_the_cpu, "--data", feeds, "--provider", "cuda")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    for word in ("int8.onnx", "fell back to the CPU", "MatMul", "copies", "quantize-ffn:form=weight-only", "--allow-cpu-nodes"):
        assert word in line


def test_it_is_measured_where_that_is_allowed(cli, model, for_the_cpu, feeds):
    outcome = cli("verify", model, for_the_cpu, "--data", feeds, "--provider", "cuda", "--allow-cpu-nodes", "--json")
    assert outcome.code == 0, outcome
    place = outcome.json["cuda"]["candidate"]
    assert place["fallback_nodes"]
    assert place["memcpy_nodes"] > 0
    assert outcome.json["outputs"]["y"]["rel_l2"] < 0.1


def test_bench_calls_it_out_too(cli, model, for_the_cpu, feeds):
    outcome = cli("bench", model, for_the_cpu, "--data", feeds, "--provider", "cuda")
    assert outcome.code == 2
    assert "fell back to the CPU" in outcome.err
    allowed = cli("bench", model, for_the_cpu, "--data", feeds, "--provider", "cuda", "--allow-cpu-nodes", "--json").json
    assert allowed["models"][1]["fallback_nodes"]


def test_optimize_to_it_writes_nothing(cli, tmp_path, model, feeds):
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn:form=dynamic", "--data", feeds, "--provider", "cuda")
    assert outcome.code == 2
    assert not list(tmp_path.glob("out*"))


def test_an_operator_without_a_cuda_kernel_is_named(cli, tmp_path):
    s = Sketch(19)
    s.op("Det", s.op("Relu", s.input("x", [2, 64, 64])), out=s.output("y", [2]))
    path = s.save(tmp_path / "det.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32) / 8)
    outcome = cli("verify", path, path, "--data", "x.npz", "--provider", "cuda")
    assert outcome.code == 2
    assert "1 Det ('/Det_1')" in outcome.err


def test_bench(cli, model, affine):
    outcome = cli("bench", model, affine, "--shape", "x=1x4x64", "--provider", "cuda", "--json")
    assert outcome.code == 0, outcome
    found = outcome.json
    assert list(found) == BENCH
    assert [list(each) for each in found["models"]] == [TIMES, TIMES]
    assert found["machine"]["gpu"]
    assert found["machine"]["driver"]
    assert (found["machine"]["tf32"], found["machine"]["cuda_graph"]) == (False, False)
    assert all(list(each["nodes_by_provider"]) == [ON_CUDA] for each in found["models"])


def test_bench_with_cuda_graphs_has_the_times_without_beside_them(cli, model, affine):
    found = cli("bench", model, affine, "--shape", "x=1x4x64", "--provider", "cuda", "--cuda-graph", "--tf32", "--json").json
    assert (found["machine"]["tf32"], found["machine"]["cuda_graph"]) == (True, True)
    for each in found["models"]:
        assert list(each) == [*TIMES, "without_cuda_graph"]
        assert each["without_cuda_graph"]["p50_ms"] > each["p50_ms"]  # it spares the launches, and these are tiny kernels
    (ratio,) = found["ratios"]
    assert list(ratio) == [*RATIO, "without_cuda_graph"]
    out = cli("bench", model, affine, "--shape", "x=1x4x64", "--provider", "cuda", "--cuda-graph").out
    assert "CUDA graph" in out
    assert "no graph" in out
    assert "TF32 off" in out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_optimize_with_the_default_plan_for_cuda(cli, tmp_path, dtype):
    path = everything(dtype).save(tmp_path / "model.onnx")
    feeds = write_x(tmp_path / "feeds", 6, dtype)
    outcome = cli("optimize", path, "-o", "out.onnx", "--target", "cuda", "--provider", "cuda", "--data", feeds, "--json")
    assert outcome.code == 0, outcome
    found = outcome.json
    assert list(found)[:len(OPTIMIZE)] == OPTIMIZE
    assert found["drift"]["cuda"]["candidate"]["fallback_nodes"] == []
    assert found["drift"]["outputs"]["y"]["cosine_mean"] > 0.999
    assert found["speed"]["speedup"] > 0
    assert {each["name"]: each["fired"] for each in found["passes"]}["quantize-ffn"] == 3


def test_a_limit_without_a_plan_searches_on_the_gpu(cli, tmp_path):
    path = everything("float16").save(tmp_path / "model.onnx")
    feeds = write_x(tmp_path / "feeds", 6, "float16")
    outcome = cli("optimize", path, "-o", "out.onnx", "--target", "cuda", "--provider", "cuda", "--data", feeds, "--json",
                  "--max-drift", "cosine_mean=0.999")
    assert outcome.code == 0, outcome
    assert outcome.json["drift"]["provider"] == "cuda"
    assert outcome.json["drift"]["outputs"]["y"]["cosine_mean"] >= 0.999


def test_optimize_fits_on_the_gpu(cli, model, feeds):
    found = cli("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn:blocks=1-2", "--data", feeds, "--provider", "cuda",
                "--json").json
    assert found["passes"][0]["fired"] == 2
    assert found["drift"]["cuda"]["candidate"]["memcpy_nodes"] == 0


def test_feeds_made_up_for_a_model_run_on_cuda(cli, model):
    outcome = cli("verify", model, model, "--synthetic", "--provider", "cuda", "--json")
    assert outcome.code == 0, outcome
    assert outcome.json["feeds"] == "synthetic"
