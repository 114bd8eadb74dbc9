"""The chores of training, behind an iterator: order, rate, micro-batches, clipping, log, preview, save, resume.

    run = Run(out, learns, steps=400, batch_size=8, lr=1e-3, save=..., preview=...)
    for batch in run:                                    # one micro-batch
        run.update(losses)                               # (B,) losses of its slots

Randomness is a function of (seed, step, slot), never of a stream that is used up.  So a resumed run needs no generator
state and is bit-exact, a preview cannot disturb the training, any split into micro-batches or processes sees the same
numbers, and two methods with one seed see the same photos, timesteps and noise.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hanokdiff.files import read_json, replacing, write_json, write_text
from hanokdiff.training import distributed
from hanokdiff.training.noise import Batch
from hanokdiff.training.state import differences, fp32_master, read_state, step_of


class Trainer:
    """Iterate over micro-batches; call `update` with the loss of each.

    out            the run's folder: config.json, log.jsonl, previews/, state/, and what `save` writes
    learns         name -> parameter, all that is trained
    save           writes the artefact to a path; called at the end and, with the step in its name, every `save_every`
    artefact       the artefact's file name, such as "lora.safetensors"
    preview        draws a picture of the present state (or None); called every `preview_every` steps
    lr             one learning rate, or several by the beginning of the parameters' names: {"unet": 2e-6, "text": 1e-6}
    watch          more figures for each line of the log, {name: number}
    held_out       loss of photos that are not learnt from; logged at the start and LOOKS times along the way
    config         what the run was started with: stored in config.json, compared on resume
    force          on resume, take another config than the folder's, as long as the tensors fit
    """

    CLIP = 1.0  # gradient norm
    LOG_EVERY = 10
    LOOKS = 10

    def __init__(
        self, out: Path, learns: dict[str, nn.Parameter], *, steps: int, batch_size: int, lr: float | dict[str, float],
        save: Callable, artefact: str, config: dict, micro_batch: int = 0, seed: int = 0, weight_decay: float = 0.01,
        save_every: int = 0, preview: Callable | None = None, preview_every: int = 0, watch: Callable | None = None,
        held_out: Callable | None = None, resume: bool = False, force: bool = False,
    ):  # fmt: skip
        lrs = lr if isinstance(lr, dict) else {"": lr}
        self.out, self.learns, self.steps, self.batch_size = out, learns, steps, batch_size
        self.lr = next(iter(lrs.values()))  # the first of several is the one to log; the others keep their distance
        self.micro_batch, self.seed, self.slots = micro_batch or batch_size, seed, distributed.shard(batch_size)
        if distributed.RANK:  # the first process looks, draws and saves; the others wait for it in their next step
            save, preview, held_out, watch = lambda path: None, None, None, None
        self.save, self.save_every, self.artefact = save, save_every, artefact
        self.preview, self.preview_every, self.config = preview, preview_every, config
        self.watch, self.held_out = watch, held_out
        self.parameters = list(learns.values())
        self.masters = [fp32_master(p) for p in self.parameters]
        groups = [{"params": [m for name, m in zip(learns, self.masters, strict=True) if name.startswith(prefix)],
                   "share": value / self.lr} for prefix, value in lrs.items()]  # fmt: skip
        assert sum(len(g["params"]) for g in groups) == len(learns), f"learning rates {lrs} do not cover what learns"
        self.optimizer = torch.optim.AdamW(groups, self.lr, weight_decay=weight_decay, fused=True)
        self.step, self.seconds, self.lowered = 0, 0.0, 1.0
        self.state: Path | None = None  # the newest that was written, or gone on from
        device = self.parameters[0].device
        self.loss, self.norm, self.bad = (torch.zeros((), device=device) for _ in range(3))  # since the last log point
        self.step_loss = torch.zeros((), device=device)
        self.interrupted = False
        other = not resume or self._check_config(force)
        if resume:
            self._load_state()
            if other:
                self.lowered = 1.0  # the rate that was asked for now, and another chance
            for file in out.glob(".tmp??????"):  # where safetensors writes before it renames: a kill has left it
                file.unlink(missing_ok=True)
        if distributed.RANK == 0:
            out.mkdir(parents=True, exist_ok=True)
            if not self.step:  # what lies there is of no run, or of one that had not come to its first state
                (out / "log.jsonl").unlink(missing_ok=True)
                self._delete_states()
            if other:
                write_json(out / "config.json", config)
        rates = ", ".join(f"{value:g} {prefix}".strip() for prefix, value in lrs.items())
        among = f" in {distributed.WORLD_SIZE} processes" if distributed.WORLD_SIZE > 1 else ""
        size = 12 * sum(p.numel() for p in self.parameters)  # fp32, and AdamW's two moments
        disk = f"; 2 states of {size / 1e6:,.1f} MB on disk until then" if save_every else ""
        print(f"{steps} steps of {batch_size}{among} at learning rate {rates}, then {out / artefact}{disk}")

    # ---------------------------------------------------------------------------------------------- the iterator

    def __iter__(self) -> Iterator[Batch]:
        old = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)} if _main_thread() else {}
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        self.clock = time.perf_counter()
        try:
            if self.held_out and not self.step:
                self._look()
            if self._preview_is_due() and not self._preview_file.exists():  # killed after the state, before the picture
                self._preview()
            while self.step < self.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(self.step) * group["share"]
                for first in self.slots[:: self.micro_batch]:
                    slots = range(first, min(first + self.micro_batch, self.slots.stop))
                    self.share, self.pending = len(slots) / self.batch_size, True
                    yield Batch(self.seed, self.step, slots, self.batch_size)
                    assert not self.pending, "run.update(loss) was not called for a batch"
                self._finish_step()
            self._finish()
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def update(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, weighted by its share of the batch: losses (B,), or their mean."""
        loss = loss.mean() * self.share
        loss.backward()
        self.step_loss += loss.detach()
        self.pending = False

    def rate(self, step: int) -> float:
        """Warm up over a tenth of the steps (at most 100), stay, and fall to zero over the second half."""
        warm, cool = max(1, min(100, self.steps // 10)), max(1, self.steps // 2)
        return self.lr * self.lowered * min(1.0, (step + 1) / warm, (self.steps - step) / cool)

    def _finish_step(self) -> None:
        """Clip and step. A loss or gradient that is not finite skips the update, on the device: nobody waits for it."""
        distributed.all_reduce([self.step_loss] + [p.grad for p in self.parameters if p.grad is not None])
        halves = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for p, m in halves:
            m.grad, p.grad = None if p.grad is None else p.grad.float(), None
        norm = nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        bad = (~torch.isfinite(norm + self.step_loss)).float()
        self.optimizer.grad_scale = torch.where(bad > 0, 1.0, norm.clamp(min=self.CLIP) / self.CLIP)
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for p, m in halves:
                p.copy_(m)
        self.bad += bad
        self.loss += torch.where(bad > 0, 0.0, self.step_loss)
        self.norm += torch.where(bad > 0, 0.0, norm)
        self.step_loss.zero_()
        self.step += 1
        self.bar.update()
        last = self.step == self.steps
        saves = self.save_every and self.step % self.save_every == 0 and not last and not bad.item()
        stops = distributed.any_rank(self.interrupted) and not last
        if self.step % self.LOG_EVERY == 0 or last:
            bad_steps, count = self._log()
            if bad_steps > count // 2:
                return self._diverged("the loss is no longer finite")
        if (saves or stops or last) and not self._finite():
            return self._diverged("what was learnt is no longer finite")
        if self.held_out and (self.step * self.LOOKS // self.steps > (self.step - 1) * self.LOOKS // self.steps):
            self._look()
        if saves:
            self.save(self.out / f"{Path(self.artefact).stem}-{self.step:06d}{Path(self.artefact).suffix}")
        if saves or stops:
            self.save_state()
        if self._preview_is_due():
            self._preview()
        if stops:
            self.bar.close()
            distributed.barrier()  # torchrun ends all of them when one ends
            print(f"stopped at step {self.step} of {self.steps}; go on with --resume {self.out}")
            raise SystemExit(130)

    def _finite(self) -> bool:
        """Whether all that learns is; by its largest number, in one look for all tensors."""
        return bool(torch.isfinite(nn.utils.get_total_norm([p.detach() for p in self.parameters], math.inf)))

    def _log(self) -> tuple[int, int]:
        """Between saves the one place where the host waits for the device: every 10 steps. Returns how many of how many
        were bad."""
        count = (self.step - 1) % self.LOG_EVERY + 1
        bad = int(self.bad.item())
        good = max(1, count - bad)
        loss = self.loss.item() / good if bad < count else None
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        row = {"step": self.step, "loss": loss and round(loss, 6), "grad_norm": round(self.norm.item() / good, 5),
               "lr": self.rate(self.step - 1), "skipped": bad, "seconds": round(self.seconds, 3)}  # fmt: skip
        if self.bad.is_cuda:
            row["gpu_bytes"] = torch.cuda.max_memory_allocated(self.bad.device)
        if self.watch:
            row |= {k: round(v, 5) if math.isfinite(v) else None for k, v in self.watch().items()}
        self._write(row)
        self.bar.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}", refresh=False)
        for total in (self.loss, self.norm, self.bad):
            total.zero_()
        return bad, count

    def _write(self, row: dict) -> None:
        if distributed.RANK:
            return
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def _look(self) -> None:
        start, value = time.perf_counter(), self.held_out()
        self._write({"step": self.step, "held_out": round(value, 6) if math.isfinite(value) else None})
        self.clock += time.perf_counter() - start  # like a preview, not training time

    def _preview_is_due(self) -> bool:
        at = self.preview and self.preview_every and self.step
        return bool(at) and (self.step % self.preview_every == 0 or self.step == self.steps)

    @property
    def _preview_file(self) -> Path:
        return self.out / "previews" / f"{self.step:06d}.png"

    def _preview(self) -> None:
        start = time.perf_counter()
        self.bar.set_description("drawing a preview")  # on a CPU, at the real size, it takes minutes
        picture = self.preview()
        self.bar.set_description(None)
        self._preview_file.parent.mkdir(exist_ok=True)
        with replacing(self._preview_file) as aside:
            picture.save(aside, "png")
        self.clock += time.perf_counter() - start  # previews are not training time

    def _diverged(self, what: str) -> None:
        """Most updates since the last look, or a weight, are not finite: go back once, at half the rate; then stop."""
        if self.lowered < 1 or not self._states():
            kept, way = "nothing was saved before", "start again with"
            if self._states():
                kept, way = f"the last good state is in {self.out}", f"go on with --resume {self.out} --force and"
            raise ValueError(f"{what} at step {self.step}; {kept}; {way} a lower --lr than {self.lr * self.lowered:g}")
        lowered = self.lowered / 2
        self._load_state()
        self.lowered = lowered
        tqdm.write(f"not finite: back to step {self.step}, at half the learning rate")
        self.bar.n = self.step

    def _finish(self) -> None:
        if distributed.RANK == 0:
            self.save(self.out / self.artefact)
            self._delete_states()
        self.bar.close()
        print(f"{self.seconds:.1f} s of training, {self.steps / max(self.seconds, 1e-9):.1f} steps/s; "
              f"wrote {self.out / self.artefact}")  # fmt: skip

    def _interrupt(self, *_) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if distributed.RANK == 0:  # not print: it may be in the middle of a line when a signal comes
            os.write(2, b"\nstopping when this step is done and saved; once more stops at once\n")

    # --------------------------------------------------------------------------------------------------- its state

    def _states(self) -> list[Path]:
        """The saved states, the newest first: each was written aside, synced and renamed, so none is half there."""
        return sorted((self.out / "state").glob("[0-9]*.pt"), key=lambda f: (len(f.name), f.name), reverse=True)

    def _delete_states(self, keep: Path | None = None) -> None:
        for file in (self.out / "state").glob("[0-9]*.pt*"):  # with what a kill left half written
            if file != keep:
                file.unlink()

    def save_state(self) -> None:
        """Everything a resumed run needs: what learns, the optimiser, the step."""
        if distributed.RANK:
            return
        file = self.out / "state" / f"{self.step:06d}.pt"
        file.parent.mkdir(exist_ok=True)
        self._delete_states(keep=self.state)  # it and the new one: should the disk damage that, this is still there
        state = {"step": self.step, "seconds": self.seconds, "lowered": self.lowered,
                 "pending": [t.item() for t in (self.loss, self.norm, self.bad)],
                 "learns": {k: m.detach() for k, m in zip(self.learns, self.masters, strict=True)},
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        with replacing(file) as aside:
            torch.save(state, aside)
        self.state = file

    def _take(self, state: dict) -> None:
        """All that a state holds, and nothing else."""
        if {k: t.shape for k, t in state["learns"].items()} != {k: p.shape for k, p in self.learns.items()}:
            raise KeyError("other parameters")
        with torch.no_grad():
            for (name, p), m in zip(self.learns.items(), self.masters, strict=True):
                m.copy_(state["learns"][name])
                p.copy_(m)
        # the moments are the state's; rates and decay are this run's, which --force may have changed
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]["state"]})
        self.step, self.seconds, self.lowered = state["step"], state["seconds"], state["lowered"]
        for total, value in zip((self.loss, self.norm, self.bad), state["pending"], strict=True):
            total.fill_(value)

    def _check_config(self, force: bool) -> bool:
        """Refuse to go on with anything else than before; with `force`, say what it is. Returns whether there is."""
        told = "; ".join(differences(read_json(self.out / "config.json"), self.config))
        if told and not force:
            raise ValueError(f"{self.out}: {told}: another run cannot go on from there; undo that, accept it with "
                             "--force, or start a new one without --resume")  # fmt: skip
        if told:
            print(f"--force: {told}; what was learnt until now was learnt with the former")
        return bool(told)

    def _load_state(self) -> None:
        """The newest state that can be read."""
        damage = ""
        for file in self._states():
            try:
                state = read_state(file, self.parameters[0].device)
                break
            except ValueError as e:
                damage = damage or str(e)
                print(f"{e}; trying the one before it")
        else:
            if damage:
                raise ValueError(f"{damage}, nor any before it; start again without --resume")
            print(f"{self.out} holds no saved state yet; starting from step 0")
            return
        try:
            self._take(state)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"{file} does not fit what learns with these options, or is no state at all "
                             f"({type(e).__name__}); leave out the options that differ, or start again without --resume"
                             ) from None  # fmt: skip
        if self.step > self.steps:
            raise ValueError(f"{file} is of step {self.step}, but --steps is {self.steps}; give at least {self.step}")
        self.state = file
        log = self.out / "log.jsonl"
        if distributed.RANK == 0 and log.exists():  # lines after the saved step will be written again
            rows = [r for r in log.read_text("utf-8", "replace").splitlines() if step_of(r) <= self.step]
            write_text(log, "".join(r + "\n" for r in rows))
        print(f"going on from step {self.step} of {self.steps}")


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
