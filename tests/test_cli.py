"""The esokern command through main([...]): what it prints, exit status, and errors without tracebacks."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esokern
from esokern import cli, demo, evaluate, text
from esokern.models import Network, NetworkConfig, pretrained
from esokern.models.checkpoint import load_checkpoint, save_checkpoint


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


@pytest.fixture
def prose(tmp_path):
    """108 tokens and a separator of the fixture's vocabulary at most: two whole rows of 48 and a shorter one."""
    file = tmp_path / "prose.txt"
    file.write_text("def f(x):\n    return y\n" * 11 + "déjà vu", encoding="utf-8")
    return str(file)


def evaluated(capsys, *arguments):
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["esolm", "--alpha0", "0.5"], ["mdlm"], ["bd3lm", "--block-size", "5"], ["ar"]])
def test_evaluate(model, prose, capsys, arguments):
    command = ["--checkpoint", model, "--text", prose, "--orders", "3", "--draws", "2", "--model", *arguments]
    found = evaluated(capsys, *command)
    tokens = text.Tokenizer.from_file(model).encode(Path(prose).read_text(encoding="utf-8"))
    given = found["rows"] if arguments[0] == "ar" else 0
    assert found["rows"] == math.ceil((len(tokens) + 1) / 48) >= 2
    assert found["tokens"] == len(tokens) + 1 - given
    kinds = [(estimate["kind"], estimate["samples"]) for estimate in found["estimates"]]
    if arguments[0] == "ar":
        assert kinds == [("exact", 1)]
        assert found["bytes"] < len(Path(prose).read_bytes())
    else:
        assert kinds == [("nelbo", 2)] + [("importance_weighted", k) for k in (1, 2, 3)]
        assert found["bytes"] == len(Path(prose).read_bytes())
    for estimate in found["estimates"]:
        nats = estimate["nats_per_token"]
        assert 0 < nats < 20
        assert estimate["perplexity"] == pytest.approx(math.exp(nats))
        assert estimate["bits_per_byte"] * found["bytes"] * math.log(2) == pytest.approx(nats * found["tokens"])
        assert estimate["nats_per_token_se_rows"] > 0
        assert (estimate["nats_per_token_se_noise"] == 0) == (arguments[0] == "ar")
    assert evaluated(capsys, *command)["estimates"] == found["estimates"]  # one seed, one result
    assert cli.main(["evaluate", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"; {prose}")
    assert "rows of 48 tokens, the last one shorter; " in lines[1]
    shown = f"{found['estimates'][-1]['nats_per_token']:.4f}"
    assert lines[-3].split()[1 if arguments[0] == "ar" else 2] == shown


def test_evaluate_reads_the_recipe(model, prose, capsys, tmp_path):
    network, folder = load_checkpoint(model), tmp_path / "trained"
    recipe = {"objective": "bd3lm", "alpha_0": 0.25, "variant": "A", "block_size": 6}
    save_checkpoint(network, folder, extra={"recipe": recipe})
    text.Tokenizer.from_file(model).save(folder / "tokenizer.json")
    common = ["--checkpoint", str(folder), "--text", prose]
    found = evaluated(capsys, *common)
    assert (found["model"], found["block_size"]) == ("bd3lm", 6)
    assert [e["kind"] for e in found["estimates"]] == ["nelbo"]  # an order takes several passes: not by default
    assert evaluated(capsys, *common, "--block-size", "1")["estimates"][0]["kind"] == "exact"
    other = evaluated(capsys, *common, "--model", "esolm", "--orders", "0")
    assert other["alpha_0"] == 1.0  # what was trained as something else says nothing about it
    save_checkpoint(network, folder, extra={"recipe": {**recipe, "objective": "esolm"}})
    found = evaluated(capsys, *common)
    assert (found["alpha_0"], found["variant"]) == (0.25, "A")
    assert [e["kind"] for e in found["estimates"]] == ["nelbo"]
    found = evaluated(capsys, *common, "--variant", "B", "--alpha0", "0")
    assert [e["kind"] for e in found["estimates"]] == ["exact"]


def test_evaluate_rows_and_sources(model, prose, capsys, monkeypatch, tmp_path):
    common = ["--checkpoint", model, "--model", "esolm", "--orders", "1", "--draws", "1"]
    whole = evaluated(capsys, *common, "--text", prose, "--rows", "0", "--length", "10")
    some = evaluated(capsys, *common, "--text", prose, "--rows", "3", "--length", "10")
    assert whole["rows"] > some["rows"] == 3
    assert some["tokens"] == 20 + (whole["tokens"] - 1) % 10 + 1
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(prose).read_text(encoding="utf-8")))
    read = evaluated(capsys, *common, "--text", "-", "--rows", "0", "--length", "10")
    assert read["estimates"] == whole["estimates"]
    assert whole["estimates"][0]["nats_per_token_se_noise"] is None  # of one draw nobody can tell
    (tmp_path / "two.md").write_text("return x")
    folder = evaluated(capsys, *common, "--corpus", str(tmp_path))
    assert folder["bytes"] == whole["bytes"] + 8
    one_row = evaluated(capsys, *common, "--text", str(tmp_path / "two.md"))
    assert one_row["estimates"][0]["nats_per_token_se_rows"] is None
    corpus = evaluated(capsys, *common, "--rows", "2")
    assert (corpus["rows"], corpus["text"]) == (2, "held-out files of Python's standard library")


