"""What bench/gpu.py times: for each op its cases, and for each case the peers that do the same work.

Here what cases are, and those of sampling, of the loss and of the layers between; attention has a file of its own.

A case makes input sets on demand, and its candidates take one set each. A peer that is not installed, or that cannot do
a case, is named in `absent` with the reason: a table without a peer says why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch.nn import functional

import esokern
from eager import gumbel_max, nucleus
from harness import Cost

Candidate = Callable[[SimpleNamespace], object]


@dataclasses.dataclass
class Case:
    """One comparison. `make` returns a fresh input set; candidate "esokern" is ours, and if `alike` all results,
    tensors or tuples of them, must agree with its. Those in `partial` do a part of the work only, for orientation: they
    compete with nobody."""

    op: str
    name: str
    dtype: torch.dtype
    cost: Cost
    make: Callable[[], SimpleNamespace]
    candidates: dict[str, Candidate]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    alike: bool = True


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the cases run, and whether in miniature."""

    device: str
    small: bool = False
    dtype: torch.dtype = torch.bfloat16

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def peer(case: Case, name: str, modules: str, attribute: str, make: Callable[[object], Candidate]) -> None:
    """Add the candidate `make(attribute of the first of modules that is there)`, or say why there is none."""
    for module in modules.split():
        try:
            case.candidates[name] = make(getattr(importlib.import_module(module), attribute))
        except Exception as error:  # a peer that is installed but broken must not stop the others
            case.absent[name] = f"{module}: {type(error).__name__}: {error}".splitlines()[0]
        else:
            case.absent.pop(name, None)
            return


# --- unmask_sample: LM head and draw. Draws differ by their noise, so the results are not compared.


def unmask_sample(setting: Setting) -> Iterator[Callable[[], Case]]:
    heads = [(4096, 151936, (1, 16, 64)), (768, 50258, (64, 256, 1024))]
    if setting.small:
        heads = [(64, 999, (1, 3))]
    for hidden, vocab, rows in heads:
        for count in rows:
            for top_p in (None, 0.9):
                yield functools.partial(_unmask_sample, setting, count, hidden, vocab, top_p)


