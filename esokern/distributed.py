"""Several processes, as `torchrun` starts them: what is split over them, and how it comes together again.

Training splits the rows of a batch (and with "fsdp" the weights), generation and evaluation split their rows, a large
LM head its vocabulary. Nothing computed depends on the number of processes, but for the order of float sums where
gradients are added. Without `torchrun` every function here does the plain thing: one process has it all.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from tqdm import tqdm

from esokern.models.network import FoldedNetwork, Network
from esokern.samplers import esolm
from esokern.samplers.run import GenerationResult, StepInfo, row_seeds, starting_tokens
from esokern.unmask_sample import UnmaskSample, merge_vocab_shards

# Between two collectives one process may encode a corpus while the others wait.
TIMEOUT = datetime.timedelta(hours=6)


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes in all."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str | torch.device) -> torch.device:
    """The device of this process: of a plain "cuda", the GPU that `torchrun` means by LOCAL_RANK."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and dist.is_initialized():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def process_group(device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, the processes that `torchrun` started know each other: by gloo, and on GPUs by NCCL."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        if on_gpu:
            torch.cuda.set_device(local_device(device))
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    total([0.0])


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 goes through the block, then the others do, which find the files that it wrote, or fail as it did."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def total(values: Sequence[float]) -> list[float]:
    """The sums of each value over the processes, in float64."""
    if size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def dealt(count: int, compute: Callable[[int], Any], *, progress: bool = False) -> list[Any]:
    """[compute(0), .., compute(count - 1)], dealt out to the processes, which all get the whole list.

    Results must not hold tensors of a GPU. progress: the first process shows a bar.
    """
    own = range(rank(), count, size())
    found = [(index, compute(index)) for index in tqdm(own, leave=False, disable=not progress or rank() > 0)]
    if size() > 1:
        shares: list[list[tuple[int, Any]]] = [[] for _ in range(size())]
        dist.all_gather_object(shares, found)
        found = sorted((pair for pairs in shares for pair in pairs), key=lambda pair: pair[0])
    return [result for _, result in found]


# --- training -------------------------------------------------------------------------------------------------------