def test_evaluate_without_bytes(model, prose, capsys, monkeypatch):
    """A vocabulary that does not account for every byte gives no bits per byte."""
    sizes = text.Tokenizer.n_bytes
    monkeypatch.setattr(text.Tokenizer, "n_bytes", lambda self: sizes(self) // 2)
    command = ["--checkpoint", model, "--model", "ar", "--text", prose]
    found = evaluated(capsys, *command)
    assert found["bytes"] is found["estimates"][0]["bits_per_byte"] is None
    assert cli.main(["evaluate", *command]) == 0
    assert "bytes;" not in capsys.readouterr().out


def test_evaluate_without_separator(model):
    tokenizer = text.Tokenizer.from_file(model)
    documents = [text.Document("", "return x"), text.Document("", "x")]
    ids = [tokenizer.encode(document.text) for document in documents]
    assert evaluate._encode(documents, tokenizer)[0] == [0, *ids[0], 0, *ids[1]]
    tokenizer.eos_id = None
    stream, sizes = evaluate._encode(documents, tokenizer)
    assert stream == ids[0] + ids[1]
    assert sizes[stream].sum() == 9
    assert evaluate._encode([], tokenizer)[0] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model: {model} does not say what it is; one of esolm, mdlm, bd3lm, ar is needed"),
        (["--model", "bd3lm"], "block_size: BD3-LM needs one of at least 1, got None"),
        (["--model", "mdlm", "--alpha0", "1"], "--alpha0: belongs to esolm, the model is mdlm"),
        (["--model", "ar", "--block-size", "4"], "--block-size: belongs to bd3lm, the model is ar"),
        (["--model", "esolm", "--alpha0", "2"], "alpha_0: must lie in [0, 1], got 2.0"),
        (["--model", "esolm", "--variant", "A", "--orders", "2"], "Eso-LM (A) has no likelihood given an order"),
        (["--model", "esolm", "--draws", "0", "--orders", "0"], "--draws and --orders: both are 0"),
        (["--model", "esolm", "--draws", "-1"], "draws and num_orders: must be at least 0, got -1 and 16"),
        (["--model", "esolm", "--length", "49"], "--length: must lie in 1 .. 48, the network's length; got 49"),
        (["--model", "esolm", "--rows", "-1"], "--rows: must be at least 0, got -1"),
        (["--model", "esolm", "--text", "/nowhere"], "--text: there is no /nowhere"),
        (["--model", "esolm", "--corpus", "/nowhere"], "--corpus: there is no /nowhere"),
        (["--model", "esolm", "--corpus", "{model}"], "--corpus: no .txt, .md or .py file in {model}"),
        (["--model", "ar", "--text", "/dev/null"], "/dev/null: has one token, which says nothing"),
        (["--model", "esolm", "--checkpoint", "/nowhere"], "/nowhere"),
        (["--model", "esolm", "--tokenizer", "/nowhere"], "no tokenizer at /nowhere"),
    ],
)
def test_evaluate_mistakes(model, capsys, arguments, message):
    arguments = [argument.format(model=model) for argument in arguments]
    assert cli.main(["evaluate", "--checkpoint", model, *arguments]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("esokern: error: ")
    assert message.format(model=model) in out.err
    assert len(out.err.splitlines()) == 1


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
