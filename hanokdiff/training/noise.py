"""A batch and its random numbers: functions of the seed, the step and the index."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hanokdiff.seeding import seeded_generator


@dataclass(frozen=True)
class Batch:
    """Some slots of one step's global batch; the source of everything random about them. B = slots times halves."""

    seed: int | str
    step: int
    slots: range
    size: int  # of the global batch
    halves: tuple[str, ...] = ("",)  # DreamBooth has a second half, with draws of its own

    def half(self, *names: str) -> "Batch":
        """The same slots of another half, or of several one after the other: half("class"), half("", "class")."""
        return replace(self, halves=names)

    def _streams(self, what: str) -> list[torch.Generator]:
        return [seeded_generator(self.seed, self.step, s, half + what) for half in self.halves for s in self.slots]

    def pick(self, n: int) -> Tensor:
        """Which of n photos lies in each slot (B,): every epoch a new permutation, every photo once."""
        out = []
        for half in self.halves:
            for slot in self.slots:
                epoch, place = divmod(self.step * self.size + slot, n)
                out.append(torch.randperm(n, generator=seeded_generator(self.seed, half + "epoch", epoch, n))[place])
        return torch.stack(out)

    def uniform(self, what: str) -> Tensor:
        """One number in [0, 1) per slot (B,)."""
        return torch.cat([torch.rand(1, generator=g) for g in self._streams(what)])

    def integers(self, what: str, high: int) -> Tensor:
        """One whole number below `high` per slot (B,)."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self._streams(what)])

    def normal(self, what: str, shape) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._streams(what)])
