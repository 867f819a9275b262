"""The exact passes on weights of 32 MB: memory is bounded by the tiles in work, and the numbers are those of the whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from ffn_graphs import Sketch, run
from ffnfold.passes.optimize import Job, optimize_file
from ffnfold.passes.plan import Plan

D_MODEL, D_FF = 1024, 8192
MEGABYTES = 28  # a weight has 32, and 64 in float64
FEED = {"x": np.random.default_rng(5).standard_normal((2, D_MODEL)).astype(np.float32)}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape, np.float32) - 0.5) * np.float32(0.05)


def twins(matrix: np.ndarray, axis: int) -> np.ndarray:
    """``matrix`` with its second half of neurons equal to the first."""
    half = matrix.shape[axis] // 2
    if axis:
        matrix[:, half:] = matrix[:, :half]
    else:
        matrix[half:] = matrix[:half]
    return matrix


def norm_into_linear(s: Sketch, x: str) -> str:
    normed = s.op("LayerNormalization", x, s.weight(1 + numbers(D_MODEL)), s.weight(numbers(D_MODEL, seed=1)), axis=-1)
    return s.op("Add", s.op("MatMul", normed, s.weight(numbers(D_MODEL, D_FF))), s.weight(numbers(D_FF)))


def norm_into_gemm(s: Sketch, x: str) -> str:
    normed = s.op("LayerNormalization", x, s.weight(1 + numbers(D_MODEL)), s.weight(numbers(D_MODEL, seed=1)), axis=-1)
    return s.op("Gemm", normed, s.weight(numbers(D_FF, D_MODEL)), s.weight(numbers(D_FF)), transB=1)


def equal_neurons(s: Sketch, x: str) -> str:
    up = s.op("Add", s.op("MatMul", x, s.weight(twins(numbers(D_MODEL, D_FF), 1))), s.weight(twins(numbers(D_FF), 0)))
    down = s.op("MatMul", s.op("Relu", up), s.weight(numbers(D_FF, D_MODEL, seed=1)))
    return s.op("Add", x, s.op("Add", down, s.weight(numbers(D_MODEL))))


def equal_neurons_of_gemms(s: Sketch, x: str) -> str:
    up = s.op("Gemm", x, s.weight(twins(numbers(D_FF, D_MODEL), 0)), s.weight(twins(numbers(D_FF), 0)), transB=1)
    return s.op("Add", x, s.op("Gemm", s.op("Relu", up), s.weight(numbers(D_MODEL, D_FF, seed=1)), transB=1))


def two_matrices(s: Sketch, x: str) -> str:
    return s.op("MatMul", s.op("MatMul", x, s.weight(numbers(D_MODEL, D_FF))), s.weight(numbers(D_FF, 64, seed=1)))


def two_turned_matrices(s: Sketch, x: str) -> str:
    first = s.op("Gemm", x, s.weight(numbers(D_FF, D_MODEL)), transB=1)
    return s.op("Gemm", first, s.weight(numbers(64, D_FF, seed=1)), transB=1)


def few_neurons_far_apart(s: Sketch, x: str) -> str:
    up, down = numbers(D_MODEL, D_FF), numbers(D_FF, D_MODEL, seed=1)
    gone = np.arange(D_FF) % 512 != 0
    down[gone] = 0
    return s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, s.weight(up))), s.weight(down)))


def few_neurons_far_apart_of_gemms(s: Sketch, x: str) -> str:
    up, down = numbers(D_FF, D_MODEL), numbers(D_MODEL, D_FF, seed=1)
    gone = np.arange(D_FF) % 512 != 0
    down[:, gone] = 0
    return s.op("Add", x, s.op("Gemm", s.op("Relu", s.op("Gemm", x, s.weight(up), transB=1)), s.weight(down), transB=1))


def shift_before_linear(s: Sketch, x: str) -> str:
    shifted = s.op("Add", x, s.weight(numbers(D_MODEL)))
    return s.op("Add", s.op("MatMul", shifted, s.weight(numbers(D_MODEL, D_FF))), s.weight(numbers(D_FF)))


def equal_weights(s: Sketch, x: str) -> str:
    return s.op("Add", *(s.op("MatMul", x, s.weight(numbers(D_MODEL, D_FF))) for _ in range(2)))


CASES = [("fold-norm", norm_into_linear), ("fold-norm", norm_into_gemm), ("drop-neurons", equal_neurons),
         ("drop-neurons", equal_neurons_of_gemms), ("drop-neurons", few_neurons_far_apart),
         ("drop-neurons", few_neurons_far_apart_of_gemms), ("fuse-matmul", two_matrices),
         ("fuse-matmul", two_turned_matrices), ("fold-bias", shift_before_linear), ("dedupe-weights", equal_weights)]


@pytest.mark.parametrize(("name", "draw", "external"), [*((*case, True) for case in CASES), (*CASES[0], False)],
                         ids=[*(draw.__name__ for _, draw in CASES), "inside"])
def test_memory_is_bounded_by_tiles(tmp_path, name, draw, external):
    s = Sketch()
    s.op("Identity", draw(s, s.input("x", [None, D_MODEL])), out=s.output("y"))
    model = s.save(tmp_path / "m.onnx", **({"save_as_external_data": True, "location": "w.bin"} if external else {}))
    s.initializers.clear()
    job = Job(model, tmp_path / "out.onnx", Plan.parse([name]), verify=False)
    optimize_file(job)  # so that what is imported and cached does not count
    tracemalloc.start()
    try:
        report = optimize_file(job)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert report["passes"][0]["fired"] > 0
    assert peak < MEGABYTES
    compare(model, tmp_path / "out.onnx")


def compare(before: Path, after: Path) -> None:
    wanted, found = run(before, FEED)["y"], run(after, FEED)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
