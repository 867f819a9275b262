"""Which form of integer weights ONNX Runtime multiplies fastest here: a stack of FFNs with the shapes of a 7B model.

    python benchmarks/int8_forms.py [--provider cuda|cpu] [--rows 1,16,512] [--layers 2] [--d-model 4096] [--d-ff 11008]

Forms, all symmetric, on every matrix of ``x + (silu(x G) · x U) D``: the float matrix; DequantizeLinear in front of the MatMul, a
scale per column or per block of rows; MatMulNBits with 8 or 4 bits and blocks of 32, 64 or 128. On CUDA each also with
``ep.cuda.fpa_intb_gemm=1``, and with CUDA graphs beside the runs without them. Prints a table and writes JSON; forms that do not
run here are named with the reason. Random weights: nothing is said about accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ffnfold import InputError
from ffnfold.runtime import Feeds, Variant, open_session, race
from ffnfold.runtime.placement import CPU
from onnx import helper, numpy_helper

FORMS = ("float", "dequantize columns", "dequantize 32", "dequantize 128", "nbits8 32", "nbits8 64", "nbits8 128", "nbits4 32",
         "nbits4 128")
PACKED = {"ep.cuda.fpa_intb_gemm": "1", "ep.cuda.fpa_intb_profile_m": "1,16,512,4096"}


def main() -> int:
    """Race the forms; exit code 1 if none but the float one runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", default="1,16,512")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-ff", type=int, default=11008)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "int8_forms.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key != "json"}
    result |= {"executed": {}, "left_out": {}, "races": {}}
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        variants = runnable(arguments, Path(folder), result)
        for rows in (int(text) for text in arguments.rows.split(",")):
            x = np.random.default_rng(rows).standard_normal((1, rows, arguments.d_model)).astype(arguments.dtype)
            found = race(variants, Feeds.of([{"x": x}], synthetic=True), provider=arguments.provider, allow_cpu=True,
                         cuda_graph=arguments.provider == "cuda", seconds=arguments.seconds)
            result["races"][rows] = found
            show(rows, found)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if len(variants) > 1 else 1


def runnable(arguments: argparse.Namespace, folder: Path, result: dict[str, Any]) -> list[Variant]:
    """The forms that run here, and with what operators."""
    found = []
    x = np.ones((1, 1, arguments.d_model), arguments.dtype)
    for form in FORMS:
        path = folder / f"{form}.onnx"
        onnx.save_model(model(form, arguments), path, save_as_external_data=True, location=f"{form}.data")
        for config in ({}, PACKED) if arguments.provider == "cuda" and form != "float" else ({},):
            variant = Variant(path, f"{form}{', packed' if config else ''}", config)
            try:
                session = open_session(path, provider=arguments.provider, config=config, trace=True)
                session.run({"x": x})
            except InputError as error:
                result["left_out"][variant.title] = str(error)
                print(f"left out: {variant.title}: {error}", flush=True)
                continue
            placement = session.placement()
            assert placement is not None
            result["executed"][variant.title] = Counter(
                f"{node.op}{' on the CPU' if node.provider == CPU else ''}" for node in placement.nodes)
            found.append(variant)
            print(f"{variant.title}: {dict(result['executed'][variant.title])}", flush=True)
    return found


def show(rows: int, found: dict[str, Any]) -> None:
    """A table of one race."""
    print(f"\n| {rows} rows | p50 | speed-up (95 % interval) | without CUDA graph |\n| --- | --- | --- | --- |")
    for number, model_ in enumerate(found["models"]):
        ratio = found["ratios"][number - 1] if number else {"speedup": 1.0, "low": 1.0, "high": 1.0}
        plain = ratio.get("without_cuda_graph")
        print(f"| {model_['model']} | {model_['p50_ms']:.3f} ms | {ratio['speedup']:.2f} ({ratio['low']:.2f} to "
              f"{ratio['high']:.2f}) | {'' if plain is None else format(plain['speedup'], '.2f')} |", flush=True)


def model(form: str, arguments: argparse.Namespace) -> onnx.ModelProto:
    """The stack with its matrices in ``form``."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    d_model, d_ff = arguments.d_model, arguments.d_ff

    def constant(name: str, values: Any) -> str:
        tensors.append(numpy_helper.from_array(values, name))
        return name

    def op(kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"{kind}_{len(nodes)}"], domain=domain, **attributes))
        return nodes[-1].output[0]

    def linear(x: str, d_in: int, d_out: int, name: str) -> str:
        random = np.random.default_rng([d_in, len(tensors)])
        if form == "float":
            weight = random.standard_normal((d_in, d_out), np.float32) * d_in ** -0.5
            return op("MatMul", x, constant(name, weight.astype(arguments.dtype)))
        kind, size = form.split()
        step = d_in if size == "columns" else int(size)
        scale = np.full((d_in // step, d_out), d_in ** -0.5 / 40, arguments.dtype)
        if kind == "dequantize":
            whole = constant(name, random.integers(-127, 128, (d_in, d_out), np.int8))
            blocks = {"axis": 1} if size == "columns" else {"axis": 0, "block_size": step}
            scales = constant(f"{name}.scale", scale[0] if size == "columns" else scale)
            return op("MatMul", x, op("DequantizeLinear", whole, scales, **blocks))
        bits = int(kind[-1])
        whole = constant(name, random.integers(0, 256, (d_out, d_in // step, step * bits // 8), np.uint8))
        return op("MatMulNBits", x, whole, constant(f"{name}.scale", np.ascontiguousarray(scale.T)), domain="com.microsoft",
                  K=d_in, N=d_out, bits=bits, block_size=step)

    x = "x"
    for layer in range(arguments.layers):
        gate = linear(x, d_model, d_ff, f"{layer}.gate")
        hidden = op("Mul", op("Mul", gate, op("Sigmoid", gate)), linear(x, d_model, d_ff, f"{layer}.up"))
        x = op("Add", x, linear(hidden, d_ff, d_model, f"{layer}.down"))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(arguments.dtype))
    values = [helper.make_tensor_value_info(name, kind, [1, "rows", d_model]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "stack", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    sys.exit(main())
