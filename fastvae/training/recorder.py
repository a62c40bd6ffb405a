"""Everything after a step: checks and averages terms, writes records, evaluates, samples, saves."""

import math
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvae.metrics import bits_per_character, count_characters, evaluate
from fastvae.models.pretrained import BEST
from fastvae.training.checkpoint import LAST, PREVIOUS, save_checkpoint
from fastvae.training.run_directory import RunDirectory, fixed_settings
from fastvae.training.step import TERMS, Batch, TrainingStep, autocast, seeded_generator

if TYPE_CHECKING:
    from fastvae.training.progress import TrainingDisplay

CROWDED_SECONDS = 1  # least time over which busy cores can be detected
SLOW_SECONDS = 10  # without a record, after which busy cores are looked for between records


class Recorder:
    """Averages a run's terms; on the first process, which has a `run`, also writes its files.

    `best` is the lowest validation bound, `records` the last record of each split.

    Args:
        step: the run's training step.
        corpus: the training data.
        validation: the validation data, or None.
    """

    def __init__(self, step: TrainingStep, corpus: Any, validation: Any) -> None:
        self.model, self.optimizer, self.config = step.model, step.optimizer, step.config
        self.group, self.world, self.device = step.group, step.world, step.device
        self.controller, self.kl_weight = step.controller, step.kl_weight
        self.corpus, self.validation = corpus, validation
        self.run: RunDirectory | None = None
        self.display: TrainingDisplay | None = None
        self.step = self.saved_at = 0
        self.best: float | None = None
        self.window = dict.fromkeys(("steps", "characters", *TERMS), 0.0)  # since the last record
        self.pending: list[Tensor] = []  # terms of steps, not yet synchronized
        self.records: dict[str, dict[str, Any]] = {}
        self.data: dict[str, str | None] = {}  # digests
        self.signed: dict[str, str] = {}  # signatures of the model's files
        self.timed_steps, self.clock = 0, 0.0
        self.cpu_clock, self.crowded = 0.0, False

    def attach(self, run: RunDirectory, display: "TrainingDisplay") -> None:
        """Make this the process that records and shows progress.

        Args:
            run: the run directory to record in.
            display: where to show progress.
        """
        self.run, self.display = run, display

    def start(self, step: int) -> None:
        """Start the clock; `step` steps are done and saved."""
        self.step = self.saved_at = step
        self.clock, self.cpu_clock = time.perf_counter(), time.thread_time()

    def after_step(self, batch: Batch, terms: Tensor, stopping: bool) -> None:
        """Record a step, and log, evaluate, sample and save if due.

        Args:
            batch: the step's batch.
            terms: its terms, [5], as `TERMS` names them, on any device.
            stopping: whether the run ends here; then everything is saved.

        Raises:
            ValueError: a term is not finite.
            OSError: a file cannot be written.
        """
        self.step += 1
        self.timed_steps += 1
        self.pending.append(terms)
        characters = count_characters(self.model, batch.tokens) / len(batch.tokens)
        self.window["characters"] += characters
        c = self.config
        log, sample = self._due(c.log_every), self._due(c.sample_every) and c.samples > 0
        validate = self.validation is not None and self._due(c.eval_every)
        save = stopping or self._due(c.checkpoint_every)
        # Elsewhere than on the CPU, waiting for a step's terms would leave the device idle.
        if self.device.type == "cpu" or log or validate or save:
            self._collect_terms()
        if self.run:
            if log:
                self._record_means()
            elif (seconds := time.perf_counter() - self.clock) > SLOW_SECONDS:
                self._warn_if_crowded(seconds)
            self.display.update(self.step, self.records.get("train"))
            paused, cpu_paused = time.perf_counter(), time.thread_time()
            if validate:
                self._validate()
            if sample:
                self._show_samples()
            if save:
                self._save()
            self.clock += time.perf_counter() - paused
            self.cpu_clock += time.thread_time() - cpu_paused
        if save:
            self.saved_at = self.step

    def save_checkpoint(self, name: str, keep: str | None = None) -> None:
        """Write a checkpoint of the run.

        Args:
            name: its file name.
            keep: file name for an existing checkpoint of this name; None overwrites it.

        Raises:
            OSError: the file cannot be written.
        """
        self.run.check_place()
        state = {
            "seed": self.config.seed,
            "step": self.step,
            "best": self.best,
            "window": self.window,
            "settings": fixed_settings(self.config),
            "data": self.data,
        }
        if self.controller:
            state["kl_controller"] = self.controller.state.tolist()
        folder = self.run.path
        kept = None if keep is None else folder / keep
        save_checkpoint(folder / name, self.model, self.optimizer, state, kept, self.signed)

    def _due(self, every: int) -> bool:
        """Whether an action done every `every` steps, and in the last step, is due; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _collect_terms(self) -> None:
        """Add the terms of pending steps to the window; raise ValueError if one is not finite."""
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
                    f"non-finite loss at step {step} ({terms}); the last good checkpoint is "
                    f"that of step {self.saved_at}: begin again with a lower learning_rate or "
                    "clip_norm"
                )
            self.window["steps"] += 1
            for name, value in zip(TERMS, row, strict=True):
                self.window[name] += value

    def _record_means(self) -> None:
        """Record the means since the last record."""
        steps = self.window["steps"]
        means = {name: self.window[name] / steps for name in TERMS}
        bound = means["reconstruction"] + means["kl"]
        now = time.perf_counter()
        speed = self.timed_steps / (now - self.clock)
        record = {
            "step": self.step,
            "split": "train",
            "loss": means["loss"],
            "reconstruction": means["reconstruction"],
            "kl": means["kl"],
            "auxiliary": means["auxiliary"],
            "kl_weight": self.kl_weight(self.step - 1),
            "bound": bound,
            "bpc": bits_per_character(bound, self.window["characters"] / steps),
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "gradient_norm": means["gradient_norm"],
            "steps_per_second": speed,
            "characters_per_second": speed * self.config.batch_size * self.model.length,
        }
        self._record(record)
        self._warn_if_crowded(now - self.clock)
        self.window = dict.fromkeys(self.window, 0.0)
        self.timed_steps, self.clock, self.cpu_clock = 0, now, time.thread_time()

    def _warn_if_crowded(self, seconds: float) -> None:
        """Warn once if this thread, which is busy in every step, mostly waited for a core."""
        ran = time.thread_time() - self.cpu_clock
        if self.crowded or self.device.type != "cpu" or seconds < CROWDED_SECONDS:
            return
        if ran < seconds / 3:
            self.crowded = True
            self.display.say(
                f"the cores are busy: training ran {ran:.1f} s of the last {seconds:.1f} s; fewer "
                "threads, or fewer other processes, may be faster"
            )

    def _validate(self) -> None:
        """Evaluate on the fixed pass; save the best bound so far in its own checkpoint."""
        c = self.config
        batches = self.validation.batches(c.batch_size, c.eval_samples)
        weight = self.kl_weight(self.step - 1)
        with autocast(self.device, c):
            result = evaluate(self.model, batches, kl_weight=weight, seed=c.seed)
        self._record({"step": self.step, "split": "valid", "kl_weight": weight, **result})
        bound = result["bound"]
        if not math.isfinite(bound):
            self.display.say(
                f"validation at step {self.step}: the bound is {bound}, never the best"
            )
        elif self.best is None or not self.best <= bound:  # older runs may have kept a NaN
            self.best = bound
            self.save_checkpoint(BEST)

    def _record(self, record: dict[str, Any]) -> None:
        """Keep a record as the last of its split and log it."""
        self.records[record["split"]] = record
        self.run.log(record)

    def _show_samples(self) -> None:
        """Print greedy samples, from the same z each time."""
        z = torch.randn(
            self.config.samples,
            self.model.latent_size,
            generator=seeded_generator(self.config.seed, "samples"),
            device="cpu",
        )
        tokens = self.model.generate(z.to(next(self.model.parameters())))
        self.display.say(f"samples at step {self.step}")
        for row in tokens.tolist():
            text = self.corpus.vocabulary.decode_bytes(row)
            self.display.say("  " + text.decode("utf-8", "surrogateescape"))

    def _save(self) -> None:
        """Save metrics, checkpoint and model."""
        self.run.sync()
        self.save_checkpoint(LAST, PREVIOUS)
        self.model.save_pretrained(self.run.path, self.corpus.vocabulary)