def _unmask_sample(setting: Setting, rows: int, hidden_size: int, vocab: int, top_p: float | None) -> Case:
    seed = torch.zeros(rows, dtype=torch.int64, device=setting.device)
    positions = torch.arange(rows, device=setting.device)

    def make() -> SimpleNamespace:
        weight = setting.randn(vocab, hidden_size).mul_(hidden_size**-0.5)
        return SimpleNamespace(hidden=setting.randn(rows, hidden_size), weight=weight)

    def ours(s: SimpleNamespace, **options: object) -> torch.Tensor:
        return esokern.unmask_sample(
            s.hidden, s.weight, mask_id=vocab - 1, top_p=top_p, seed=seed, positions=positions, **options
        ).tokens

    def logits(s: SimpleNamespace) -> torch.Tensor:
        return s.hidden @ s.weight.T

    def multinomial(s: SimpleNamespace) -> torch.Tensor:
        p = logits(s).float().softmax(-1)
        if top_p is not None:
            ordered, index = p.sort(descending=True)
            p = torch.zeros_like(p).scatter_(1, index, ordered * (ordered.cumsum(-1) - ordered < top_p))
        return torch.multinomial(p, 1)[:, 0]

    def gumbel(dtype: torch.dtype) -> Candidate:
        return lambda s: gumbel_max(logits(s) if top_p is None else nucleus(logits(s), top_p), dtype)

    cost = Cost(bytes=vocab * hidden_size * torch.finfo(setting.dtype).bits // 8, flops=2 * rows * hidden_size * vocab)
    name = f"rows {rows} D{hidden_size} V{vocab}" + ("" if top_p is None else f" top_p {top_p}")
    candidates = {
        "esokern": lambda s: ours(s, return_logprob=False),
        "esokern + logprob": ours,
        "matmul + f64 gumbel": gumbel(torch.float64),
        "matmul + f32 gumbel": gumbel(torch.float32),
        "matmul + multinomial": multinomial,
        "matmul alone": logits,
    }
    case = Case("unmask_sample", name, setting.dtype, cost, make, candidates, alike=False)
    case.partial = frozenset({"matmul alone"})
    if top_p is None:
        peer(
            case, "matmul + flashinfer", "flashinfer.sampling", "sampling_from_logits",
            lambda f: lambda s: f(logits(s).float()),
        )  # fmt: skip
    else:
        peer(
            case, "matmul + flashinfer", "flashinfer.sampling", "top_p_sampling_from_probs",
            lambda f: lambda s: f(logits(s).float().softmax(-1), top_p),
        )  # fmt: skip
    return case


# --- unmask_select: which draws to keep. All runs start from the same masked text, a copy that each of them makes.


def unmask_select(setting: Setting) -> Iterator[Callable[[], Case]]:
    shapes = [(2, 7)] if setting.small else [(1, 32), (64, 32), (1, 1024), (64, 1024)]
    for batch, width in shapes:
        for rule in ("top-m", "threshold", "entropy bound"):
            yield functools.partial(_unmask_select, setting, batch, width, rule)


def _unmask_select(setting: Setting, batch: int, width: int, rule: str) -> Case:
    mask_id, bound = 1000, 0.5

    def per_row(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=setting.device)

    count = max(width // 16, 1) if rule == "top-m" else 1
    num_select, threshold = per_row(count, torch.int32), per_row(0.9, torch.float32)
    options = {"num_select": num_select}
    if rule == "threshold":
        options["threshold"] = threshold
    elif rule == "entropy bound":
        options["entropy_bound"] = per_row(bound, torch.float32)

    def make() -> SimpleNamespace:
        shape = (batch, width)
        confidence = torch.rand(shape, device=setting.device)
        return SimpleNamespace(
            masked=torch.full(shape, mask_id, device=setting.device),
            proposed=torch.randint(mask_id, shape, device=setting.device),
            confidence=confidence,
            entropy=-confidence.log(),
        )

    def ours(s: SimpleNamespace) -> torch.Tensor:
        tokens = s.masked.clone()
        entropy = s.entropy if rule == "entropy bound" else None
        esokern.unmask_select(tokens, s.proposed, s.confidence, mask_id=mask_id, entropy=entropy, **options)
        return tokens

    def sort_and_scatter(s: SimpleNamespace) -> torch.Tensor:
        tokens = s.masked.clone()
        masked = tokens == mask_id
        key, order = s.confidence.masked_fill(~masked, -torch.inf).sort(descending=True, stable=True)
        chosen = torch.arange(width, device=setting.device) < num_select[:, None]
        if rule == "threshold":
            chosen |= key >= threshold[:, None]
        elif rule == "entropy bound":
            entropy = s.entropy.gather(1, order).double()
            chosen |= (entropy.cumsum(1) - entropy.cummax(1).values <= bound).cumprod(1).bool()
        return torch.where(torch.zeros_like(masked).scatter_(1, order, chosen) & masked, s.proposed, tokens)

    def topk_per_row(s: SimpleNamespace) -> torch.Tensor:
        tokens = s.masked.clone()
        key = s.confidence.masked_fill(tokens != mask_id, -torch.inf)
        for row in range(batch):
            chosen = key[row].topk(count).indices
            tokens[row, chosen] = s.proposed[row, chosen]
        return tokens

    candidates = {"esokern": ours, "sort + scatter": sort_and_scatter}
    if rule == "top-m":
        candidates["top-k per row"] = topk_per_row
    cost = Cost(bytes=batch * width * (3 * 8 + 4))
    return Case("unmask_select", f"rows {batch} width {width} {rule}", torch.float32, cost, make, candidates)


# --- masked_cross_entropy: LM head and loss, alone as in evaluation, and with its gradients as in training.

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of hidden, weight and targets: the sum


def masked_cross_entropy(setting: Setting) -> Iterator[Callable[[], Case]]:
    shapes = [  # rows, share of them that is predicted, hidden_size, vocab
        (8192, 1.0, 768, 50258),
        (8192, 0.5, 768, 50258),
        (16384, 1.0, 256, 8193),
        (4096, 1.0, 4096, 151936),
    ]
    if setting.small:
        shapes = [(7, 0.5, 64, 999)]
    for shape in shapes:
        for backward in (True, False):
            yield functools.partial(_masked_cross_entropy, setting, *shape, backward)


def _masked_cross_entropy(
    setting: Setting, rows: int, predicted: float, hidden_size: int, vocab: int, backward: bool
) -> Case:
    def make() -> SimpleNamespace:
        targets = torch.randint(vocab, (rows,), device=setting.device)
        targets[int(predicted * rows) :] = -100
        weight = setting.randn(vocab, hidden_size).mul_(hidden_size**-0.5)
        order = torch.randperm(rows, device=setting.device)
        return SimpleNamespace(hidden=setting.randn(rows, hidden_size), weight=weight, targets=targets[order])

    def candidate(loss: Loss) -> Candidate:
        def with_gradients(s: SimpleNamespace) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (s.hidden, s.weight)]
                total = loss(*inputs, s.targets)
                return (total.detach(), *torch.autograd.grad(total, inputs))

        return with_gradients if backward else lambda s: loss(s.hidden, s.weight, s.targets)

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")

    def matmuls(s: SimpleNamespace) -> torch.Tensor:
        logits = s.hidden @ s.weight.T
        return (logits @ s.weight, logits.T @ s.hidden) if backward else logits

    matmuls_alone = "three matmuls alone" if backward else "matmul alone"
    passes = 3 if backward else 1
    cost = Cost(
        bytes=passes * (vocab + rows) * hidden_size * torch.finfo(setting.dtype).bits // 8,
        flops=passes * 2 * predicted * rows * hidden_size * vocab,
    )
    name = f"rows {rows} ({predicted:.0%}) D{hidden_size} V{vocab}" + (" + gradients" if backward else "")
    candidates = {
        "esokern": candidate(lambda h, w, t: esokern.masked_cross_entropy(h, w, t).sum()),
        "linear + cross_entropy": candidate(plain),
        matmuls_alone: matmuls,
    }
    case = Case("masked_cross_entropy", name, setting.dtype, cost, make, candidates)
    case.partial = frozenset({matmuls_alone})
    if setting.device == "cuda":
        torch._dynamo.reset()  # every shape is a program of its own
        case.candidates["compiled"] = candidate(torch.compile(plain, dynamic=False))
    else:
        case.absent["compiled"] = "the compiled form is timed on GPUs only"
    peer(
        case, "torch chunked", "torch.nn", "LinearCrossEntropyOptions",
        lambda options: candidate(
            lambda h, w, t: functional.linear_cross_entropy(h, w, t, reduction="sum", options=options())
        ),
    )  # fmt: skip
    peer(
        case, "liger", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss",
        lambda loss: candidate(lambda h, w, t: loss(reduction="sum")(w, h, t)),
    )  # fmt: skip
    peer(
        case, "cut cross-entropy", "cut_cross_entropy", "linear_cross_entropy",
        lambda loss: candidate(lambda h, w, t: loss(h, w, t, reduction="sum")),
    )  # fmt: skip
    return case


# --- the layers between: linear layers of the 170M network, and the norm between them.


def fused_linear(setting: Setting) -> Iterator[Callable[[], Case]]:
    size, counts = (64, (1, 3)) if setting.small else (768, (1, 2, 64, 1024))
    layers = {
        "norm qkv": (size, 3 * size, {"normalize_eps": 1e-5}),
        "attn out": (size, size, {}),
        "norm mlp gelu": (size, 4 * size, {"normalize_eps": 1e-5, "activation": "gelu_tanh"}),
        "mlp out": (4 * size, size, {}),
    }
    for name, (in_features, out_features, options) in layers.items():
        for rows in counts:
            yield functools.partial(_fused_linear, setting, name, rows, in_features, out_features, options)


def _fused_linear(
    setting: Setting, layer: str, rows: int, in_features: int, out_features: int, options: dict[str, object]
) -> Case:
    def make() -> SimpleNamespace:
        return SimpleNamespace(
            x=setting.randn(rows, in_features),
            weight=setting.randn(out_features, in_features).mul_(in_features**-0.5),
            bias=setting.randn(out_features),
            residual=None if options else setting.randn(rows, out_features),
        )

    def torch_layer(s: SimpleNamespace) -> torch.Tensor:
        y = functional.layer_norm(s.x, (in_features,)) if "normalize_eps" in options else s.x
        y = functional.linear(y, s.weight, s.bias)
        if "activation" in options:
            y = functional.gelu(y, approximate="tanh")
        return y if s.residual is None else s.residual + y

    candidates = {
        "esokern": lambda s: esokern.fused_linear(s.x, s.weight, s.bias, residual=s.residual, **options),
        "torch": torch_layer,
        "torch linear alone": lambda s: functional.linear(s.x, s.weight, s.bias),
    }
    moved = in_features * out_features + rows * (in_features + out_features * (1 if options else 2))
    cost = Cost(bytes=moved * torch.finfo(setting.dtype).bits // 8, flops=2 * rows * in_features * out_features)
    name = f"{layer} {in_features}x{out_features} rows {rows}"
    return Case("fused_linear", name, setting.dtype, cost, make, candidates, partial=frozenset({"torch linear alone"}))


def add_norm(setting: Setting) -> Iterator[Callable[[], Case]]:
    for rows in (1, 3) if setting.small else (1, 2, 64, 1024):
        yield functools.partial(_add_norm, setting, rows, 64 if setting.small else 768)


def _add_norm(setting: Setting, rows: int, size: int) -> Case:
    def make() -> SimpleNamespace:
        x, residual = (setting.randn(rows, size) for _ in range(2))
        return SimpleNamespace(x=x, residual=residual, weight=setting.randn(size), bias=setting.randn(size))

    def torch_form(s: SimpleNamespace) -> torch.Tensor:
        return functional.layer_norm(s.residual + s.x, (size,), s.weight, s.bias)

    candidates = {
        "esokern": lambda s: esokern.add_norm(s.x, s.residual, weight=s.weight, bias=s.bias)[0],
        "torch": torch_form,
    }
    cost = Cost(bytes=4 * rows * size * torch.finfo(setting.dtype).bits // 8)
    return Case("add_norm", f"rows {rows} D{size}", setting.dtype, cost, make, candidates)
