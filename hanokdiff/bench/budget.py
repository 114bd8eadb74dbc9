"""What a training step costs, without a GPU: on the meta device tensors have shapes and no numbers.

    python -m hanokdiff.bench.budget                    each method's largest batch on a 48 GB card

Counted are the operations of matrix products, convolutions and attention, and the bytes alive at every
moment, of our own loops at the size of SD 1.5 (512 px, bf16). Not counted: what an allocator wastes, cuDNN's
workspaces and CUDA's own memory, 1 to 2 GB together; so the limit is 44 GiB (47.2 GB) of a 48 GB card. Nor is
the autoencoder (0.2 GB), which a step does not need. A photo is a picture in the step: DreamBooth's are its
own and the class's together.
"""

import math
import sys
import weakref
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hanokdiff.bench import setup
from hanokdiff.errors import report_errors
from hanokdiff.models import memory
from hanokdiff.options import Options
from hanokdiff.training.noise import Batch

LIMIT = 44 * 2**30


class Attention(torch.autograd.Function):
    """What a fused kernel costs: it keeps q, k, v, out and the log-sum-exp, and does 2 products forward and 5
    back."""

    done = 0

    @staticmethod
    def forward(ctx, q, k, v):
        *heads, n, d = q.shape
        out, lse = torch.empty_like(q), q.new_empty(*heads, n, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.product = 2 * math.prod(heads) * n * k.shape[-2] * d
        Attention.done += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx, grad):
        Attention.done += 5 * ctx.product
        return tuple(torch.empty_like(a) for a in ctx.saved_tensors[:3])


@contextmanager
def fused():
    """Attention as a fused kernel does it, where torch on meta would do it by hand."""
    kernel = lambda q, k, v, is_causal=False: Attention.apply(q, k, v)  # noqa: E731
    with mock.patch.object(F, "scaled_dot_product_attention", kernel):
        yield


class Count(TorchDispatchMode):
    """While it is on: operations, the most bytes that were alive at once beside what was there before, and
    `waits`: what would make the host wait for a GPU, and the GPU then for the host."""

    def __init__(self):
        super().__init__()
        self.products, self.fp32, self.live, self.peak, self.known, self.waits = 0, 0, 0, 0, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.products += count
            self.fp32 += count * (args[0].dtype == torch.float32)
        if waits(func._overloadpacket, args, kwargs or {}, out):
            self.waits.append(str(func))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage) -> None:
        """A view is of a storage that is known; a new one counts until it dies."""
        key = storage._cdata
        if key not in self.known:
            self.known[key] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key) -> None:
        self.live -= self.known.pop(key)

    def __enter__(self):
        self.before = Attention.done
        return super().__enter__()

    def __exit__(self, *what):
        super().__exit__(*what)
        self.operations = self.products + Attention.done - self.before


def waits(op, args, more: dict, out) -> bool:
    """Whether an operation reads a number back, or copies one over (an index, say) and waits until it is
    there."""
    aten, inputs = torch.ops.aten, [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    if op in (aten._local_scalar_dense, aten.nonzero, aten.masked_select):
        return any(t.is_meta for t in inputs)
    crosses = any(not t.is_meta and t.dim() for t in inputs) and any(
        isinstance(t, torch.Tensor) and t.is_meta for t in [*inputs, *tree_leaves(out)]
    )
    return crosses and not (more.get("non_blocking") or (op is aten.copy_ and len(args) > 2 and args[2]))


def step(
    method: str, size: str = "sd15", batch: int = 1, checkpointing: bool = False
) -> tuple[int, int, int]:
    """One training step of a method: operations, the most bytes at once, and of these what stays from step to
    step: the weights, and for what learns the fp32 master and Adam's two averages. With few photos the most
    is at the update, when a bf16 network's gradients stand there in fp32."""
    with fused():
        sd = setup.build(size, "meta", torch.bfloat16)
        if checkpointing:
            memory.checkpoint(sd.unet)
        trainable, losses = setup.prepare(sd, method, setup.side(size))
        count = Count()
        weights = sum(p.nbytes for part in (sd.unet, sd.text.encoder) for p in part.parameters())
        half = sum(4 * p.numel() for p in trainable.values() if p.dtype != torch.float32)
        stays = weights + half + sum(8 * p.numel() for p in trainable.values())
        with count:
            losses(Batch(0, 0, range(batch), batch, device="meta")).mean().backward()
    return count.operations, stays + max(count.peak, half), stays


def largest(method: str, limit: int, checkpointing: bool) -> int:
    """The most photos a step within `limit` bytes, 0 for none. From 16 on, memory grows by the same for
    each."""
    few, more = (step(method, batch=b, checkpointing=checkpointing)[1] for b in (16, 32))
    most = 32 + int((limit - more) // ((more - few) / 16))
    while 0 < most < 16 and step(method, batch=most, checkpointing=checkpointing)[1] > limit:
        most -= 1
    return max(0, most)


@report_errors
def main(argv=None):
    p = Options(description=__doc__)
    p.add_argument("--limit", type=float, default=LIMIT / 2**30, help="GiB (default: %(default)g)")
    args = p.parse_args(argv)
    if not 0 < args.limit < float("inf"):
        raise ValueError(f"--limit is {args.limit:g}, but must be a number of GiB greater than 0")
    print(
        f"SD 1.5 at 512 px in bf16, simulated on the meta device; largest batch within {args.limit:g} GiB\n"
    )
    print(
        "| | operations a photo | resident | 1 photo | 4 | 8 | 32 | largest | with --checkpointing: 32 | "
        "largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in setup.TRAINED:
        (ops, one, resident), *more = (step(method, batch=b) for b in (1, 4, 8, 32))
        _, again, _ = step(method, batch=32, checkpointing=True)
        gb = " | ".join(f"{n / 1e9:.1f} GB" for n in (resident, one, *(peak for _, peak, _ in more)))
        most, twice = (largest(method, int(args.limit * 2**30), c) for c in (False, True))
        print(
            f"| {method} | {ops / 1e12:.2f}e12 | {gb} | {most} | {again / 1e9:.1f} GB | {twice} |", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
