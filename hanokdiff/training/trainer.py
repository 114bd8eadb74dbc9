"""Everything of a training but the method: order, rate, micro-batches, clipping, log, previews, files.

    trainer = Trainer(out, trainable, steps=400, batch_size=8, lr=1e-3, save=..., preview=...)
    for batch in trainer:                                # one micro-batch; goes on where a run stopped
        trainer.backward(losses)                         # (B,) one loss for each of its photos

What a batch holds and every random number follow from (seed, step, index): see noise.py. On disk: state.py.
"""

import contextlib
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

from hanokdiff import lock
from hanokdiff.files import write_json
from hanokdiff.images import write_png
from hanokdiff.training import distributed, state
from hanokdiff.training.noise import Batch
from hanokdiff.training.optimizer import AdamW

CLIP = 1.0  # gradient norm
LOG_EVERY = 10  # steps
PAGE_EVERY = 10.0  # seconds between two versions of a run's page
VALIDATIONS = 10  # per run, and one at the start


class Trainer:
    """Iterate over micro-batches; call `backward` with the loss of each."""

    def __init__(
        self,
        out: Path,  # the run's folder: config.json, log.jsonl, previews/, state/, and what `save` writes
        trainable: dict[str, nn.Parameter],  # by name
        *,
        steps: int,
        batch_size: int,
        # one, or by the beginning of names: {"unet": 2e-6, "text": 1e-6}; unused ones are left out
        lr: float | dict[str, float],
        save: Callable[
            [Path], None
        ],  # writes the artefact to a path, at the end and every `save_every` steps
        artefact: str,  # its file name, such as "lora.safetensors"
        config: dict,  # what the run was started with: stored in config.json, compared on resume
        micro_batch: int = 0,  # photos at once; gradients add up to those of `batch_size`. 0: all at once
        seed: int = 0,
        weight_decay: float = 0.01,
        save_every: int = 0,
        preview: Callable | None = None,  # draws a picture of the present state, every `preview_every` steps
        preview_every: int = 0,
        metrics: Callable[[], dict] | None = None,  # more numbers for each line of the log
        validate: Callable[[], float] | None = None,  # the loss of held-out photos, VALIDATIONS times
        page: Callable[[Path, str], None] | None = None,  # writes the run's page: folder, artefact's name
        resume: bool = False,  # go on from the newest state
        force: bool = False,  # also under another config, if the tensors fit
    ):
        self.out, self.trainable, self.steps, self.batch_size = out, trainable, steps, batch_size
        self.micro_batch, self.seed = micro_batch or batch_size, seed
        self.indices = distributed.shard(batch_size)
        # the main process validates, draws and saves; the others wait in their next step
        if distributed.RANK:
            save, preview, validate, metrics, page = lambda path: None, None, None, None, None
        self.save, self.save_every, self.artefact = save, save_every, artefact
        self.preview, self.preview_every = preview, preview_every
        self.metrics, self.validate, self.page = metrics, validate, page
        self.page_time = -math.inf

        self.parameters = list(trainable.values())
        self.masters = [fp32_master(p) for p in self.parameters]
        pairs = zip(self.parameters, self.masters, strict=True)
        self.half_precision = [(p, m) for p, m in pairs if p is not m]
        lrs = lr if isinstance(lr, dict) else {"": lr}
        lrs = {part: rate for part, rate in lrs.items() if any(name.startswith(part) for name in trainable)}
        self.lr = next(iter(lrs.values()))  # the first one is logged; the others stay in proportion to it
        groups = []
        for prefix, value in lrs.items():
            own = [m for name, m in zip(trainable, self.masters, strict=True) if name.startswith(prefix)]
            groups.append({"params": own, "share": value / self.lr})
        covered = sum(len(group["params"]) for group in groups)
        assert covered == len(trainable), f"{lrs} do not cover {list(trainable)[:9]}"
        self.optimizer = AdamW(groups, self.lr, weight_decay)

        self.step, self.seconds, self.lr_scale = 0, 0.0, 1.0
        self.state_file: Path | None = None  # the newest state that was written or read
        self.interrupted = False
        device = self.parameters[0].device
        self.step_loss = torch.zeros((), device=device)
        # sums since the last log point, kept on the device so that no step waits for them
        self.loss, self.norm, self.nonfinite = (torch.zeros((), device=device) for _ in range(3))

        changed = not resume or state.check_config(out, config, force)
        if resume:
            self._load_state()
            if changed:
                self.lr_scale = 1.0  # the rate that was asked for now, and another chance
        if distributed.RANK == 0:
            self._prepare_folder(config if changed else None)
        self._print_plan(lrs)

    def _prepare_folder(self, config: dict | None) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        lock.take(self.out)
        for file in self.out.glob(".tmp??????"):  # where safetensors writes before it renames: left by a kill
            file.unlink(missing_ok=True)
        if not self.step:  # what lies there is of a run that never reached its first state
            (self.out / "log.jsonl").unlink(missing_ok=True)
            state.delete_states(self.out)
        if config is not None:
            write_json(self.out / "config.json", config)

    def _print_plan(self, lrs: dict[str, float]) -> None:
        rates = ", ".join(f"{value:g} {prefix}".strip() for prefix, value in lrs.items())
        world = f" in {distributed.WORLD_SIZE} processes" if distributed.WORLD_SIZE > 1 else ""
        size = 12 * sum(p.numel() for p in self.parameters)  # fp32, and AdamW's two moments
        disk = f"; 2 states of {size / 1e6:,.1f} MB on disk until then" if self.save_every else ""
        plan = f"{self.steps} steps of {self.batch_size}{world} at learning rate {rates}"
        print(f"{plan}, then {self.out / self.artefact}{disk}")

    # ----------------------------------------------------------------------------------------------- the loop

    def __iter__(self) -> Iterator[Batch]:
        here = threading.current_thread() is threading.main_thread()  # no other may set handlers
        numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
        handlers = {number: signal.signal(number, self._interrupt) for number in numbers}
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        self.clock = time.perf_counter()
        try:
            if self.validate and not self.step:
                self._validate()
            if self._preview_is_due() and not self._preview_file.exists():  # killed between state and picture
                self._preview()
            while self.step < self.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(self.step) * group["share"]
                for first in self.indices[:: self.micro_batch]:
                    part = range(first, min(first + self.micro_batch, self.indices.stop))
                    self.share, self.pending = len(part) / self.batch_size, True
                    yield Batch(self.seed, self.step, part, self.batch_size, device=self.step_loss.device)
                    assert not self.pending, "trainer.backward(losses) was not called for a batch"
                self._optimizer_step()
                self._after_step()
            self._finish()
        finally:
            self.bar.close()
            lock.release(self.out)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def backward(self, losses: Tensor) -> None:
        """Add a micro-batch's gradients, weighted by its share of the batch: losses (B,), or their mean."""
        loss = losses.mean() * self.share
        loss.backward()
        self._add_to_masters()
        self.step_loss += loss.detach()
        self.pending = False

    def _add_to_masters(self) -> None:
        """Move half-precision gradients into those of the fp32 copies, where micro-batches and processes add
        up: bf16 has 8 bits, and a sum in it loses what the later ones add. Some at once: each alone would be
        a launch, all would keep two copies of every gradient."""
        pairs = [(p, m) for p, m in self.half_precision if p.grad is not None]
        for bucket in distributed.buckets([p for p, _ in pairs]):
            part, pairs = pairs[: len(bucket)], pairs[len(bucket) :]
            first = [(p, m) for p, m in part if m.grad is None]
            later = [(p.grad, m.grad) for p, m in part if m.grad is not None]
            if later:
                grads, sums = zip(*later)
                torch._foreach_add_(sums, grads)
            if first:
                for _, m in first:
                    m.grad = torch.empty_like(m)
                torch._foreach_copy_([m.grad for _, m in first], [p.grad for p, _ in first])
            for p, _ in part:
                p.grad = None

    def rate(self, step: int) -> float:
        """Warm up over a tenth of the steps (at most 100), stay, and fall to zero over the second half."""
        warmup, decay = max(1, min(100, self.steps // 10)), max(1, self.steps // 2)
        return self.lr * self.lr_scale * min(1.0, (step + 1) / warmup, (self.steps - step) / decay)

    def _optimizer_step(self) -> None:
        """Clip and step. A non-finite loss or gradient skips the update, decided on the device: no wait."""
        gradients = [m.grad for m in self.masters if m.grad is not None]
        distributed.all_reduce([self.step_loss, *gradients])
        norm = nn.utils.get_total_norm(gradients)
        nonfinite = (~torch.isfinite(norm + self.step_loss)).float()
        self.optimizer.grad_scale = torch.where(nonfinite > 0, 1.0, norm.clamp(min=CLIP) / CLIP)
        self.optimizer.found_inf = nonfinite
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.half_precision:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*self.half_precision, strict=True)))
        self.loss += torch.where(nonfinite > 0, 0.0, self.step_loss)
        self.norm += torch.where(nonfinite > 0, 0.0, norm)
        self.nonfinite += nonfinite
        self.skipped = nonfinite
        self.step_loss.zero_()
        self.step += 1

    def _after_step(self) -> None:
        """Log, save, validate and draw where it is time to."""
        self.bar.update()
        last = self.step == self.steps
        saves = self.save_every and self.step % self.save_every == 0 and not last and not self.skipped.item()
        stops = distributed.any_rank(self.interrupted) and not last
        if self.step % LOG_EVERY == 0 or last:
            skipped, count = self._log()
            if skipped > count // 2:
                return self._roll_back("the loss is no longer finite")
        if (saves or stops or last) and not self._parameters_are_finite():
            return self._roll_back("a trained parameter is no longer finite")
        before, now = ((step * VALIDATIONS // self.steps) for step in (self.step - 1, self.step))
        if self.validate and before < now:
            self._validate()
        if saves:
            name = Path(self.artefact)
            self.save(self.out / f"{name.stem}-{self.step:06d}{name.suffix}")
        if saves or stops:
            self.save_state()
        if self._preview_is_due():
            self._preview()
        if not last and self.step % LOG_EVERY == 0:
            self._write_page(PAGE_EVERY)
        if stops:
            self.bar.close()
            distributed.barrier()  # torchrun ends all processes when one ends
            print(f"stopped at step {self.step} of {self.steps}; go on with --resume {self.out}")
            raise SystemExit(130)

    def _finish(self) -> None:
        artefact = self.out / self.artefact
        if distributed.RANK == 0:
            self.save(artefact)
            state.delete_states(self.out)
        self._write_page()
        self.bar.close()
        speed = self.steps / max(self.seconds, 1e-9)
        print(f"{self.seconds:.1f} s of training, {speed:.1f} steps/s; wrote {artefact}")

    # ------------------------------------------------------------------------------ log, validation, previews

    def _log(self) -> tuple[int, int]:
        """Write a line of the log: between saves the one place where the host waits for the device.
        Returns how many updates were skipped, of how many."""
        lock.refresh()
        count = (self.step - 1) % LOG_EVERY + 1
        loss, norm, skipped = torch.stack([self.loss, self.norm, self.nonfinite]).tolist()
        skipped = int(skipped)
        good = max(1, count - skipped)
        loss = loss / good if skipped < count else None
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        row = {"step": self.step, "loss": loss and round(loss, 6), "grad_norm": round(norm / good, 5)}
        row |= {"lr": self.rate(self.step - 1), "skipped": skipped, "seconds": round(self.seconds, 3)}
        if self.loss.is_cuda:
            row["gpu_bytes"] = torch.cuda.max_memory_allocated(self.loss.device)
        if self.metrics:
            row |= {k: round(v, 5) if math.isfinite(v) else None for k, v in self.metrics().items()}
        self._write(row)
        self.bar.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}", refresh=False)
        for total in (self.loss, self.norm, self.nonfinite):
            total.zero_()
        return skipped, count

    def _write(self, row: dict) -> None:
        if distributed.RANK == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """What is done inside is no training time; what a GPU still has to do of the steps before it is."""
        if self.loss.is_cuda:
            torch.cuda.synchronize(self.loss.device)
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def _validate(self) -> None:
        with self._clock_stopped():
            value = self.validate()
            self._write({"step": self.step, "held_out": round(value, 6) if math.isfinite(value) else None})

    def _preview_is_due(self) -> bool:
        if not (self.preview and self.preview_every and self.step):
            return False
        return self.step % self.preview_every == 0 or self.step == self.steps

    def _write_page(self, seconds: float = 0.0) -> None:
        """The run's page, if the last one is so many seconds old."""
        start = time.perf_counter()
        if self.page and start - self.page_time >= seconds:
            self.page(self.out, self.artefact)
            self.page_time = time.perf_counter()
            self.clock += self.page_time - start  # not training time

    @property
    def _preview_file(self) -> Path:
        return self.out / "previews" / f"{self.step:06d}.png"

    def _preview(self) -> None:
        with self._clock_stopped():
            self.bar.set_description("drawing a preview")  # on a CPU, at the real size, it takes minutes
            try:
                picture = self.preview()
            except ValueError as e:  # what is not a number ends no training: the next step's loss will tell
                print(f"no preview of step {self.step}: {e}")
            else:
                self._preview_file.parent.mkdir(exist_ok=True)
                write_png(self._preview_file, picture)
            self.bar.set_description(None)

    # ----------------------------------------------------------------------- interruptions, divergence, state

    def _interrupt(self, *_) -> None:
        """Ctrl-C and SIGTERM end the run after the step under way."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if distributed.RANK == 0:  # not print: a signal may come in the middle of one
            os.write(2, b"\nstopping when this step is done and saved; once more stops at once\n")

    def _parameters_are_finite(self) -> bool:
        """By the largest number: one wait for all tensors."""
        largest = nn.utils.get_total_norm([p.detach() for p in self.parameters], math.inf)
        return bool(torch.isfinite(largest))

    def _roll_back(self, what: str) -> None:
        """Most updates since the last log point, or a parameter, are not finite: go back once, then stop."""
        saved = state.state_files(self.out)
        if self.lr_scale < 1 or not saved:
            kept = f"the last good state is in {self.out}; go on with --resume {self.out} --force and"
            way = kept if saved else "nothing was saved before; start again with"
            tried = self.lr * self.lr_scale
            raise ValueError(f"{what} at step {self.step}; {way} a lower --lr than {tried:g}")
        lr_scale = self.lr_scale / 2
        self._load_state()
        self.lr_scale = lr_scale
        tqdm.write(f"not finite: back to step {self.step}, at half the learning rate")
        self.bar.n = self.step

    def save_state(self) -> None:
        """Write everything that a resumed run needs."""
        if distributed.RANK:
            return
        content = {"step": self.step, "seconds": self.seconds, "lowered": self.lr_scale}
        content["pending"] = [t.item() for t in (self.loss, self.norm, self.nonfinite)]
        content["learns"] = {k: m.detach() for k, m in zip(self.trainable, self.masters, strict=True)}
        content["optimizer"] = self.optimizer.state_dict()
        self.state_file = state.write_state(self.out, self.step, content, keep=self.state_file)

    def _load_state(self) -> None:
        """Go on from the newest state that can be read, or from step 0."""
        newest = state.newest_state(self.out, self.parameters[0].device)
        if newest is None:
            print(f"{self.out} holds no saved state yet; starting from step 0")
            return
        file, content = newest
        try:
            self._apply_state(content)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
            reason = e if isinstance(e, ValueError) else type(e).__name__
            unfit = f"{file} does not fit what these options train, or is no state at all ({reason})"
            way = "leave out the options that differ, or start again without --resume"
            raise ValueError(f"{unfit}; {way}") from None
        if self.step > self.steps:
            beyond = f"{file} is of step {self.step}, but --steps is {self.steps}"
            raise ValueError(f"{beyond}; give at least {self.step}")
        self.state_file = file
        if distributed.RANK == 0:
            state.truncate_log(self.out, self.step)
        print(f"going on from step {self.step} of {self.steps}")

    def _apply_state(self, content: dict) -> None:
        shapes = {k: p.shape for k, p in self.trainable.items()}
        saved = {k: t.shape for k, t in content["learns"].items()}
        if saved != shapes:
            odd = next(k for k in (*shapes, *saved) if shapes.get(k) != saved.get(k))
            was, now = (f"of shape {tuple(s[odd])}" if odd in s else "not there" for s in (saved, shapes))
            raise ValueError(f"{odd} was {was} and is now {now}")
        with torch.no_grad():
            for (name, p), m in zip(self.trainable.items(), self.masters, strict=True):
                m.copy_(content["learns"][name])
                p.copy_(m)
        # the moments are the state's; rates and decay are this run's, which --force may have changed
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds, self.lr_scale = content["step"], content["seconds"], content["lowered"]
        for total, value in zip((self.loss, self.norm, self.nonfinite), content["pending"], strict=True):
            total.fill_(value)


def fp32_master(p: nn.Parameter) -> nn.Parameter:
    """The fp32 copy that the optimiser updates for a half-precision parameter: bf16 would round steps of 1e-6
    away. It stays with the parameter as `p.master`, for saving. An fp32 parameter is its own."""
    if p.dtype == torch.float32:
        return p
    p.master = getattr(p, "master", p).detach().to(p.device, torch.float32, copy=True)
    return nn.Parameter(p.master)
