"""The command line as a process: ``python -m ffnfold``, what it imports, closed pipes, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ffnfold.cli import _COMMANDS


def ffnfold(*arguments, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ffnfold", *map(str, arguments)], capture_output=True, text=True, check=False,
                          **settings)


def test_python_m_ffnfold(folder, model):
    done = ffnfold("inspect", model, "--json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["ffn_blocks"]) == 3


def test_the_whole_job(folder, model, feeds):
    done = ffnfold("optimize", model, "-o", "out.onnx", "--data", feeds, "--max-drift", "cosine_mean=0.99", "--json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize("arguments", [["optimize", "no.onnx", "-o", "out.onnx"], ["verify", "no.onnx", "no.onnx", "--synthetic"],
                                       ["bench", "no.onnx"], ["inspect", "no.onnx"]])
def test_bad_input_has_no_traceback(folder, arguments):
    done = ffnfold(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ffnfold: no.onnx: no such file: check the path\n"


@pytest.mark.parametrize("code", [
    "import ffnfold",
    "import ffnfold.cli; ffnfold.cli.main(['inspect', {model!r}, '--json'], standalone_mode=False)",
    "import ffnfold; ffnfold.find_ffn_blocks(ffnfold.load({model!r}))",
])
def test_looking_at_a_graph_does_not_import_onnx_runtime(folder, model, code):
    code = (code.format(model=str(model))
            + "; import sys; sys.exit(' '.join({'onnxruntime', 'torch', 'pandas'} & set(sys.modules)) or None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_exact_passes_do_not_import_scipy(folder, model):
    code = ("from ffnfold.passes.optimize import Job, optimize_file; from ffnfold.passes.plan import EXACT_PLAN, Plan; "
            f"from pathlib import Path; optimize_file(Job(Path({str(model)!r}), Path('out.onnx'), Plan.parse(EXACT_PLAN), "
            "verify=False)); import sys; sys.exit(' '.join({'scipy', 'torch', 'pandas'} & set(sys.modules)) or None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS), ["models", "list"], ["models", "get"]])
def test_every_command_explains_itself(cli, command):
    outcome = cli(*command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith("Usage: ")
    assert len(outcome.out.splitlines()) > 5


def test_help_lists_every_command(cli):
    out = cli("--help").out
    assert all(f"  {name} " in out for name in _COMMANDS)


def test_version(cli):
    import ffnfold

    assert ffnfold.__version__ in cli("--version").out


@pytest.mark.skipif(sys.platform == "win32", reason="closed pipes")
@pytest.mark.parametrize("arguments", [["passes"], ["passes", "--json"], ["inspect", "model.onnx"], ["--help"]])
def test_a_reader_that_stops_early_ends_it_as_sigpipe_would(folder, model, arguments):
    process = subprocess.Popen([sys.executable, "-m", "ffnfold", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               cwd=folder)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(sys.platform == "win32", reason="closed pipes")
def test_an_error_that_nobody_reads_is_still_one(folder):
    process = subprocess.Popen([sys.executable, "-m", "ffnfold", "bench", "no.onnx"], stderr=subprocess.PIPE, cwd=folder)
    process.stderr.close()
    assert process.wait() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_file_name_that_is_no_text(folder, model):
    strange = Path(os.fsdecode(b"m\xffdel.onnx"))
    (folder / strange).write_bytes(model.read_bytes())
    for arguments in (["inspect", strange], ["inspect", strange, "--json"], ["optimize", strange, "-o", "out.onnx"],
                      ["inspect", Path(os.fsdecode(b"missing\xff.onnx"))]):
        done = ffnfold(*arguments, cwd=folder)
        assert "Traceback" not in done.stderr
        assert done.returncode == (2 if "missing" in str(arguments[1]) else 0)


def test_a_terminal_that_takes_ascii_only(folder, model):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for arguments in (["inspect", model], ["optimize", model, "-o", "out.onnx"], ["passes"], ["models", "list"]):
        done = ffnfold(*arguments, cwd=folder, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
