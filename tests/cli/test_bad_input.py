"""Bad input: exit code 2, one line on stderr that says what is wrong, no traceback, nothing written, the input untouched."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from feed_files import write_feeds
from ffn_graphs import Sketch, transformer


def truncated(path, folder, keep):
    cut = folder / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:keep])
    return cut


MODELS = {
    "missing": lambda folder, model: folder / "missing.onnx",
    "a folder": lambda folder, model: folder,
    "empty": lambda folder, model: write(folder / "empty.onnx", b""),
    "text": lambda folder, model: write(folder / "text.onnx", b"hello, this is no model\n" * 40),
    "zeros": lambda folder, model: write(folder / "zeros.onnx", bytes(4096)),
    "noise": lambda folder, model: write(folder / "noise.onnx", np.random.default_rng(0).bytes(4096)),
    "half": lambda folder, model: truncated(model, folder, model.stat().st_size // 2),
    "all but a byte": lambda folder, model: truncated(model, folder, model.stat().st_size - 1),
    "a tenth": lambda folder, model: truncated(model, folder, model.stat().st_size // 10),
    "an .npz file": lambda folder, model: npz(folder / "other.onnx", x=np.ones(3)),
    "no external data": lambda folder, model: external(folder, lambda data: data.unlink()),
    "short external data": lambda folder, model: external(folder, lambda data: data.write_bytes(data.read_bytes()[:-100])),
    "external data is a folder": lambda folder, model: external(folder, lambda data: (data.unlink(), data.mkdir())),
}
UNRUNNABLE = {**MODELS, "an opset of the future": lambda folder, model: future(folder)}


def write(path, data):
    path.write_bytes(data)
    return path


def npz(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def external(folder, spoil):
    path = transformer(1, 16, 64).save(folder / "outside.onnx", save_as_external_data=True, location="outside.data")
    spoil(folder / "outside.data")
    return path


def future(folder):
    proto = transformer(1).model()
    proto.opset_import[0].version = 9999
    return write(folder / "future.onnx", proto.SerializeToString())


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_read(refused_and_unchanged, folder, model, feeds, kind):
    bad = MODELS[kind](folder, model)
    line = refused_and_unchanged("optimize", bad, "-o", "out.onnx", "-p", "quantize-ffn")
    assert bad.name in line
    assert line.startswith("ffnfold: ")


@pytest.mark.parametrize("kind", UNRUNNABLE)
def test_a_model_that_cannot_be_verified(refused_and_unchanged, folder, model, feeds, kind):
    bad = UNRUNNABLE[kind](folder, model)
    assert bad.name in refused_and_unchanged("verify", bad, model, "--data", feeds)
    assert bad.name in refused_and_unchanged("verify", model, bad, "--data", feeds)


@pytest.mark.parametrize("kind", UNRUNNABLE)
def test_a_model_that_cannot_be_timed(refused_and_unchanged, folder, model, kind):
    bad = UNRUNNABLE[kind](folder, model)
    assert bad.name in refused_and_unchanged("bench", bad, model, "--shape", "x=1x4x8")
    assert bad.name in refused_and_unchanged("bench", model, bad, "--shape", "x=1x4x8")


@pytest.mark.parametrize(("text", "said"), [
    ("shrink-ffn", "there is no pass 'shrink-ffn'"),
    ("quantize_ffn", "there is no pass 'quantize_ffn'"),
    ("", "there is no pass ''"),
    ("quantize-ffn:colour=4", "has no option 'colour': it has blocks, target, form, bits,"),
    ("fold-bias:blocks=0", "has no option 'blocks': it has none"),
    ("quantize-ffn:form=int4", "quantize-ffn:form=int4: choose one of by-target, dynamic, nbits, weight-only"),
    ("quantize-ffn:row_scale=perhaps", "choose one of auto, true, false"),
    ("quantize-ffn:form=dynamic,bits=4", "form=dynamic has kernels for 8 bits only"),
    ("quantize-ffn:block_size=32", "block_size is for form=nbits"),
    ("quantize-ffn:bits=4,block_size=24", "a power of two"),
    ("quantize-ffn:strength=2", "lies between 0 and 1"),
    ("quantize-ffn:row_scale", "NAME:KEY=VALUE"),
    ("quantize-ffn:", "NAME:KEY=VALUE"),
    ("quantize-ffn:form=dynamic,form=dynamic", "given twice"),
    ("quantize-ffn:blocks=one", "write it like 0+3-5"),
    ("quantize-ffn:blocks=", "write it like 0+3-5"),
    ("quantize-ffn:blocks=-1", "write it like 0+3-5"),
    ("quantize-ffn:blocks=2-1", "backwards"),
    ("quantize-ffn:blocks=0-99999999", "100,000"),
    ("quantize-ffn:blocks=3", "there is no block 3: the model has blocks 0 to 2"),
    ("remove-ffn:count=1.5", "not a number"),
    ("remove-ffn:count=-1", "negative"),
    ("remove-ffn:count=1,fraction=0.5", "not both"),
    ("remove-ffn:fraction=2", "between 0 and 1"),
    ("remove-ffn:fraction=nan", "fraction=nan"),
    ("linearize-ffn:fit=spline", "choose one of affine, stein, neuron"),
])
def test_a_pass_that_cannot_be_run(refused_and_unchanged, model, feeds, text, said):
    assert said in refused_and_unchanged("optimize", model, "-o", "out.onnx", "-p", text, "--data", feeds)


def test_a_later_pass_that_cannot_be_run_stops_the_first_one_too(refused_and_unchanged, model):
    assert "block 7" in refused_and_unchanged("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn", "-p",
                                              "remove-ffn:blocks=7,keep=nothing")


@pytest.mark.parametrize("text", ["linearize-ffn", "remove-ffn", "remove-ffn:keep=nothing,count=1"])
def test_a_pass_that_needs_feeds(refused_and_unchanged, model, text):
    line = refused_and_unchanged("optimize", model, "-o", "out.onnx", "-p", text)
    assert "needs real inputs with these options: give them with --data FEEDS" in line


FEEDS = {
    "missing": (lambda folder: folder / "nowhere", "no such feed"),
    "an empty folder": (lambda folder: made(folder / "empty"), "holds no feed"),
    "another name": (lambda folder: feed(folder, pixels=np.ones((1, 2, 8), np.float32)), "has no input 'pixels'"),
    "a name too many": (lambda folder: feed(folder, x=np.ones((1, 2, 8), np.float32), z=np.ones(1)), "has no input 'z'"),
    "no arrays": (lambda folder: feed(folder), "'x' is missing"),
    "doubles": (lambda folder: feed(folder, x=np.ones((1, 2, 8))), "expected float32, given float64"),
    "whole numbers": (lambda folder: feed(folder, x=np.ones((1, 2, 8), np.int64)), "expected float32, given int64"),
    "objects": (lambda folder: feed(folder, x=np.array([None, 1])), "pickled"),
    "another width": (lambda folder: feed(folder, x=np.ones((1, 2, 9), np.float32)), "[batch, tokens, 8], given [1, 2, 9]"),
    "another rank": (lambda folder: feed(folder, x=np.ones((2, 8), np.float32)), "given [2, 8]"),
    "no .npz": (lambda folder: write(folder / "feed.npz", b"nothing"), "is not an .npz file"),
    "half an .npz": (lambda folder: halved(feed(folder, x=np.ones((9, 99, 8), np.float32))), "feed.npz"),
    "one bad of many": (lambda folder: mixed(folder), "given [3]"),
    "a test_data_set without inputs": (lambda folder: made(folder / "sets" / "test_data_set_0").parent, "holds no feed"),
    "a test_data_set of noise": (lambda folder: noise(folder), "input_0.pb"),
    "a divided folder without report": (lambda folder: divided(folder), "has no folder 'report'"),
}


def made(folder):
    folder.mkdir(parents=True)
    return folder


def feed(folder, **arrays):
    return npz(folder / "feed.npz", **arrays)


def halved(path):
    return write(path, path.read_bytes()[:path.stat().st_size // 2])


def mixed(folder):
    npz(write_feeds(folder / "mixed", 3) / "99.npz", x=np.ones(3, np.float32))
    return folder / "mixed"


def noise(folder):
    write(made(folder / "noise" / "test_data_set_0") / "input_0.pb", b"\xff" * 50)
    return folder / "noise"


def divided(folder):
    write_feeds(folder / "divided" / "fit", 2)
    return folder / "divided"


@pytest.mark.parametrize("kind", FEEDS)
def test_feeds_that_do_not_fit(refused_and_unchanged, folder, model, kind):
    make, said = FEEDS[kind]
    place = make(folder)
    assert said in refused_and_unchanged("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn", "--data", place)


@pytest.mark.parametrize("kind", [kind for kind in FEEDS if "divided" not in kind])
def test_feeds_that_do_not_fit_verify(refused_and_unchanged, folder, model, kind):
    make, said = FEEDS[kind]
    assert said in refused_and_unchanged("verify", model, model, "--data", make(folder))


@pytest.mark.parametrize(("text", "said"), [
    ("cosine_mean", "write it like cosine_mean=0.99"),
    ("cosine_mean=", "write it like"),
    ("=0.9", "write it like"),
    ("cosine_mean=high", "'high' is not a number"),
    ("cosine_mean=nan", "'nan' is not a number"),
    ("accuracy=0.9", "no metric 'accuracy'"),
    ("cosine_mean@z=0.9", "no output 'z'"),
    ("top1=0.9", "for outputs that are logits"),
])
def test_limits_that_mean_nothing(refused_and_unchanged, model, feeds, text, said):
    for command in (("optimize", model, "-o", "out.onnx"), ("verify", model, model)):
        assert said in refused_and_unchanged(*command, "--data", feeds, "--max-drift", text)


def test_feeds_that_are_padding_or_empty_compare_nothing(refused_and_unchanged, folder, model):
    s = Sketch()
    mask = s.op("Cast", s.input("attention_mask", ["batch", "tokens"], onnx.TensorProto.INT64), to=1)
    x = s.input("x", ["batch", "tokens", 8])
    s.op("Mul", x, s.op("Unsqueeze", mask, s.weight(np.array([2]))), out=s.output("y", ["batch", "tokens", 8]))
    masked = s.save(folder / "masked.onnx")
    padded = npz(folder / "padded.npz", x=np.ones((2, 3, 8), np.float32), attention_mask=np.zeros((2, 3), np.int64))
    empty = npz(folder / "empty.npz", x=np.ones((0, 3, 8), np.float32))
    for path, data in ((masked, padded), (model, empty)):
        limits = ("--data", data, "--max-drift", "cosine_mean=0.9")
        for arguments in (["verify", path, path, *limits], ["verify", path, path, "--data", data, "--per-block"],
                          ["optimize", path, "-o", "out.onnx", "-p", "clean-up", *limits, "--strict"],
                          ["search", path, "-o", "out.onnx", *limits, "--cache", folder.parent / "cache"]):
            assert "no row to compare: every row of the feeds" in refused_and_unchanged(*arguments)


@pytest.mark.parametrize("plan", [["-p", "quantize-ffn"], []])
def test_metrics_of_logits_want_logits(refused_and_unchanged, cli, model, feeds, plan):
    job = ["optimize", model, "-o", "out.onnx", *plan, "--data", feeds, "--max-drift", "top1@y=0.5"]
    assert "name them with --logits y" in refused_and_unchanged(*job)


def test_metrics_of_logits_of_an_output_by_another_name(cli, model, feeds):
    job = ["optimize", model, "-o", "out.onnx", "-p", "quantize-ffn", "--data", feeds, "--logits", "y", "--json"]
    for limit in ("top1@y=0.5", "top1=0.5"):
        found = cli(*job, "--max-drift", limit)
        assert found.code == 0
        assert found.json["drift"]["outputs"]["y"]["top1"] > 0.5


def test_limits_need_something_to_measure_on(refused_and_unchanged, model):
    assert "--data" in refused_and_unchanged("optimize", model, "-o", "out.onnx", "--max-drift", "rel_l2=1")


def test_limits_need_a_measurement(refused_and_unchanged, model, feeds):
    assert "--no-verify" in refused_and_unchanged("optimize", model, "-o", "out.onnx", "--data", feeds, "--no-verify",
                                                  "--max-drift", "rel_l2=1")


def test_verify_without_feeds(refused_and_unchanged, model):
    assert "--data FEEDS, or --synthetic" in refused_and_unchanged("verify", model, model)


def test_logits_that_are_no_output(refused_and_unchanged, model, feeds):
    assert "logits 'z'" in refused_and_unchanged("verify", model, model, "--data", feeds, "--logits", "z")


PLANS = {
    "missing": (None, "no such plan file"),
    "not YAML": ("- a: [unclosed\n  b: }", "not YAML"),
    "bytes": (b"\xff\xfe\x00binary", "plan.yaml"),
    "a text": ("quantize-ffn\n", "a plan is a list of passes"),
    "empty": ("", "a plan is a list of passes"),
    "a mapping": ("quantize-ffn:\n  form: dynamic\n", "a plan is a list of passes"),
    "a number": ("- 7\n", "'7' is no pass"),
    "two in one entry": ("- fold-bias:\n  quantize-ffn:\n", "is no pass"),
    "options that are no mapping": ("- quantize-ffn: [form, dynamic]\n", "is no pass"),
    "an unknown pass": ("- fold-bias\n- melt-ffn\n", "there is no pass 'melt-ffn'"),
    "an unknown option": ("- quantize-ffn: {colour: 4}\n", "has no option 'colour'"),
    "a wrong value": ("- quantize-ffn: {form: 7}\n", "choose one of"),
    "a value that is nothing": ("- quantize-ffn: {blocks: null}\n", "option 'blocks' of 'quantize-ffn' has no value"),
    "an option given twice": ("- quantize-ffn: {bits: 8, bits: 4}\n", "'bits' is given twice"),
    "a nested value": ("- quantize-ffn: {blocks: {a: 1}}\n", "write it like 0+3-5"),
    "an object of Python": ("- !!python/object/apply:os.system [ls]\n", "not YAML"),
    "a block that is not there": ("- quantize-ffn: {blocks: 9}\n", "there is no block 9"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_plans_that_cannot_be_read(refused_and_unchanged, folder, model, kind):
    content, said = PLANS[kind]
    if content is not None:
        write(folder / "plan.yaml", content if isinstance(content, bytes) else content.encode())
    assert said in refused_and_unchanged("optimize", model, "-o", "out.onnx", "--plan", "plan.yaml")


def test_a_plan_that_is_a_folder(refused_and_unchanged, folder, model, feeds):
    assert "feeds" in refused_and_unchanged("optimize", model, "-o", "out.onnx", "--plan", feeds)


def test_passes_and_a_plan_together(refused_and_unchanged, model):
    assert "not both" in refused_and_unchanged("optimize", model, "-o", "out.onnx", "-p", "fold-bias", "--plan", "plan.yaml")


@pytest.mark.parametrize(("arguments", "said"), [
    (["optimize", "model.onnx"], "optimize: Missing option '-o' / '--output' (see ffnfold optimize --help)"),
    (["optimize", "-o", "out.onnx"], "optimize: Missing argument 'MODEL'"),
    (["optimize", "model.onnx", "-o", "out.onnx", "--target", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
    (["optimize", "model.onnx", "-o", "out.onnx", "--provider", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
    (["optimize", "model.onnx", "-o", "out.onnx", "--threads", "many"], "'many' is not a valid integer"),
    (["optimize", "model.onnx", "-o", "out.onnx", "--faster"], "optimize: No such option"),
    (["optimize", "model.onnx", "-o", "out.onnx", "--data", ""], "'--data': the path is empty"),
    (["optimize", "model.onnx", "-o", "new/"], "'new/' is a folder: give the path of the file to write"),
    (["inspect"], "inspect: Missing argument 'MODEL...'"),
    (["inspect", "--yaml", "model.onnx"], "No such option"),
    (["verify", "model.onnx"], "Missing argument 'CANDIDATE'"),
    (["bench"], "Missing argument"),
    (["bench", "model.onnx", "--max-regression", "-1", "--baseline", "x"], "'-1' is no percentage"),
    (["bench", "model.onnx", "--seconds", "inf"], "'inf' is no finite number"),
    (["bench", "model.onnx", "--seconds", "nan"], "'nan' is no finite number"),
    (["bench", "model.onnx", "--csv", "new/"], "'new/' is a folder"),
    (["search", "model.onnx", "-o", "out.onnx", "--data", "feeds", "--budget", "nan"], "'nan' is no finite number"),
    (["search", "model.onnx", "-o", "out.onnx", "--data", "feeds", "--min-speedup", "nan"], "'nan' is no finite number"),
    (["search", "model.onnx", "-o", "new/", "--data", "feeds"], "'new/' is a folder"),
    (["models", "fetch"], "ffnfold models: No such command 'fetch' (see ffnfold models --help)"),
    (["models", "get"], "ffnfold models get: Missing argument 'NAME' (see ffnfold models get --help)"),
    (["explain"], "ffnfold: No such command 'explain' (see ffnfold --help)"),
])
def test_usage_errors(refused_and_unchanged, model, arguments, said):
    line = refused_and_unchanged(*arguments)
    assert line.startswith("ffnfold")
    assert said in line


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="has a GPU")
def test_cuda_that_is_not_there(refused_and_unchanged, model, feeds):
    for command in (["optimize", model, "-o", "out.onnx"], ["verify", model, model], ["bench", model]):
        assert "cuda" in refused_and_unchanged(*command, "--data", feeds, "--provider", "cuda")


def test_line_breaks_in_names_stay_in_one_line(refused_and_unchanged, folder):
    proto = transformer(1).model()
    proto.graph.node[3].op_type = "No\nSuch\nOperator"
    bad = write(folder / "bad.onnx", proto.SerializeToString())
    assert "bad.onnx" in refused_and_unchanged("bench", bad, "--shape", "x=1x4x8")
