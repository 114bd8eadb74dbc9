"""Less memory, and some time: layers that keep less of the forward pass for the backward pass.

Autograd keeps what each operation asks for. Three of them can do with less, and make the rest again in the
backward pass for a few per cent more memory traffic and no matrix product (on a GPU; see below for a CPU):

    norm_silu   silu(group_norm(x)): keeps x; torch keeps the normalised x as well
    geglu       a * gelu(b): keeps (a, b), one tensor; torch keeps gelu(b) as well
    Conv2d      a frozen one keeps nothing of what went in; torch keeps it all (its issue 133566)

`pad_keys`, `project_kv`, `given_kv`, `shared_prefix` and `fuse_low_rank` save time instead.

Results and gradients are those of torch's own operations, on a CPU the first two's to the bit; there, where
memory is plenty and making it again costs 3 to 10 % of a step, torch's own are used. Where all that is not
enough, `checkpoint` runs each block twice instead of keeping its inside (Chen et al. 2016, arXiv:1604.06174).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_twice

ON_CPU = False  # tests switch the functions below on, on a CPU


def keeps_for_backward(x: Tensor) -> bool:
    """Whether something will be kept for a backward pass, where it is scarce."""
    return torch.is_grad_enabled() and x.requires_grad and (ON_CPU or not x.is_cpu)


class NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.shape = (*x.shape[:2], math.prod(x.shape[2:]), groups)  # as torch's operation wants it
        ctx.eps = eps
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *ctx.shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        y = torch.native_group_norm(x, weight, bias, *ctx.shape, ctx.eps)[0]
        # in channels_last the gradient comes in other strides, which the kernel would not look at
        grad = torch.ops.aten.silu_backward(grad, y).contiguous()
        needed = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *ctx.shape, needed)
        return *grads, None, None


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), x (B, C, ...)."""
    if keeps_for_backward(x):
        return NormSiLU.apply(x.contiguous(), norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


class GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * x, gate)], dim=-1)


def geglu(both: Tensor) -> Tensor:
    """(..., 2 C) -> (..., C): the first half times gelu of the second (Shazeer 2020, arXiv:2002.05202)."""
    if keeps_for_backward(both):
        return GEGLU.apply(both)
    x, gate = both.chunk(2, dim=-1)
    return x * F.gelu(gate)


class FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, (stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.how), None, None, None, None


class Conv2d(nn.Conv2d):
    """A convolution that keeps its input for the backward pass only if it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        trainable = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if keeps_for_backward(x) and not trainable:
            usual = (self.dilation, self.groups, self.padding_mode) == ((1, 1), 1, "zeros")
            assert usual, "none here has others"
            return FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class LowRank(torch.autograd.Function):
    """x W' + b + scale (x down') up' of a frozen W (out, in) and b: a LoRA and its Linear."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        ctx.shape, ctx.scale = x.shape, scale
        x = x.flatten(0, -2)  # (N, in)
        low = scale * F.linear(x, down)  # (N, rank)
        ctx.save_for_backward(x, weight, down, up, low)
        return F.linear(x, weight, bias).addmm_(low, up.t()).unflatten(0, ctx.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, down, up, low = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (N, out)
        low_grad = ctx.scale * (grad @ up)  # (N, rank)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(low_grad, down).view(ctx.shape)
        return x_grad, None, None, low_grad.t() @ x, grad.t() @ low, None


def fuse_low_rank(lora: nn.Module) -> None:
    """Let a LoRA around a frozen Linear be one operation where it is trained on a GPU. There a small batch
    waits for its launches: half as many, and neither scale nor sum is a pass of its own over (N, out)."""
    plain, layer = lora.forward, lora.base
    if not isinstance(layer, nn.Linear) or (layer.weight.is_cpu and not ON_CPU):  # not a convolution, a LoRA
        return

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return LowRank.apply(x, layer.weight, layer.bias, lora.down, lora.up, lora.scale)
        return plain(x)

    lora.forward = forward


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, heads, N or T, d)."""
    if mask is None and k.shape[2] != q.shape[2]:  # to the words; a picture's positions fill their vectors
        k, v, mask = pad_keys(k, v)
    mask = None if mask is None else mask.to(q.dtype)  # keys of half precision may have been made fp32 since
    if q.is_cpu and q.dtype == torch.bfloat16 and (q.requires_grad or k.requires_grad):
        # torch's backward pass on a CPU is two to four times as slow in bf16 (docs/LOG.md)
        mask = None if mask is None else mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)


def pad_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, heads, T, d), on a CPU padded to 16, 32, 48 ... tokens, and a mask (1, 1, 1, T')
    over it: torch's CPU kernel computes in vectors of 16 and takes the rest of a row one by one, so SD's
    77 tokens cost more than 80 (docs/trials.py pad_keys)."""
    padding = -k.shape[2] % 16
    if not (k.is_cpu and padding):
        return k, v, None
    mask = F.pad(k.new_zeros(1, 1, 1, k.shape[2]), (0, padding), value=-torch.inf)
    return F.pad(k, (0, 0, 0, padding)), F.pad(v, (0, 0, 0, padding)), mask