class Call(nn.Module):
    """Runs any function of the network inside one `forward`, which is where DDP and FSDP gather and reduce."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.network, *args)


def wrap(network: Network, device: torch.device, shard: str) -> nn.Module:
    """`Call(network)` on the device, its gradients averaged over the processes. shard: "ddp", every process has all
    weights, or "fsdp" (FSDP2), each has a share of every parameter and gathers a block when it runs."""
    call = Call(network)
    if size() == 1:
        return call.to(device)
    if shard == "ddp":
        return nn.parallel.DistributedDataParallel(call.to(device))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    for module in (*network.blocks, call):
        fully_shard(module, mesh=mesh)
        if device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    return call


def no_gradient_sync(call: nn.Module) -> contextlib.AbstractContextManager:
    """A backward pass inside adds to the gradients of this process only; of FSDP's shards it cannot, and syncs."""
    return call.no_sync() if isinstance(call, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def release(call: nn.Module) -> None:
    """Drop what FSDP keeps gathered after a forward pass without a backward; the weights may then change."""
    if hasattr(call, "reshard"):
        call.reshard()


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, whose module takes seconds to import where nothing is sharded."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; of any other, all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor on every process, which must all call it; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole(tree: Any) -> Any:
    """The tree with its sharded tensors put together on rank 0's CPU. Every process must call it; others get None."""

    def gather(leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        gathered = full(leaf)
        return gathered.cpu() if rank() == 0 else None

    return tree_map(gather, tree)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor, split as the parameter is."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state dict with each moment split as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shared = {
        index: {
            name: shard_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": shared}


# --- generation -----------------------------------------------------------------------------------------------------


def share(n: int) -> slice:
    """Which of n rows are this process's: as equal shares as there are, in order."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def generate(
    sampler: Callable[..., GenerationResult],
    network: FoldedNetwork,
    tokens: Tensor | Sequence | None = None,
    *,
    length: int | None = None,
    batch: int | None = None,
    seed: int | Sequence[int] | Tensor = 0,
    callback: Callable[[StepInfo], None] | None = None,
    **options: Any,
) -> GenerationResult:
    """`sampler(network, tokens, ...)`, the rows of its batch split over the processes. With a network whose head is
    split instead (`shard_head`), all of them take all rows.

    sampler: `generate` of esokern.samplers.esolm, mdlm, bd3lm or autoregressive. A row's noise belongs to its seed, so
        the tokens are those that one process would draw.
    callback: sees the rows of its own process, numbered as in the whole batch.
    options: the sampler's; those per row are given for the whole batch. An explicit `schedule`
        is not split: ValueError.

    Every process gets the whole result on its device. decode_step counts a process's own steps; nfe and the times are
    those of the process that took longest.
    """
    if size() == 1 or network.head_shard is not None:
        return sampler(network, tokens, length=length, batch=batch, seed=seed, callback=callback, **options)
    if options.get("schedule") is not None:
        raise ValueError("schedule: an explicit one is for one process; num_steps, alpha_0 and schedule_seed are not")
    start = starting_tokens(network, tokens, length, batch)
    seeds = row_seeds(seed, len(start))
    rows = share(len(start))
    if sampler is esolm.generate and options.get("schedule_seed") is None:
        options["schedule_seed"] = seeds[0]  # what it would take for the whole batch
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = options.get(name)
        per_row = value.dim() == 1 if isinstance(value, Tensor) else isinstance(value, Sequence)
        if per_row and len(value) == len(start):
            options[name] = value[rows]

    def report(step: StepInfo) -> None:
        callback(StepInfo(step.index, step.phase, step.rows + rows.start, step.positions, step.tokens))

    result = None
    if rows.start < rows.stop:
        seen = None if callback is None else report
        result = sampler(network, start[rows], seed=seeds[rows], callback=seen, **options)
    return _joined(result, start.device)


def _joined(result: GenerationResult | None, device: torch.device) -> GenerationResult:
    """The results of all processes behind each other; None from those that had no rows."""
    on_cpu = None if result is None else tree_map_only(Tensor, Tensor.cpu, vars(result))
    shares: list[dict[str, Any] | None] = [None] * size()
    dist.all_gather_object(shares, on_cpu)
    found = [fields for fields in shares if fields is not None]

    def join(name: str) -> Any:
        values = [fields[name] for fields in found]
        if values[0] is None:
            return None
        return torch.cat(values).to(device) if isinstance(values[0], Tensor) else max(values)

    return GenerationResult(**{name: join(name) for name in found[0]})


# --- the LM head ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadShard:
    """How a process's rows of the head belong to the whole one: `start` is the id of the first."""

    start: int
    group: dist.ProcessGroup | None = None

    def merge(self, drawn: UnmaskSample) -> UnmaskSample:
        """The draw from the whole vocabulary out of this process's draw, by one small exchange: a token, its score
        and two statistics per row."""
        fields = [name for name in drawn._fields if getattr(drawn, name) is not None]
        packed = torch.stack([getattr(drawn, name).double() for name in fields])  # ids and floats both fit
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, packed, group=self.group)
        dtypes = [getattr(drawn, name).dtype for name in fields]
        shards = [
            drawn._replace(**{n: values.to(d) for n, d, values in zip(fields, dtypes, shard, strict=True)})
            for shard in gathered
        ]
        return merge_vocab_shards(shards)


def shard_head(network: FoldedNetwork, group: dist.ProcessGroup | None = None) -> FoldedNetwork:
    """The network with only this process's rows of the LM head, for sampling by all processes of `group` together.

    They must generate the same rows with the same options; every process then gets the same tokens, those that one
    process with the whole head draws. Filters (top_k, top_p, min_p) need the whole distribution and raise ValueError.
    """
    vocab, ranks = network.config.vocab_size, dist.get_world_size(group)
    if network.head_shard is not None or vocab < ranks:
        raise ValueError(f"shard_head: the head of {vocab} ids cannot be split {ranks} ways, or is split already")
    own = dist.get_rank(group)
    start, stop = vocab * own // ranks, vocab * (own + 1) // ranks
    return network.with_head(
        network.head_weight[start:stop].clone(), network.head_bias[start:stop].clone(), HeadShard(start, group)
    )
