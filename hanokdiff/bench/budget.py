"""What a training step costs on a GPU, computed without one.

    python -m hanokdiff.bench.budget          what each method hands to a card, and its largest batch on
                                              one of 48 GB; two minutes

On the meta device tensors have shapes and no numbers. Counted are the operations of matrix products,
convolutions and attention, and the bytes allocated at every moment, in hanokdiff's training step at the size
of SD 1.5 (512 px, bf16). Not counted: the allocator's fragmentation, cuDNN's workspaces and CUDA's own
memory, 1 to 2 GB together; so the limit is 44 GiB (47.2 GB) of a 48 GB card. Nor is the autoencoder (0.2 GB),
which a step does not need. A photo is a picture in the step: DreamBooth's are its own and the class's.
"""

import sys
import tempfile
import weakref
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hanokdiff.bench import setup
from hanokdiff.errors import report_errors
from hanokdiff.models import memory
from hanokdiff.options import Options
from hanokdiff.training.noise import Batch
from hanokdiff.training.trainer import Trainer

LIMIT = 44 * 2**30


@contextmanager
def fused_attention():
    """Count attention as a card's flash kernel (2 products forward, 5 backward), unlike torch on meta."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    kernel = lambda q, k, v, mask=None, is_causal=False: flash(q, k, v, 0.0, is_causal)[0]  # noqa: E731
    with mock.patch.object(F, "scaled_dot_product_attention", kernel):
        yield


@contextmanager
def as_on_a_card():
    """On the meta device torch's grouped functions, as on a card, and `fused_attention`."""
    grouped = mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["meta"])
    with fused_attention(), grouped:
        yield


class Count(TorchDispatchMode):
    """Count what runs inside `with Count() as count:`

    operations    floating-point operations of matrix products, convolutions and attention; `fp32`: those in
                  fp32; `repeated`: q k^T once more in attention's backward pass, one of its 5 products
    live, peak    bytes of the meta tensors made inside that are allocated now, and the most at once
    syncs         names of the operations for which the host would wait for a GPU
    dispatched    operations on meta tensors, views included: a host takes some microseconds for each"""

    def __init__(self):
        super().__init__()
        self.operations, self.fp32, self.repeated, self.live, self.peak, self.dispatched = 0, 0, 0, 0, 0, 0
        self.sizes, self.syncs = {}, []  # sizes: storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.operations += count
            self.fp32 += count * (args[0].dtype == torch.float32)
            backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
            self.repeated += count // 5 * (func._overloadpacket == backward)
        if synchronises(func._overloadpacket, args, kwargs or {}, out):
            self.syncs.append(str(func))
        meta = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_meta]
        for tensor in meta:
            self.allocated(tensor.untyped_storage())
        inputs = tree_leaves((args, kwargs))
        self.dispatched += bool(meta) or any(isinstance(t, torch.Tensor) and t.is_meta for t in inputs)
        return out

    def allocated(self, storage) -> None:
        """Count a new storage until it is freed; a view shares one that is counted already."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, key)

    def freed(self, key) -> None:
        self.live -= self.sizes.pop(key)


def synchronises(op, args, kwargs: dict, out) -> bool:
    """Whether the host waits for it: it reads a number back, or copies a tensor without non_blocking."""
    aten, inputs = torch.ops.aten, [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    if op in (aten._local_scalar_dense, aten.nonzero, aten.masked_select):
        return any(t.is_meta for t in inputs)
    every = (t for t in [*inputs, *tree_leaves(out)] if isinstance(t, torch.Tensor))
    crosses = any(not t.is_meta and t.dim() for t in inputs) and any(t.is_meta for t in every)
    return crosses and not (kwargs.get("non_blocking") or (op is aten.copy_ and len(args) > 2 and args[2]))


def step(method: str, size="sd15", batch: int = 1, checkpointing: bool = False) -> tuple[int, int, int]:
    """One training step of a method: operations, peak bytes, and resident bytes, which stay from step to
    step: the weights, and of the trainable parameters an fp32 master copy and Adam's two averages. With few
    photos the peak is at the update, where a bf16 network's gradients are copied to fp32."""
    with fused_attention():
        sd = setup.build(size, "meta", torch.bfloat16)
        if checkpointing:
            memory.checkpoint(sd.unet)
        trainable, losses = setup.prepare(sd, method, setup.side(size))
        count = Count()
        weights = sum(p.nbytes for part in (sd.unet, sd.text.encoder) for p in part.parameters())
        masters = sum(4 * p.numel() for p in trainable.values() if p.dtype != torch.float32)
        resident = weights + masters + sum(8 * p.numel() for p in trainable.values())
        with count:
            losses(Batch(0, 0, range(batch), batch, device="meta")).mean().backward()
    return count.operations, resident + max(count.peak, masters), resident


