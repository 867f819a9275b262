#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go. Leaves logs and JSON files in OUT; exit code 1 if any step failed.
#
#   bash benchmarks/on_cuda.sh OUT [STEP...]        steps: probe tests forms bench (default: all, in this order)
#
#   probe   versions, and whether ONNX Runtime gets to the GPU; where it does not, why, and one attempt with LD_LIBRARY_PATH
#   tests   the tests marked cuda
#   forms   benchmarks/int8_forms.py: which form of integer weights is fastest here
#   bench   benchmarks/cuda.py: the decoder with the shapes of a 7B model (20 GB of disk under $TMPDIR)
#
# Run it from the root of the checkout, with a Python that has ffnfold, onnxruntime-gpu, pytest, pytest-timeout and hypothesis.
# PYTHON, TESTS_SECONDS, FORMS_SECONDS and BENCH_SECONDS may be set; BENCH_OPTIONS goes to benchmarks/cuda.py.
set -uo pipefail
out=${1:?usage: on_cuda.sh OUT [probe] [tests] [forms] [bench]}; shift
steps=("$@"); [ ${#steps[@]} -gt 0 ] || steps=(probe tests forms bench)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS; shift 2
  echo "== $name"
  if timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"; then result=ok; else result="FAILED (exit code ${PIPESTATUS[0]})"; failed=1; fi
  echo "== $name: $result, $((SECONDS - start)) s"
}

probe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
  "$python" - <<'PROBE'
import ctypes, pathlib, platform, sys, tempfile
import numpy, onnx, onnxruntime, scipy
import ffnfold
from ffnfold.runtime import Feeds, race
from ffnfold.runtime.cuda_libraries import library_folders
print("python", platform.python_version(), "onnxruntime", onnxruntime.__version__, getattr(onnxruntime, "cuda_version", None),
      "numpy", numpy.__version__, "scipy", scipy.__version__, "onnx", onnx.__version__, "ffnfold", ffnfold.__file__)
print("providers", onnxruntime.get_available_providers(), "libraries", [str(folder) for folder in library_folders()])
value = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "probe", value[:1], value[1:])
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "probe.onnx"
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    try:
        found = race([path], Feeds.of([{"x": numpy.ones(4, numpy.float32)}]), provider="cuda", seconds=0, min_rounds=5)
    except ffnfold.InputError as error:
        library = pathlib.Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
        try:
            ctypes.CDLL(str(library))
        except OSError as reason:
            print("the provider does not load:", reason)
        sys.exit(f"no CUDA: {error}")
print(found["machine"], found["models"][0]["nodes_by_provider"])
PROBE
}

for name in "${steps[@]}"; do
  case $name in
    probe)
      export -f probe; export python
      step probe 120 bash -c probe
      if [ "$failed" = 1 ]; then
        folders=$("$python" -c 'from ffnfold.runtime.cuda_libraries import library_folders as f; print(":".join(map(str, f())))')
        export LD_LIBRARY_PATH="$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        echo "again with LD_LIBRARY_PATH=$LD_LIBRARY_PATH"
        step probe_again 120 bash -c probe
      fi ;;
    tests)
      step tests "${TESTS_SECONDS:-300}" "$python" -m pytest -q -m cuda -p no:cacheprovider --continue-on-collection-errors \
        --durations=5 --junitxml="$out/tests.xml" tests ;;
    forms)
      step forms "${FORMS_SECONDS:-200}" "$python" benchmarks/int8_forms.py --json "$out/int8_forms.json" ;;
    bench)
      # shellcheck disable=SC2086
      step bench "${BENCH_SECONDS:-560}" "$python" benchmarks/cuda.py --json "$out/cuda.json" ${BENCH_OPTIONS:-} ;;
    *) echo "no step '$name'"; failed=1 ;;
  esac
done
exit $failed
