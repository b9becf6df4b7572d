"""The demo and its live view, on a small random network and a tokenizer made on the spot."""

import io
import re

import pytest
import torch

from esokern import demo, text
from esokern.models import Network, NetworkConfig, load_model, pretrained
from esokern.models.checkpoint import save_checkpoint
from esokern.samplers.run import StepInfo
from esokern.samplers.schedule import Schedule


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows after these characters: lines, cursor-up and clear-to-end are enough here."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\r" or (part.startswith("\x1b") and part.endswith(("m", "h", "l"))):
            continue
        elif part.startswith("\x1b") and part.endswith("A"):
            row -= int(part[2:-1])
        elif part.startswith("\x1b") and part.endswith("J"):
            lines[row:] = [""]
        else:
            lines[row] += part
    return lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    tokenizer = text.train_tokenizer([demo.PROMPT, demo.PREFIX, demo.SUFFIX], 290)
    config = NetworkConfig(vocab_size=290, hidden_size=32, n_blocks=1, n_heads=2, length=224, cond_dim=4)
    torch.manual_seed(0)
    network = Network(config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(network, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.fixture
def tokenizer():
    return text.train_tokenizer(["abc def\n" * 4], 258)


def step(index, phase, positions, tokens):
    return StepInfo(
        index, phase, torch.zeros(len(tokens), dtype=torch.int64), torch.tensor(positions), torch.tensor(tokens)
    )


def live(tokenizer, stream, given="ab", gap=3):
    """Two given tokens, three masks, decoded as 'x', newline, 'z' in two steps."""
    start = torch.tensor(tokenizer.encode(given) + [tokenizer.mask_id] * gap)
    x, newline, z = (tokenizer.encode(c)[0] for c in ("x", "\n", "z"))
    schedule = Schedule.from_steps([[(4, 2), (3,)]], [1])
    with demo.LiveText(tokenizer, start, schedule, stream=stream) as view:
        view.drawn_at = 0.0
        view(step(0, "diffusion", [4, 2], [z, x]))
        middle = stream.getvalue()
        view(step(1, "sequential", [3], [newline]))
    return middle


def test_live_text_in_a_terminal(tokenizer):
    terminal = Terminal()
    middle = live(tokenizer, terminal)
    assert screen(middle)[:2] == ["  abx·z", "step    1 of 2      2 of 3 tokens   diffusion"]
    assert "\x1b[36m\x1b[7mx\x1b[0m" in middle  # new by diffusion
    assert screen(terminal.getvalue()) == ["  abx", "  z", ""]
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back
    assert "\x1b[7m" not in terminal.getvalue()[len(middle) :].split("\x1b[J")[-1]


def test_live_text_elsewhere(tokenizer, monkeypatch):
    plain = io.StringIO()
    live(tokenizer, plain)
    assert "\x1b" not in plain.getvalue()
    assert plain.getvalue().splitlines() == [
        "  step    1 of 2      2 of 3 tokens   diffusion",
        "  step    2 of 2      3 of 3 tokens   sequential",
        "  | abx",
        "  | z",
    ]
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    live(tokenizer, terminal)
    assert terminal.getvalue() == plain.getvalue()


def test_live_text_longer_than_the_terminal(tokenizer, monkeypatch):
    """Redrawing never moves above what is on the screen; the whole text is there at the end."""
    monkeypatch.setenv("LINES", "8")
    terminal = Terminal()
    start = torch.tensor([*tokenizer.encode("a\n" * 30), tokenizer.mask_id])
    with demo.LiveText(tokenizer, start, stream=terminal) as view:
        view.drawn_at = 0.0
        view(step(0, "sequential", [60], tokenizer.encode("z")))
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", terminal.getvalue())]
    assert max(ups) <= 8 - 2
    assert screen(terminal.getvalue()) == ["  a"] * 30 + ["  z", ""]


def test_live_text_is_paced(tokenizer):
    start = torch.tensor([tokenizer.mask_id])
    schedule = Schedule.from_steps([[(0,)]], [0])
    with demo.LiveText(tokenizer, start, schedule, seconds=0.05, stream=Terminal()) as view:
        view(step(0, "sequential", [0], [5]))
    assert view.waited > 0.0


def test_demo(model):
    network, tokenizer = load_model(model)
    for stream in (io.StringIO(), Terminal()):
        demo.run(network, tokenizer, seconds=0.0, stream=stream)
        shown = stream.getvalue()
        for name in ("Eso-LM, cached", "Eso-LM, recomputed", "MDLM", "BD3-LM, blocks of 16", "AR"):
            assert re.search(rf"^  {re.escape(name)} +\d+ +[\d.]+ +\d+ +[\d.]+x$", shown, re.M), name
        found = re.search(r"cached and recomputed runs chose the same tokens: (\d+) of (\d+)", shown)
        assert found
        assert found[1] == found[2]
    assert "\x1b[36mdiffusion\x1b[0m" in shown


def test_load_model_errors(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_model(model, tokenizer=tmp_path)
    other = text.train_tokenizer(["abc"], 258)
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="258 ids with the mask, the network 290"):
        load_model(model, tokenizer=tmp_path)
    monkeypatch.setattr(pretrained, "DEFAULT_MODEL", tmp_path / "absent")
    with pytest.raises(ValueError, match="default model is missing"):
        load_model()