def dispatched(method: str, size: str = "sd15", batch: int = 1) -> int:
    """The operations that one whole step of a method hands to a card, the trainer's update among them. At
    small batches a card waits for the host, which needs as long for a small operation as for a large one."""
    quiet = redirect_stdout(None), redirect_stderr(StringIO())
    with as_on_a_card(), tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
        sd = setup.build(size, "meta", torch.bfloat16)
        trainable, losses = setup.prepare(sd, method, setup.side(size))
        how = dict(steps=99, batch_size=batch, lr=1e-5, save=None, artefact="", config={})
        trainer, count, starts = Trainer(Path(folder) / "run", trainable, **how), Count(), []
        with count:
            for part in trainer:
                starts.append(count.dispatched)
                if len(starts) == 3:
                    break
                trainer.backward(losses(part))
    return starts[2] - starts[1]


def largest(method: str, limit: int, checkpointing: bool) -> int:
    """The most photos per step within `limit` bytes, 0 for none. Memory is linear from 16 of them on."""
    few, more = (step(method, batch=b, checkpointing=checkpointing)[1] for b in (16, 32))
    most = 32 + int((limit - more) // ((more - few) / 16))
    while 0 < most < 16 and step(method, batch=most, checkpointing=checkpointing)[1] > limit:
        most -= 1
    return max(0, most)


def share_of(work: str, size: str, batch: int, checkpointing: bool) -> tuple[int, int]:
    """The operations of one step of the bench's `work`: those of the model, which are the same for every
    program that does this work, and all that are executed, also those that a backward pass repeats."""
    if work == "sample":  # guided, at every step two rows a picture
        with fused_attention(), torch.no_grad(), Count() as count:
            sd = setup.build(size, "meta", torch.bfloat16)
            h, width = setup.side(size) // sd.vae.config.factor, sd.unet.config.cross_attention_dim
            context = torch.empty(2 * batch, 77, width, dtype=sd.dtype, device="meta")
            sd.guided(torch.empty(batch, 4, h, h, device="meta"), 3.0, 500.0, context, 7.5)
        return (setup.STEPS * count.operations,) * 2
    with Count() as count:
        model = step(work, size, batch)[0]
    return model - count.repeated, step(work, size, batch, checkpointing)[0] if checkpointing else model


@report_errors
def main(argv=None):
    p = Options(description=__doc__)
    p.add_argument("--limit", type=float, default=LIMIT / 2**30, help="GiB (default: %(default)g)")
    args = p.parse_args(argv)
    if not 0 < args.limit < float("inf"):
        raise ValueError(f"--limit is {args.limit:g}, but must be a number of GiB greater than 0")
    limit = int(args.limit * 2**30)
    print("operations handed to the card in a whole step of one photo, views included\n")
    methods = (*setup.TRAINED, *setup.RECIPES)
    print(f"| {' | '.join(methods)} |\n{'|---' * len(methods)}|")
    print(f"| {' | '.join(f'{dispatched(method):,}' for method in methods)} |\n", flush=True)
    simulated = "SD 1.5 at 512 px in bf16, simulated on the meta device"
    print(f"{simulated}; largest batch within {args.limit:g} GiB\n")
    sizes = "1 photo | 4 | 8 | 32 | largest | with --checkpointing: 32 | largest"
    print(f"| | operations a photo | resident | {sizes} |")
    print("|---" * 10 + "|")
    for method in methods:
        costs = [step(method, batch=n) for n in (1, 4, 8, 32)]
        operations, _, resident = costs[0]
        checkpointed = step(method, batch=32, checkpointing=True)[1]
        sizes = " | ".join(f"{n / 1e9:.1f} GB" for n in (resident, *(peak for _, peak, _ in costs)))
        most, most_checkpointed = (largest(method, limit, checkpointing) for checkpointing in (False, True))
        row = [method, f"{operations / 1e12:.2f}e12", sizes, most, f"{checkpointed / 1e9:.1f} GB"]
        print(f"| {' | '.join(map(str, row))} | {most_checkpointed} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
