"""The esokern command through main([...]): what it prints, exit status, and errors without tracebacks."""

import io
import subprocess
import sys

import pytest
import torch

import esokern
from esokern import cli, demo, text
from esokern.models import Network, NetworkConfig, pretrained
from esokern.models.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    tokenizer = text.train_tokenizer(["def f(x):\n    return x\n" * 3], 262)
    torch.manual_seed(0)
    network = Network(NetworkConfig(vocab_size=262, hidden_size=32, n_blocks=1, n_heads=2, length=48, cond_dim=4))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(network, folder)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("sampler", cli.SAMPLERS)
def test_generate(model, capsys, sampler):
    command = ["generate", "--checkpoint", model, "--sampler", sampler, "--prompt", "def f(", "--seed", "3"]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert first.out.startswith("def f(")
    assert "network evaluations" in first.err
    assert cli.main([*command, "--no-cache"]) == 0
    assert capsys.readouterr().out == first.out
    assert cli.main([*command, "--backend", "reference"]) == 0
    assert capsys.readouterr().out == first.out


def test_generate_infills(model, capsys):
    assert cli.main(["generate", "--checkpoint", model, "--infill", "def f(x):", "return x", "--middle", "5"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("def f(x):")
    assert out.out.endswith("return x\n")
    assert out.err.startswith("5 tokens in ")


def test_generate_batch_live_and_standard_input(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("return"))
    command = ["generate", "--checkpoint", model, "--length", "20", "--batch", "2", "--steps", "inf", "--alpha0", "1"]
    assert cli.main([*command, "--prompt", "-"]) == 0
    both = capsys.readouterr().out
    assert both.startswith("--- 1 of 2, seed 0\nreturn")
    assert "--- 2 of 2, seed 1\nreturn" in both
    assert cli.main([*command, "--prompt", "return", "--live"]) == 0
    out = capsys.readouterr().out
    assert "  | return" in out
    assert out.endswith(both[both.index("--- 2") :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha0", "2"], "alpha_0: must lie in [0, 1], got 2.0"),
        (["--length", "400"], "--length: must lie in 1 .. 48, the network's length; got 400"),
        (["--prompt", "x" * 60], "--prompt: its 60 tokens leave no room in a length of 48"),
        (["--infill", "a", "b", "--middle", "90"], "more than the network's 48"),
        (["--infill", "a", "b", "--length", "9"], "--length: with --infill"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--tokenizer", "/nowhere"], "no tokenizer at /nowhere"),
        (["--top-p", "0"], "top_p"),
        (["--temperature", "nan"], "temperature"),
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--device", "tpu"], "--device: got 'tpu', supported are cpu, cuda and cuda:N"),
        (["--device", "cuda:x"], "--device: got 'cuda:x', supported are"),
        (["--batch", "0"], "batch: must be an integer of at least 1, got 0"),
    ],
)
def test_mistakes_get_a_line_not_a_traceback(model, capsys, arguments, message):
    assert cli.main(["generate", "--checkpoint", model, *arguments]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("esokern: error: ")
    assert message in out.err
    assert len(out.err.splitlines()) == 1
    with pytest.raises((ValueError, TypeError, OSError)):
        cli.main(["generate", "--checkpoint", model, *arguments, "--traceback"])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate", "--sampler", "magic"], ["generate", "--steps", "x"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: esokern" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"esokern            {esokern.__version__}" in out
    assert f"built for {', '.join(esokern.built_isas())}; in use: {esokern.get_isa()}" in out
    for name in ("torch", "back ends", "threads", "devices", "default model"):
        assert any(line.startswith(name) for line in out.splitlines()), name


@pytest.mark.parametrize("command", ["generate", "bench"])
@pytest.mark.parametrize(
    ("arguments", "gpus", "architectures", "message"),
    [
        (["--device", "cuda"], 0, None, f"--device cuda: torch {torch.__version__} "),
        (["--backend", "cuda"], 0, None, f"--device cuda: torch {torch.__version__} "),
        (["--device", "cuda:1"], 1, "90-real", "--device cuda:1: there are 1 GPUs, counted from 0"),
        (["--device", "cuda:0"], 1, None, "--device cuda:0: this installation has no CUDA kernels (see esokern info)"),
        (["--device", "cpu", "--backend", "cuda"], 0, None, "no compiled back end 'cuda' for device cpu"),
    ],
)
def test_no_gpu(model, capsys, monkeypatch, command, arguments, gpus, architectures, message):
    monkeypatch.setitem(cli.backends._DEVICE_TYPE, "cuda", "cuda")  # the emulator takes CPU tensors
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(cli.backends, "cuda_architectures", lambda: architectures)
    assert cli.main([command, "--checkpoint", model, "--length", "9", *arguments]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert len(out.err.splitlines()) == 1


def test_info_says_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.backends, "supported_isas", lambda: ["generic"])
    monkeypatch.setattr(cli.backends, "cuda_architectures", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrained, "DEFAULT_MODEL", tmp_path)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "avx2: this CPU does not have it" in out
    assert "cuda kernels       missing: when esokern was built there was no GPU or no nvcc\n" in out
    assert f"default model      missing ({tmp_path})" in out


def test_bench(model, capsys):
    sizes = ["--length", "12", "--hidden-size", "16", "--layers", "1", "--heads", "2", "--vocab", "33"]
    for arguments in (sizes, ["--checkpoint", model, "--length", "12"]):
        assert cli.main(["bench", "--repeats", "1", *arguments]) == 0
        out = capsys.readouterr().out
        assert "Eso-LM, recomputed" in out
        assert "chose the same tokens: 12 of 12" in out


def test_train_is_handed_over(monkeypatch):
    given = []
    monkeypatch.setattr(cli.train, "main", lambda arguments: given.append(arguments) or 0)
    assert cli.main(["train", "--steps", "3", "--help"]) == 0
    assert given == [["--steps", "3", "--help"]]


def test_demo_with_another_checkpoint(capsys, monkeypatch, model):
    shown = []
    monkeypatch.setattr(demo, "run", lambda network, tokenizer, **options: shown.append(options))
    assert cli.main(["demo", "--checkpoint", model, "--seconds", "0"]) == 0
    assert shown == [{"seconds": 0.0, "seed": 1}]


def test_module_and_closed_pipe(model, tmp_path):
    """python -m esokern works, and a reader that stops early gets no traceback."""
    command = [sys.executable, "-m", "esokern", "generate", "--checkpoint", model, "--threads", "1"]
    # Elsewhere than in the source tree, which `-m` would put first: the package under test is the installed one.
    here = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run([*command, "--temperature", "0"], check=True, **here)
    assert "network evaluations" in done.stderr
    with subprocess.Popen(command, **here) as early:
        early.stdout.close()
        assert "Traceback" not in early.stderr.read()
    assert early.returncode == 1