def project_kv(unet: nn.Module, context: Tensor) -> list[tuple]:
    """[(cross-attention, (keys, values, mask))] for a context (B, T, D), computed once for all steps of a
    sampler. Of a compiled network nothing: it would be compiled again for every prompt."""
    if getattr(unet, "compiled", False):
        return []
    context = context.to(unet.conv_norm_out.weight.dtype)
    return [
        (attn, pad_keys(attn.split_heads(attn.to_k(context)), attn.split_heads(attn.to_v(context))))
        for attn in cross_attentions(unet)
    ]


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    return [module for name, module in unet.named_modules() if name.endswith(".attn2")]


def given_kv(projected: list[tuple]) -> contextlib.AbstractContextManager[None]:
    """Inside, each cross-attention takes its keys and values from `project_kv`, whatever the context."""
    return replaced_forwards([(attn, lambda x, _, a=attn, kv=kv: a.attend(x, *kv)) for attn, kv in projected])


def shared_prefix(unet: nn.Module, rows: int) -> contextlib.AbstractContextManager[None]:
    """Inside, a batch (rows * B, ...) of the same B pictures `rows` times, at one timestep, is computed once
    where guidance has nothing to tell apart yet: before the first words come in. Of a compiled network, whose
    shapes are compiled, nothing is shared."""
    if rows == 1 or getattr(unet, "compiled", False):
        return contextlib.nullcontext()

    def once(forward, *inputs):  # the time embedding has one row for all
        y = forward(*(a[: max(1, len(a) // rows)] for a in inputs))
        return y.repeat(rows, *[1] * (y.dim() - 1))

    return replaced_forwards([(m, functools.partial(once, m.forward)) for m in before_the_words(unet)])


def before_the_words(unet: nn.Module) -> Iterator[nn.Module]:
    """What takes time before the first cross-attention."""
    yield unet.conv_in
    for block in unet.down_blocks:
        if hasattr(block, "attentions"):
            yield from (block.resnets[0], block.attentions[0].transformer_blocks[0].attn1)
            return
        yield from (*block.resnets, *getattr(block, "downsamplers", ()))


@contextlib.contextmanager
def replaced_forwards(calls: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Inside, the function beside each module is its forward."""
    before = [vars(module).get("forward") for module, _ in calls]  # of `checkpoint`
    for module, call in calls:
        module.forward = call
    try:
        yield
    finally:
        for (module, _), forward in zip(calls, before, strict=True):
            if forward:
                module.forward = forward
            else:
                del module.forward


def blocks(unet: nn.Module):
    """The parts that repeat, each of one shape: every resnet and every transformer."""
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        yield from block.resnets
        yield from getattr(block, "attentions", ())


def checkpoint(unet: nn.Module) -> None:
    """Keep only what goes into each block, and run it twice: a third of a step's time, most of its memory."""
    for block in blocks(unet):
        block.forward = functools.partial(run_twice, block.forward, use_reentrant=False)


def compile(unet: nn.Module) -> None:
    """Let torch write kernels for each block, at its first call: minutes that only a long run wins back."""
    torch._dynamo.config.recompile_limit = 128  # one for every shape of the same code
    for block in blocks(unet):
        block.forward = torch.compile(block.forward, dynamic=False)
    unet.compiled = True
