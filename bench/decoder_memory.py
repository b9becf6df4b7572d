"""Peak memory of drawing tokens, the decoders' own part of a step, at a vocabulary of 126,464 (LLaDA's).

    python bench/decoder_memory.py [--checkouts DIR] [--batch 1 8] [--record]

The network is nothing but an embedding of 512 and an LM head that share their weights, so what a step adds to the
memory of the process is the logits and what is made of them. One step at temperature 1 decides 256 tokens after a
prompt of 64. Each decoder runs in a process of its own; its peak is the largest resident set (VmHWM) beyond what was
resident before the step, after a small step has loaded all code. DIR is that of bench/decoders.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional

import checkouts
import decoders as timings
import eager
import esokern
from esokern import decoders
from esokern.models.denoiser import CallableDenoiser
from harness import Recorder, Timing

HIDDEN, VOCAB = 512, 126464
MASK = VOCAB - 1
PEAK_PER_LOGIT = 48  # bytes, more than the hungriest takes: not to be started where memory is short


class HeadOnly(torch.nn.Module):
    """What published decoders call: tokens -> an object with logits."""

    device = torch.device("cpu")

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: torch.Tensor, attention_mask: None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=functional.linear(functional.embedding(tokens, self.weight), self.weight))


def candidates(root: Path | None) -> dict[str, Callable[[torch.Tensor, int], object]]:
    """name -> decode(prompt [batch, length], number of new tokens), one step."""
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)).mul_(HIDDEN**-0.5)
    network = HeadOnly(weight)
    denoiser = CallableDenoiser(
        lambda tokens, positions, cache: functional.embedding(tokens, weight), vocab_size=VOCAB, head_weight=weight
    )

    def ours(prompt: torch.Tensor, new: int) -> object:
        decoder = decoders.LLaDA(steps=1, temperature=1.0)
        return esokern.generate(denoiser, prompt, decoder=decoder, max_new_tokens=new, mask_id=MASK)

    def plain(prompt: torch.Tensor, new: int) -> object:
        text = functional.pad(prompt, (0, new), value=MASK)
        return eager.llada(lambda x: network(x).logits, text, MASK, steps=1, block_length=new, temperature=1.0)

    found = {"esokern": ours, "eager LLaDA": plain}
    if root is not None:
        _, fast_dllm = checkouts.llada(root, hidden=8, layers=1, heads=1, length=8)
        for name, module in (("LLaDA", timings.llada_decoder(root)), ("Fast-dLLM", fast_dllm)):

            def published(prompt: torch.Tensor, new: int, module: object = module) -> object:
                options = {"steps": 1, "gen_length": new, "block_length": new, "temperature": 1.0, "mask_id": MASK}
                return module.generate(network, prompt, **options)

            found[name] = published
    return found


def status(field: str, file: str = "/proc/self/status") -> int:
    """Bytes that the kernel names in a line "field: ... kB"."""
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)[1])


def peak_of(decode: Callable[[torch.Tensor, int], object], batch: int) -> dict[str, float]:
    """Bytes of the peak beyond what was resident, and the seconds it took."""
    prompt = torch.randint(MASK, (batch, timings.PROMPT), generator=torch.Generator().manual_seed(1))
    decode(prompt[:1, :2], 2)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, begin = status("VmRSS"), time.perf_counter()
    decode(prompt, timings.NEW)
    return {"seconds": time.perf_counter() - begin, "peak": status("VmHWM") - before}


def measured(name: str, batch: int, root: Path | None) -> dict[str, float]:
    """`peak_of` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--batch", str(batch)]
    command += ["--checkouts", str(root)] if root else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, batch {batch}: status {done.returncode}\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, metavar="DIR")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--one", metavar="NAME", help="measure one decoder in this process")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        if options.one:
            print(json.dumps(peak_of(candidates(options.checkouts)[options.one], options.batch[0])))
            return
    names = ["esokern", *(["LLaDA", "Fast-dLLM"] if options.checkouts else ["eager LLaDA"])]
    for batch in options.batch:
        taken, notes = {}, {}
        for name in names:
            if name == "Fast-dLLM" and batch > 1:  # takes one row at a time
                continue
            wanted = PEAK_PER_LOGIT * batch * (timings.PROMPT + timings.NEW) * VOCAB
            if name != "esokern" and wanted > status("MemAvailable", "/proc/meminfo"):
                print(f"B{batch} {name}: left out, it may take {wanted / 2**30:.0f} GiB")
                continue
            result = measured(name, batch, options.checkouts)
            taken[name] = Timing.of([result["seconds"]])
            notes[name] = {"peak_mib": result["peak"] / 2**20}
            print(f"B{batch} {name}: {notes[name]['peak_mib']:.1f} MiB, {result['seconds']:.2f} s", flush=True)
        case = f"B{batch} S{timings.PROMPT + timings.NEW} V{VOCAB}"
        recorder = Recorder()
        recorder.add("decoder_memory", case, torch.float32, taken, notes=notes)
        if options.record:
            recorder.save()


if __name__ == "__main__":
    main()
