"""AdamW by torch's fused kernel, for hundreds of small tensors."""

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient and of its square


class AdamW:
    """Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2: torch.optim.AdamW's numbers, to the bit.

    torch's counts the steps of each tensor, which for a UNet's 700 takes longer than their update, and it
    imports torch's compiler, 2 seconds of every start. Here tensors that step together share a count. As in
    torch's, a tensor without a gradient stands still, `grad_scale` divides all gradients, and where
    `found_inf` is 1 nothing is updated; both are tensors, decided on the device. A saved state has torch's
    form."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        usual = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        self.param_groups = [usual | group for group in groups]  # "params" and what else is its own
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if new := [p for p in params if p not in self.state]:
                count = torch.zeros((), device=params[0].device)
                for p in new:
                    self.state[p] = {"step": count, **{name: torch.zeros_like(p) for name in MOMENTS}}
            states = [self.state[p] for p in params]
            counts = {id(s["step"]): s["step"] for s in states}
            for s in (self.state[p] for p in group["params"] if p.grad is None and p in self.state):
                if id(s["step"]) in counts:  # stands still, apart from those that step
                    s["step"] = s["step"].clone()
            for count in counts.values():
                count += 1
            beta1, beta2 = group["betas"]
            mean, square = ([s[name] for s in states] for name in MOMENTS)
            options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
            options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
            options |= {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
            steps, grads = [s["step"] for s in states], [p.grad for p in params]
            torch._fused_adamw_(params, grads, mean, square, [], steps, **options)
            if self.found_inf is not None:
                for count in counts.values():
                    count -= self.found_inf

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """{"state": {number of a parameter: its state}, "param_groups": [...]}."""
        numbers, groups = {}, []
        for group in self.param_groups:
            for p in group["params"]:
                numbers[p] = len(numbers)
            groups.append({**group, "params": [numbers[p] for p in group["params"]]})
        return {"state": {numbers[p]: s for p, s in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, content: dict) -> None:
        """The state of a saved run, copied to where the parameters are; rates and decay stay as they are.
        Equal counts of a group become one."""
        self.state, first = {}, 0
        for group in self.param_groups:
            counts: dict[float, Tensor] = {}
            for number, p in enumerate(group["params"], first):
                if number in content["state"]:
                    saved = content["state"][number]
                    s = {name: saved[name].to(p.device, torch.float32, copy=True) for name in MOMENTS}
                    value = float(saved["step"])
                    self.state[p] = {"step": counts.setdefault(value, p.new_full((), value)), **s}
            first += len(group["params"])
