"""The `esokern` command: generate, evaluate, train, bench, info, demo."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from esokern import __version__, demo, distributed, evaluate, train
from esokern import backend as backends
from esokern.models import FoldedNetwork, Network, NetworkConfig, load_model, pretrained
from esokern.samplers import autoregressive, bd3lm, esolm, mdlm
from esokern.samplers.run import GenerationResult, StepInfo
from esokern.text import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status 0, 2 for a mistake in what was asked, 1 if something else failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:  # it has its own options
            return train.main(arguments[1:])
        options = _parser().parse_args(arguments)
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"--threads: must be at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        status = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        if "--traceback" in arguments:
            raise
        print(f"esokern: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="esokern", description="Masked-diffusion language models with compiled kernels and an exact KV cache."
    )
    parser.add_argument("--version", action="version", version=f"esokern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, metavar="N", help="threads of the kernels (default: one per core)")
    common.add_argument("--traceback", action="store_true", help="show where in the program an error arose")

    files = argparse.ArgumentParser(add_help=False)
    files.add_argument(
        "--checkpoint", metavar="PATH", help="folder, .safetensors or .ckpt (default: the shipped model)"
    )
    files.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json (default: the one beside the checkpoint)")
    files.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    files.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
    model = argparse.ArgumentParser(add_help=False, parents=[files])
    model.add_argument(
        "--backend", choices=backends.BACKENDS, help="default: the compiled one of the device; cuda implies its device"
    )

    command = commands.add_parser(
        "generate",
        parents=[common, model],
        help="generate text",
        description="Generate text: from a prompt, in a gap, or from nothing. The text goes to standard output, "
        "figures to standard error.",
    )
    task = command.add_mutually_exclusive_group()
    task.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with; - reads standard input")
    task.add_argument("--infill", nargs=2, metavar=("PREFIX", "SUFFIX"), help="generate what stands between the two")
    command.add_argument("--middle", type=int, default=64, metavar="N", help="tokens of --infill (default %(default)s)")
    command.add_argument("--sampler", choices=SAMPLERS, default="esolm", help="default %(default)s")
    command.add_argument(
        "--length", type=int, metavar="N", help="tokens, prompt included (default: the network's length)"
    )
    command.add_argument(
        "--alpha0",
        type=float,
        default=0.25,
        metavar="X",
        help="Eso-LM: share decoded by diffusion (default %(default)s)",
    )
    command.add_argument(
        "--steps", type=_steps, default=64.0, metavar="T",
        help="diffusion steps, for bd3lm per block; inf = one token a step (default 64)",
    )  # fmt: skip
    command.add_argument("--block-size", type=int, default=16, metavar="N", help="bd3lm: default %(default)s")
    command.add_argument(
        "--chunk-mask", choices=esolm.CHUNK_MASKS, default="causal", help="Eso-LM: default %(default)s"
    )
    command.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 = greedy (default %(default)s)")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--min-p", type=float, metavar="P")
    command.add_argument("--seed", type=int, default=0, help="default %(default)s")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="samples (default %(default)s)")
    command.add_argument(
        "--split",
        choices=("rows", "head"),
        default="rows",
        help="what the processes of torchrun share: the samples of --batch, or the vocabulary of the LM head "
        "(default %(default)s)",
    )
    command.add_argument("--no-cache", action="store_true", help="recompute everything in every step: the same text")
    command.add_argument("--live", action="store_true", help="show the tokens while they appear")
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "evaluate",
        parents=[common, files],
        help="perplexity and bits per byte of a text",
        description="How likely the model finds a text: the NELBO and the importance-weighted bound over K random "
        "orders, or the exact likelihood of models that have one order.",
    )
    evaluate.add_arguments(command)
    command.set_defaults(run=_evaluate, backend=None)

    commands.add_parser(
        "train", add_help=False, help="train a model (esokern train --help)", description="Train a model."
    )

    command = commands.add_parser(
        "bench",
        parents=[common, model],
        help="compare the samplers on this machine",
        description="Time every sampler on one network of random weights, or on --checkpoint. The op benches, with "
        "records and baselines, are in the source checkout: make bench.",
    )
    command.add_argument("--length", type=int, default=256, metavar="N", help="tokens (default %(default)s)")
    command.add_argument("--hidden-size", type=int, default=256, metavar="N", help="default %(default)s")
    command.add_argument("--layers", type=int, default=6, metavar="N", help="default %(default)s")
    command.add_argument("--heads", type=int, default=4, metavar="N", help="default %(default)s")
    command.add_argument("--vocab", type=int, default=8193, metavar="N", help="default %(default)s")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default %(default)s)")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "info", parents=[common], help="versions, back ends, instruction sets, and what is missing"
    )
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "demo", parents=[common], help="watch the shipped model write, then compare the samplers"
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="to show each text (default %(default)s)"
    )
    command.add_argument("--seed", type=int, default=1, help="default %(default)s")
    command.add_argument("--checkpoint", metavar="PATH", help="another model, its tokenizer.json beside it")
    command.set_defaults(run=_demo)
    return parser


def _device(options: argparse.Namespace) -> torch.device:
    """Where --device and --backend want the network. ValueError saying what is missing for a GPU."""
    name = options.device or ("cuda" if options.backend == "cuda" else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"--device: got {name!r}, supported are cpu, cuda and cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} {_why_no_gpu()}")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if backends.cuda_architectures() is None and options.backend != "reference":
        raise ValueError(
            f"--device {name}: this installation has no CUDA kernels (see esokern info); --backend reference needs none"
        )
    return distributed.local_device(name)


def _load(options: argparse.Namespace) -> tuple[FoldedNetwork, Tokenizer]:
    device = _device(options)
    network, tokenizer = load_model(options.checkpoint, tokenizer=options.tokenizer, dtype=DTYPES[options.dtype])
    return network.to(device), tokenizer


def _steps(text: str) -> float:
    return math.inf if text == "inf" else int(text)


def _generate_esolm(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer, **common: object):
    return distributed.generate(
        esolm.generate,
        network,
        alpha_0=options.alpha0,
        num_steps=options.steps,
        chunk_mask=options.chunk_mask,
        cached=not options.no_cache,
        **common,
    )


def _generate_mdlm(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer, **common: object):
    return distributed.generate(mdlm.generate, network, num_steps=options.steps, **common)


def _generate_bd3lm(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer, **common: object):
    return distributed.generate(
        bd3lm.generate,
        network,
        num_steps=options.steps,
        block_size=options.block_size,
        cached=not options.no_cache,
        **common,
    )


def _generate_ar(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer, **common: object):
    start = {} if tokenizer.eos_id is None else {"start_token": tokenizer.eos_id}
    return distributed.generate(autoregressive.generate, network, cached=not options.no_cache, **start, **common)


SAMPLERS: dict[str, Callable[..., GenerationResult]] = {
    "esolm": _generate_esolm,
    "mdlm": _generate_mdlm,
    "bd3lm": _generate_bd3lm,
    "ar": _generate_ar,
}


def _generate(options: argparse.Namespace) -> int:
    """One process, or those that torchrun started, each with its share of --batch; the first one prints."""
    with _processes(options):
        return _generate_rows(options)


def _processes(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    on_gpu = (options.device or options.backend or "cpu").startswith("cuda")
    return distributed.process_group("cuda" if on_gpu else "cpu")


def _generate_rows(options: argparse.Namespace) -> int:
    first = distributed.rank() == 0
    network, tokenizer = _load(options)
    own = len(range(options.batch)[distributed.share(options.batch)])
    if options.split == "head" and distributed.size() > 1:
        network, own = distributed.shard_head(network), options.batch
    tokens = _starting_tokens(options, network, tokenizer)
    num_masked = int((tokens == tokenizer.mask_id).sum())
    common = {
        "tokens": tokens,
        "batch": options.batch,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "backend": options.backend,
    }
    if options.live and first:
        with demo.LiveText(tokenizer, tokens) as live:
            result = SAMPLERS[options.sampler](options, network, tokenizer, callback=live, **common)
    else:
        with tqdm(
            total=num_masked * own, unit=" tokens", leave=False, disable=not (first and sys.stderr.isatty())
        ) as bar:

            def progress(step: StepInfo) -> None:
                bar.update(len(step.tokens))

            result = SAMPLERS[options.sampler](options, network, tokenizer, callback=progress, **common)
    if not first:
        return 0
    shown = result.tokens[1:] if options.live else result.tokens
    for index, row in enumerate(shown.tolist()):
        if options.batch > 1:
            print(f"--- {index + 1 + options.live} of {options.batch}, seed {options.seed + index + options.live}")
        print(tokenizer.decode(row))
    print(
        f"{result.num_generated} tokens in {result.seconds:.2f} s ({result.tokens_per_second:.0f} tokens/s), "
        f"{result.nfe} network evaluations, {result.forward_seconds:.2f} s in the network, "
        f"{result.sampling_seconds:.2f} s in head and sampling",
        file=sys.stderr,
    )
    return 0


def _starting_tokens(options: argparse.Namespace, network: FoldedNetwork, tokenizer: Tokenizer) -> torch.Tensor:
    """int64 [length]: the given tokens and the masks."""
    limit = network.config.length
    if options.infill is not None:
        if options.middle < 1:
            raise ValueError(f"--middle: must be at least 1, got {options.middle}")
        if options.length is not None:
            raise ValueError("--length: with --infill the length follows from the texts and --middle")
        before, after = options.infill
        prefix, suffix = tokenizer.encode_prompt(before), tokenizer.encode(after)
        length = len(prefix) + options.middle + len(suffix)
        if length > limit:
            raise ValueError(
                f"--infill: {len(prefix)} tokens of prefix, {options.middle} of middle and {len(suffix)} of suffix are "
                f"more than the network's {limit}"
            )
        return torch.tensor(prefix + [tokenizer.mask_id] * options.middle + suffix)
    prompt = tokenizer.encode_prompt(sys.stdin.read() if options.prompt == "-" else options.prompt)
    length = limit if options.length is None else options.length
    if not 1 <= length <= limit:
        raise ValueError(f"--length: must lie in 1 .. {limit}, the network's length; got {length}")
    if len(prompt) >= length:
        raise ValueError(f"--prompt: its {len(prompt)} tokens leave no room in a length of {length}")
    return torch.tensor(prompt + [tokenizer.mask_id] * (length - len(prompt)))


def _evaluate(options: argparse.Namespace) -> int:
    """One process, or those that torchrun started, each with its share of the rows."""
    with _processes(options):
        return evaluate.run(options, *_load(options))


def _bench(options: argparse.Namespace) -> int:
    if options.checkpoint is not None:
        network, _ = _load(options)
    else:
        device = _device(options)
        torch.manual_seed(0)
        made = Network(
            NetworkConfig(
                vocab_size=options.vocab,
                hidden_size=options.hidden_size,
                n_blocks=options.layers,
                n_heads=options.heads,
                length=max(options.length, 1),
            )
        )
        for parameter in made.parameters():  # nothing zero, as after training
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.03)
        network = made.fold(DTYPES[options.dtype]).to(device)
    if options.repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {options.repeats}")
    config = network.config
    print(
        f"hidden {config.hidden_size}, {config.n_heads} heads, {config.n_blocks} layers, vocabulary "
        f"{config.vocab_size}, {options.dtype}; {options.length} tokens, batch 1; "
        f"{options.backend or network.device.type}, {_hardware(network.device)}"
    )
    rows = demo.compare_samplers(
        network, options.length, repeats=options.repeats, backend=options.backend, progress=sys.stderr.isatty()
    )
    for line in demo.comparison_table(rows):
        print(line)
    by_name = {row.name: row.result for row in rows}
    print(demo.agreement([(by_name["Eso-LM, cached"], by_name["Eso-LM, recomputed"])]))
    return 0


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{backends.get_isa()}, {torch.get_num_threads()} threads"


def _demo(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    network, tokenizer = load_model(options.checkpoint)
    demo.run(network, tokenizer, seconds=options.seconds, seed=options.seed)
    print(f"\n  {time.perf_counter() - start:.0f} s in all. Next: esokern generate --help")
    return 0


def _info(options: argparse.Namespace) -> int:
    for name, value in _facts():
        print(f"{name:18} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    """What `esokern info` prints, line by line."""
    yield "esokern", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in ("torch", "numpy", "safetensors", "tokenizers", "tqdm"):
        yield package, importlib.metadata.version(package)
    for package, use in (
        ("pyyaml", "train --config"),
        ("datasets", "train --corpus hf:..."),
        ("matplotlib", "plots"),
        ("cupy", "CuPy arrays in ops"),
    ):
        module = {"pyyaml": "yaml"}.get(package, package)
        found = importlib.util.find_spec(module) is not None
        yield package, _version(package) if found else f"missing, needed for {use} only"

    built, supported = backends.built_isas(), backends.supported_isas()
    yield "back ends", ", ".join(backends.BACKENDS)
    yield "cpu kernels", f"built for {', '.join(built)}; in use: {backends.get_isa()}"
    for isa in built:
        if isa not in supported:
            yield "", f"{isa}: this CPU does not have it"
    yield "cuda kernels", _cuda_kernels()
    yield (
        "threads",
        f"{torch.get_num_threads()} of {os.cpu_count()} processors"
        + (f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})" if "OMP_NUM_THREADS" in os.environ else ""),
    )
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    yield "devices", ", ".join([_processor(), *devices])
    yield "default model", _default_model()


def _cuda_kernels() -> str:
    architectures, gpu = backends.cuda_architectures(), torch.cuda.is_available()
    if architectures is None:
        missing = "missing: when esokern was built there was no GPU or no nvcc"
        return f"{missing}; a GPU is here now: build again, with ESOKERN_CUDA=ON" if gpu else missing
    return f"built for {architectures}" + ("" if gpu else f"; torch {_why_no_gpu()}")


def _why_no_gpu() -> str:
    return "is built for the CPU alone" if torch.version.cuda is None else "finds no GPU here"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _default_model() -> str:
    file = pretrained.DEFAULT_MODEL / "config.json"
    if not file.is_file():
        return f"missing ({pretrained.DEFAULT_MODEL})"
    config = json.loads(file.read_text(encoding="utf-8"))["network"]
    sizes = ", ".join(
        f"{key} {config[key]}" for key in ("hidden_size", "n_blocks", "vocab_size", "length") if key in config
    )
    return f"{pretrained.DEFAULT_MODEL} ({sizes})"
