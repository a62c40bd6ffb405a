"""Training: a loop that resumes bit for bit, on one process or many.

Batch, noise and dropped symbols are functions of (seed, step), drawn for the whole batch and then
shared out: a checkpoint needs no generator's state, and two processes see what one would see.
"""

import gc
import hashlib
import itertools
import math
import threading
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastvae.checkpoint import BEST, LAST, PREVIOUS, load_latest, save_checkpoint
from fastvae.metrics import bits_per_character, count_characters, evaluate
from fastvae.models.vae import trusting
from fastvae.processes import bare, check_fits, joined, stop_signals, wire, wrapped
from fastvae.recorded_step import RecordedStep
from fastvae.run_folder import METRICS, RunFolder
from fastvae.text.corpus import digest
from fastvae.text.reading import load_reading, record_reading
from fastvae.training_config import TrainingConfig

if TYPE_CHECKING:
    from rich.console import Console

    from fastvae.training_display import TrainingDisplay

__all__ = ["TrainingConfig", "train"]

CROWDED_SECONDS = 1  # the least time between records that tells whether cores are busy
TERMS = ("loss", "reconstruction", "kl", "auxiliary", "gradient_norm")


def train(
    model: nn.Module,
    corpus,
    config: TrainingConfig,
    run_dir: str | Path,
    *,
    validation=None,
    resume: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Train `model`, where it is, on `corpus` and keep the run in `run_dir`.

    What `torch.compile` or DataParallel made of a model trains as that and is saved as the model.

    -> step, interrupted, best (the lowest validation bound, nats per sample, or None), train and
    valid (the last record of each in metrics.jsonl, or None). Under torchrun every process calls
    this with the same arguments; the first one writes. SIGINT, SIGTERM and SIGHUP end it after the
    step, saved. Raises ValueError for settings, data or a folder that do not fit and for a loss
    that is not finite, OSError where the folder cannot be written.
    """
    for name, data in {"training": corpus, "validation": validation}.items():
        if data is not None:
            _check_data(name, data, bare(model))
    if validation is not None and validation.vocabulary != corpus.vocabulary:
        raise ValueError("the validation data have another vocabulary than the training data")
    forward, model = model, bare(model)
    with ExitStack() as stack:
        group = stack.enter_context(joined(model))
        trainer = _Trainer(model, forward, corpus, config, validation, group)
        stack.callback(trainer.release)
        if trainer.rank == 0:
            from fastvae.training_display import TrainingDisplay  # with it comes rich

            display = stack.enter_context(TrainingDisplay(console, config.steps, config.kl_target))
            run = RunFolder(run_dir, resume=resume, say=display.say)
            stack.callback(run.close)
            trainer.attach(run, display)
        trainer.start()
        stack.callback(model.train, model.training)
        model.train()
        stop = stack.enter_context(stop_signals(patient=group is not None))
        try:
            return trainer.loop(stop)
        except KeyboardInterrupt:  # a second one
            if trainer.display:
                saved = f"the last checkpoint is that of step {trainer.saved_at}"
                trainer.display.say(f"stopped without saving: {saved}")
            raise


class _Trainer:
    """One process's share of a run; on the first process also the run's folder and display."""

    def __init__(self, model, forward, corpus, config: TrainingConfig, validation, group) -> None:
        self.model, self.corpus, self.validation = model, corpus, validation
        self.config, self.group = config, group
        self.rank, self.world = (group.rank(), group.size()) if group else (0, 1)
        if config.batch_size // config.accumulate % self.world:
            raise ValueError(
                f"batch_size {config.batch_size} is not divisible by {self.world} processes times "
                f"accumulate {config.accumulate}"
            )
        self.device = next(model.parameters()).device
        symbols = config.batch_size * model.length
        logits = symbols // config.accumulate // self.world * model.vocab_size
        if self.device.type == "cpu":
            what = f"the ids and logits of a step (batch_size {config.batch_size})"
            check_fits(8 * symbols + 2 * 4 * logits, what)
        # A graph reads the learning rate where it was at the recording.
        cuda, rate = self.device.type == "cuda", config.learning_rate
        self.optimizer = torch.optim.Adam(
            model.parameters(),
            torch.tensor(rate, device=self.device) if cuda else rate,
            fused=self.device.type in ("cpu", "cuda"),
            capturable=cuda,
        )
        self.forward: nn.Module = forward
        self.recorded: RecordedStep | None = None
        self.run: RunFolder | None = None
        self.display: TrainingDisplay | None = None
        self.step = self.saved_at = 0
        self.best: float | None = None
        self.window = dict.fromkeys(("steps", "characters", *TERMS), 0.0)  # since the last record
        self.pending: list[Tensor] = []  # terms of steps that nobody has waited for yet
        self.records: dict[str, dict[str, Any]] = {}
        self.timed_steps, self.clock = 0, 0.0
        self.cpu_clock, self.crowded = 0.0, False

    def attach(self, run: RunFolder, display: "TrainingDisplay") -> None:
        self.run, self.display = run, display

    def start(self) -> None:
        """Begin the run, or fill model and optimizer from its checkpoint, in every process."""
        if self.run:
            self._open_run(self.run)
        if self.group:
            self.forward = wrapped(self.forward, self.group)
            self._share_optimizer()
        elif self.device.type == "cuda" and not isinstance(self.forward, nn.DataParallel):
            self.recorded = RecordedStep(self._update, self.device, self.display.say)

    def release(self) -> None:
        """Let go of gradients, the recorded step, and the wrapper, which its group must outlive."""
        self.optimizer.zero_grad()
        self.forward, self.group, self.recorded = self.model, None, None
        gc.collect()

    def _open_run(self, run: RunFolder) -> None:
        vocabulary, say = self.corpus.vocabulary, self.display.say
        state = None
        if run.fresh:
            run.create(self.model, vocabulary, self.config, self._data_digests)
        else:
            run.check(self.model, vocabulary, self.config, self._data_digests)
            state = load_latest(run.path, self.model, self.optimizer, say)
        record_reading(run.path, self.corpus)
        self.model.reading = load_reading(run.path)
        notes = [getattr(data, "notes", list)() for data in (self.corpus, self.validation)]
        for note in dict.fromkeys(itertools.chain(*notes)):
            say(note)
        if state:
            self.step = self.saved_at = state["step"]
            self.best, self.window = state["best"], state["window"]
            # A kill may have come between the checkpoint and the weights beside it.
            self.model.save_pretrained(run.path, vocabulary)
            say(f"going on from step {self.step}")
        elif (run.path / METRICS).exists():
            raise ValueError(f"{run.path} has metrics but no checkpoint: choose another folder")
        else:
            self._save_state(run.path / LAST)
        self.records = run.open_metrics(self.step)

    def _data_digests(self, of_before: bool) -> dict[str, str | None]:
        """Digests of all that training and validation read, or as runs of before have them."""
        if of_before:  # of the first batch
            tokens = self.corpus.batch(self.config.batch_size, _generator(self.config.seed, 0))
            return {"data": digest([tokens.numpy()])}
        validation = None if self.validation is None else self.validation.digest()
        return {"data": self.corpus.digest(), "validation": validation}

    def _share_optimizer(self) -> None:
        step = torch.tensor(float(self.step), device=wire(self.group, self.device))
        dist.broadcast(step, 0, self.group)
        self.step = self.saved_at = int(step)
        if not self.step:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.rank:
            empty = {
                n: {
                    "step": torch.tensor(
                        float(self.step), device="cpu"
                    ),  # its own: Adam counts in place
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
                for n, p in enumerate(self.model.parameters())
                if p.requires_grad
            }
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": empty})
        for parameter in parameters:
            for name in ("exp_avg", "exp_avg_sq"):
                dist.broadcast(self.optimizer.state[parameter][name], 0, self.group)

    def loop(self, stop: threading.Event) -> dict[str, Any]:
        """Train until the last step or until `stop` is set; see `train` for what it returns."""
        interrupted = False
        if self.run and self.step >= self.config.steps:
            self.display.say(f"the run is at step {self.step} already: raise steps to go on")
        if self.run and self.config.steps < self.config.kl_end:
            self.display.say(_unfinished_annealing(self.config))
        self.clock, self.cpu_clock = time.perf_counter(), time.thread_time()
        while self.step < self.config.steps and not interrupted:
            self._train_step()
            interrupted = self._agree(stop.is_set())
            self._look(interrupted)
        if interrupted and self.run:
            self.display.say(f"stopped and saved at step {self.step}: go on with --resume")
        return {
            "step": self.step,
            "interrupted": interrupted,
            "best": self.best,
            "train": self.records.get("train"),
            "valid": self.records.get("valid"),
        }

    def _agree(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all end after the same step."""
        if not self.group:
            return asked
        flag = torch.tensor(float(asked), device=wire(self.group, self.device))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag)

    def _train_step(self) -> None:
        tokens, *drawn = self._draw(self.step)
        self.window["characters"] += count_characters(self.model, tokens) / len(tokens)
        rate, weight = self.config.learning_rate_at(self.step), self.config.kl_schedule(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with trusting(self.model, tokens):
            if self.recorded:
                terms = self.recorded(tokens, *drawn, torch.tensor(weight))
            else:
                terms = self._update(tokens, *drawn, weight)
        self.pending.append(terms)
        self.step += 1
        self.timed_steps += 1

    def _update(
        self, tokens: Tensor, noise: Tensor, dropped: Tensor | None, kl_weight: float | Tensor
    ) -> Tensor:
        """One step from what `_draw` gives and the KL term's weight -> its terms [5]."""
        c = self.config
        self.optimizer.zero_grad()
        terms = 0
        for micro in range(c.accumulate):
            rows = self._rows(micro)
            last = micro == c.accumulate - 1
            with nullcontext() if last or not self.group else self.forward.no_sync():
                with self._precision():
                    out = self.forward(
                        tokens[rows].to(self.device),
                        kl_weight,
                        free_bits=c.free_bits,
                        noise=noise[rows].to(self.device),
                        dropped=None if dropped is None else dropped[rows].to(self.device),
                    )
                (out.loss / c.accumulate).backward()
            terms = terms + torch.stack([t.detach() for t in out[:4]]) / c.accumulate
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if c.clip_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), c.clip_norm, norm)
        self.optimizer.step()
        return torch.cat([terms, norm.to(terms).view(1)])

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens [B, L], noise [B, Z] and dropped [B, L] or None, for all processes together."""
        generator = _generator(self.config.seed, step)
        tokens = self.corpus.batch(self.config.batch_size, generator)
        noise = torch.randn(len(tokens), self.model.latent_size, generator=generator, device="cpu")
        p = self.model.word_dropout
        dropped = None
        if p > 0:
            dropped = torch.rand(tokens.shape, generator=generator, device="cpu") < p
        return tokens, noise, dropped

    def _rows(self, micro: int) -> slice:
        """This process's part of a micro-batch."""
        size = self.config.batch_size // self.config.accumulate
        share = size // self.world
        begin = micro * size + self.rank * share
        return slice(begin, begin + share)

    def _precision(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def _look(self, interrupted: bool) -> None:
        """What follows a step: the check of its terms, and what is due of records and files."""
        c = self.config

        def due(every: int) -> bool:
            return every > 0 and (self.step % every == 0 or self.step == c.steps)

        log, sample = due(c.log_every), due(c.sample_every) and c.samples > 0
        valid = self.validation is not None and due(c.eval_every)
        save = interrupted or due(c.checkpoint_every)
        # Elsewhere than on the CPU, waiting for a step's terms would leave the device idle.
        if self.device.type == "cpu" or log or valid or save:
            self._flush()
        if self.run:
            if log:
                self._log()
            self.display.update(self.step, self.records.get("train"))
            paused, cpu_paused = time.perf_counter(), time.thread_time()
            if valid:
                self._validate()
            if sample:
                self._sample()
            if save:
                self._save()
            self.clock += time.perf_counter() - paused
            self.cpu_clock += time.thread_time() - cpu_paused
        if save:
            self.saved_at = self.step

    def _flush(self) -> None:
        """Add the pending steps' terms to the window. Raises ValueError if one is not finite."""
        rows = torch.stack(self.pending)
        if self.group:
            dist.all_reduce(rows, group=self.group)
            rows /= self.world
        first = self.step - len(self.pending) + 1
        self.pending = []
        for step, row in enumerate(rows.tolist(), first):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(
                    f"{name} {value:.6g}" for name, value in zip(TERMS, row, strict=True)
                )
                raise ValueError(
                    f"step {step} is not finite ({terms}); the last good checkpoint is that of "
                    f"step {self.saved_at}: begin again with a lower learning_rate or clip_norm"
                )
            self.window["steps"] += 1
            for name, value in zip(TERMS, row, strict=True):
                self.window[name] += value

    def _log(self) -> None:
        """The means since the last record."""
        steps = self.window["steps"]
        loss, reconstruction, kl, auxiliary, norm = (self.window[name] / steps for name in TERMS)
        bound, characters = reconstruction + kl, self.window["characters"] / steps
        now = time.perf_counter()
        speed = self.timed_steps / (now - self.clock)
        record = {
            "step": self.step,
            "split": "train",
            "loss": loss,
            "reconstruction": reconstruction,
            "kl": kl,
            "auxiliary": auxiliary,
            "kl_weight": self.config.kl_schedule(self.step - 1),
            "bound": bound,
            "bpc": bits_per_character(bound, characters),
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "gradient_norm": norm,
            "steps_per_second": speed,
            "characters_per_second": speed * self.config.batch_size * self.model.length,
        }
        self._record(record)
        self._tell_if_crowded(now - self.clock)
        self.window = dict.fromkeys(self.window, 0.0)
        self.timed_steps, self.clock, self.cpu_clock = 0, now, time.thread_time()

    def _tell_if_crowded(self, seconds: float) -> None:
        """One line, once, where this thread, which no step leaves idle, mostly waits for a core."""
        ran = time.thread_time() - self.cpu_clock
        if self.crowded or self.device.type != "cpu" or seconds < CROWDED_SECONDS:
            return
        if ran < seconds / 3:
            self.crowded = True
            self.display.say(
                f"the cores are busy: training ran {ran:.1f} s of the last {seconds:.1f} s; fewer "
                "threads, or fewer processes beside it, may be faster"
            )

    def _validate(self) -> None:
        """Evaluate on the fixed pass; the best bound so far has its own checkpoint."""
        c = self.config
        batches = self.validation.batches(c.batch_size, c.eval_samples)
        weight = c.kl_schedule(self.step - 1)
        with self._precision():
            result = evaluate(self.model, batches, kl_weight=weight, seed=c.seed)
        self._record({"step": self.step, "split": "valid", "kl_weight": weight, **result})
        if self.best is None or result["bound"] < self.best:
            self.best = result["bound"]
            self._save_state(self.run.path / BEST)

    def _record(self, record: dict[str, Any]) -> None:
        self.records[record["split"]] = record
        self.run.log(record)

    def _sample(self) -> None:
        """Print greedy samples, of the same z each time."""
        z = torch.randn(
            self.config.samples,
            self.model.latent_size,
            generator=_generator(self.config.seed, "samples"),
            device="cpu",
        )
        tokens = self.model.generate(z.to(next(self.model.parameters())))
        self.display.say(f"samples at step {self.step}")
        for row in tokens.tolist():
            text = self.corpus.vocabulary.decode_bytes(row)
            self.display.say("  " + text.decode("utf-8", "surrogateescape"))

    def _save(self) -> None:
        self.run.sync()
        self._save_state(self.run.path / LAST, self.run.path / PREVIOUS)
        self.model.save_pretrained(self.run.path, self.corpus.vocabulary)

    def _save_state(self, path: Path, keep: Path | None = None) -> None:
        names = ("step", "best", "window")
        state = {"seed": self.config.seed, **{name: getattr(self, name) for name in names}}
        save_checkpoint(path, self.model, self.optimizer, state, keep)


def _unfinished_annealing(config: TrainingConfig) -> str:
    last = config.kl_schedule(config.steps - 1)
    return (
        f"the KL weight is annealed until step {config.kl_end} (kl_end), but the run ends at step "
        f"{config.steps} (steps), with a weight of {last:.3g} instead of {config.kl_target:g}"
    )


def _generator(seed: int, step: int | str) -> torch.Generator:
    """Random numbers of one step: close seeds and steps share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _check_data(name: str, data, model: nn.Module) -> None:
    sizes, wanted = (data.length, data.vocabulary.size), (model.length, model.vocab_size)
    if sizes != wanted:
        raise ValueError(
            f"the {name} data have length {sizes[0]} and {sizes[1]} symbols, "
            f"the model {wanted[0]} and {wanted[1]}"
        )
