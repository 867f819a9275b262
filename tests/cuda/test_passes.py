"""Every pass on the CUDA provider: fitted there, run there, no node left behind."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_models import everything, write_x
from ffn_graphs import drift
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.registry import PASSES
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import capture, load_feeds, open_session
from ffnfold.runtime.specs import input_specs

EXAMPLES = {"bilinear-ffn": ["bilinear-ffn:blocks=1"], "factorize-ffn": ["factorize-ffn:rank=4,blocks=1"],
            "prune-bias": ["prune-bias:below=0.1"], "prune-skip": ["prune-skip:fit=slim,blocks=0"],
            "remove-attention": ["remove-attention"], "remove-layer": ["remove-layer:blocks=1"],
            "share-ffn": ["share-ffn:groups=1"], "sparsify-ffn": ["sparsify-ffn:blocks=1"], "split-ffn": ["split-ffn:blocks=1"],
            "canonicalize-ffn": ["canonicalize-ffn:all=true"], "clean-up": ["clean-up"], "dedupe-weights": ["dedupe-weights"],
            "distill-ffn": ["slim-ffn:keep=0.5,select=magnitude,refit=none,affine=false distill-ffn:epochs=4"],
            "drop-neurons": ["drop-neurons:multiple=1"], "fold-bias": ["fold-bias"], "fold-norm": ["fold-norm"],
            "fuse-matmul": ["fuse-matmul"],
            "linearize-ffn": ["linearize-ffn:blocks=1", "linearize-ffn:fit=stein,blocks=1", "linearize-ffn:fit=neuron,blocks=2",
                              "linearize-ffn:fit=neuron,coverage=0.9,blocks=2"],
            "merge-linears": ["merge-linears:force=true"],
              # leaves a model for CUDA alone
            "quantize-ffn": ["quantize-ffn:form=weight-only"],
            "remove-ffn": ["remove-ffn:blocks=1", "remove-ffn:count=1,by=output", "remove-ffn:keep=scale,blocks=1",
                           "remove-ffn:keep=rank,blocks=1", "remove-ffn:keep=ladder,within=0.1"],
            "slim-ffn": ["slim-ffn:keep=0.5,multiple=8"], "to-half": ["to-half", "to-half:dtype=bfloat16"]}
TRIED_ELSEWHERE = {"fuse-attention", "separate-resize", "skip-padding"}  # tests/cuda/test_tokens.py
NOT_IN_HALF = {"fold-norm",  # it leaves weights of 16 bits alone, which would be rounded anew
               "to-half", "to-half:dtype=bfloat16", *EXAMPLES["distill-ffn"]}
TOLERANCE = {"float32": 2e-4, "float16": 1e-2}


def test_there_is_an_example_of_every_pass():
    assert set(PASSES) <= {*EXAMPLES, *TRIED_ELSEWHERE}, "add an example of the new pass, so that it is tried on CUDA"


@pytest.mark.cuda
@pytest.mark.parametrize("text", [text for name in PASSES for text in EXAMPLES.get(name, [])])
def test_a_pass_on_cuda(tmp_path, provider, dtype, text):
    if provider == "cpu" and "bfloat16" in text:
        pytest.skip("ONNX Runtime has no bfloat16 kernels on the CPU")
    path = everything(dtype).save(tmp_path / "model.onnx")
    model = Model.load(path)
    feeds = load_feeds(write_x(tmp_path / "feeds", 40, dtype), input_specs(model))
    plan = Plan.parse(text.split())
    *_, result = run_plan(model, plan, fit=feeds[:30], choose=feeds[30:36], provider=provider)
    assert result.fired or (text in NOT_IN_HALF and dtype == np.float16), result.refused
    model.save(tmp_path / "rewritten.onnx")
    before, after = (open_session(tmp_path / name, provider=provider, trace=True) for name in ("model.onnx", "rewritten.onnx"))
    rounding = {"session.qdq_matmulnbits_accuracy_level": "1"} if provider == "cuda" else {}  # there inputs stay in float
    on_cpu = None if "bfloat16" in text else open_session(tmp_path / "rewritten.onnx", config=rounding)  # it has no kernels
    tolerance = TOLERANCE["float16" if text == "to-half" else dtype.name]
    for feed in feeds[36:]:
        given = after.run(feed)
        assert np.isfinite(given["y"]).all()
        moved = drift(before.run(feed), given)
        assert moved < (tolerance if result.exact else 0.9)
        assert result.exact or moved > 0 or not result.fired
        if on_cpu is not None:
            assert drift(on_cpu.run(feed), given) < tolerance * (1 if result.exact else 5)
    after.check_placement()
    placement = after.placement()
    assert placement is not None
    assert placement.copies == 0
    assert set(placement.by_provider) == {"CPUExecutionProvider" if provider == "cpu" else "CUDAExecutionProvider"}


@pytest.mark.cuda
def test_values_captured_on_cuda_are_those_of_the_cpu(model, feeds, provider):
    loaded = Model.load(model)
    used = load_feeds(feeds, input_specs(loaded))[:3]
    name = next(node.outputs[0].name for node in loaded.graph.nodes if node.op == "MatMul")
    pairs = list(zip(capture(loaded, used, [name], provider=provider), capture(loaded, used, [name]), strict=True))
    assert len(pairs) == 3
    for there, here in pairs:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_weight_only_int8_runs_in_its_own_kernel(model, tmp_path):
    loaded = Model.load(model)
    run_plan(loaded, Plan.parse(["quantize-ffn:form=weight-only"]), provider="cuda")
    session = open_session(loaded, provider="cuda", trace=True)
    session.run({"x": np.ones((1, 1, 64), np.float32)})
    placement = session.placement()
    assert placement is not None
    operators = [node.op for node in placement.nodes]
    assert operators.count("MatMulNBits") == 7
    assert "DequantizeLinear" not in operators
