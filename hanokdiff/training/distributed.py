"""Several processes, one training: torchrun starts a script N times, each trains on its share of a batch.

    torchrun --nproc_per_node=2 train_lora.py ...

Every process loads the model and the photos itself, adds the others' gradients to its own and takes the same
step, so all hold the same weights to the bit.  Process 0 alone writes files, draws previews and prints.  What
the hosts agree upon goes over gloo and never waits for a GPU; gradients go over nccl between GPUs.
"""

import atexit
import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BUCKET_NUMBERS = 2**26  # numbers in one message: an adapter goes in one, DreamBooth's 1e9 in 15


@functools.cache
def join() -> None:
    """Meet the others, once. A day of patience: the first may be drawing a thousand class pictures."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    atexit.register(dist.destroy_process_group)


def shard(indices: int) -> range:
    """This process's indices of a batch; they need not divide evenly."""
    if indices < WORLD_SIZE:
        few = f"--batch-size {indices} is too small for {WORLD_SIZE} processes"
        raise ValueError(f"{few}: each needs a photo of its own")
    return range(indices * RANK // WORLD_SIZE, indices * (RANK + 1) // WORLD_SIZE)


def all_reduce(tensors: list[Tensor]) -> None:
    """Each becomes the sum of what all processes have in its place; flattened into a few large messages."""
    for bucket in buckets(tensors) if WORLD_SIZE > 1 else []:
        join()
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(total.view_as(t))


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, as many as BUCKET numbers hold."""
    held: list[Tensor] = []
    for t in tensors:
        if held and (t.dtype != held[0].dtype or sum(h.numel() for h in held) + t.numel() > BUCKET_NUMBERS):
            yield held
            held = []
        held.append(t)
    if held:
        yield held


def any_rank(flag: bool) -> bool:
    """Whether it is so in any process."""
    if WORLD_SIZE > 1:
        join()
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        flag = votes.item() > 0
    return flag


def barrier() -> None:
    """Until all processes are here."""
    any_rank(False)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Process 0 does it first, and the others when it has: they find the files that it wrote."""
    if RANK:
        barrier()
    yield
    if RANK == 0:
        barrier()
