"""torch's fused AdamW with one count of steps for all tensors that step together."""

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2, in torch's fused kernel: the same numbers.

    torch adds 1 to a count of its own for each tensor, and takes it back by `found_inf`: two operations for
    each of a UNet's 700 tensors, more time than the update of small ones. Here tensors share their count. As
    in torch's, a tensor without a gradient is left as it is, and so is its count; `grad_scale` divides all
    gradients, and where `found_inf` is 1 nothing is updated, both decided on the device."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        super().__init__(groups, lr, weight_decay=weight_decay, fused=True)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self._prepare(params)
            states = [self.state[p] for p in params]
            counts = {id(s["step"]): s["step"] for s in states}
            self._set_apart([p for p in group["params"] if p.grad is None], counts)
            for count in counts.values():
                count += 1
            beta1, beta2 = group["betas"]
            names = ("exp_avg", "exp_avg_sq", None, "step")  # None: amsgrad's
            moments = [[s[name] for s in states] if name else [] for name in names]
            options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
            options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
            device = {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
            torch._fused_adamw_(params, [p.grad for p in params], *moments, **options, **device)
            if self.found_inf is not None:
                for count in counts.values():
                    count -= self.found_inf

    def _prepare(self, params: list[Tensor]) -> None:
        """The state of tensors that step for the first time, with one count."""
        new = [p for p in params if not self.state[p]]
        if new:
            count = torch.zeros((), device=new[0].device)
            for p in new:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": count, **moments}

    def _set_apart(self, still: list[Tensor], counts: dict[int, Tensor]) -> None:
        """Tensors that do not step now keep their count, apart from those that do."""
        for p in still:
            if p in self.state and id(self.state[p]["step"]) in counts:
                self.state[p]["step"] = self.state[p]["step"].clone()

    def load_state_dict(self, content: dict) -> None:
        """torch's, whose copies have a count each: equal ones of a group become one again."""
        super().load_state_dict(content)
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            values = torch.stack([s["step"] for s in states]).tolist() if states else []
            counts: dict[float, Tensor] = {}
            for s, value in zip(states, values, strict=True):
                s["step"] = counts.setdefault(value, s["step"])
