"""The training loop: draw a batch, step, record; opens and resumes the run directory."""

import itertools
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from fastvae.models.pretrained import BEST, signatures
from fastvae.models.text_vae import TextVAE
from fastvae.signals import stop_signals
from fastvae.text.corpus import Corpus, digest
from fastvae.text.reading import check_reading, reading_of
from fastvae.training.checkpoint import LAST, load_latest
from fastvae.training.config import TrainingConfig
from fastvae.training.processes import bare, joined, wire
from fastvae.training.recorder import Recorder
from fastvae.training.run_directory import METRICS, RunDirectory
from fastvae.training.step import TrainingStep, draw_batch, seeded_generator

if TYPE_CHECKING:
    from rich.console import Console


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainingConfig,
    run_dir: str | Path,
    *,
    validation: Corpus | None = None,
    resume: bool = False,
    console: "Console | None" = None,
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Train a model on a corpus and save the run in a directory from which it can be resumed.

    Under torchrun every process calls this with the same arguments; only the first one writes
    files. SIGINT, SIGTERM and SIGHUP end the run after the current step and save it. A model
    wrapped by `torch.compile` or `DataParallel` trains wrapped and is saved unwrapped.

    Args:
        model: a `HybridVAE` or `LSTMVAE`; it trains in place on its device, with several GPU
            processes on the GPU of `LOCAL_RANK`. All its modules are put in training mode, norms
            that were in eval mode too; afterwards each has its own mode again.
        corpus: the training data.
        config: the settings.
        run_dir: the run directory, created if missing: weights, checkpoints, metrics.
        validation: data for evaluations, with the vocabulary of `corpus`; None evaluates nothing.
        resume: continue the run in `run_dir`, or begin one if there is none. Without `resume` a
            directory that holds a run is an error.
        console: where progress is shown; None is standard error.
        notes: sentences to show before those of the corpora.

    Returns:
        step: number of steps done.
        interrupted: whether a signal ended the run.
        best: the lowest validation bound, nats per sequence, or None.
        train, valid: the last record of each in metrics.jsonl, or None.

    Raises:
        ValueError: settings, data or directory do not fit together, or the loss is not finite.
        OSError: the directory cannot be written.
    """
    for name, data in {"training": corpus, "validation": validation}.items():
        if data is not None:
            _check_data(name, data, bare(model))
    if validation is not None and validation.vocabulary != corpus.vocabulary:
        raise ValueError("the validation data have another vocabulary than the training data")
    forward, model = model, bare(model)
    with ExitStack() as stack:
        group = stack.enter_context(joined(model))
        step = TrainingStep(model, forward, config, group)
        stack.callback(step.release)
        recorder, done = Recorder(step, corpus, validation), 0
        if step.rank == 0:
            from fastvae.training.progress import TrainingDisplay  # imports rich

            display = stack.enter_context(
                TrainingDisplay(console, config.steps, config.honest_kl_weight)
            )
            run = RunDirectory(run_dir, resume=resume, say=display.say)
            stack.callback(run.close)
            recorder.attach(run, display)
            done = _open_run(recorder, notes)
            if not group:
                step.record(display.say)
        done = step.share(done)
        stack.callback(_restore_modes, {m: m.training for m in model.modules()})
        model.train()
        stop = stack.enter_context(stop_signals(patient=group is not None))
        try:
            return _run_loop(step, recorder, done, stop)
        except (KeyboardInterrupt, SystemExit):  # a second signal
            if recorder.display:
                saved = f"the last checkpoint is that of step {recorder.saved_at}"
                recorder.display.say(f"stopped without saving: {saved}")
            raise


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    """Put each module in the mode that it had: a user may have frozen a norm by `eval`."""
    for module, training in modes.items():
        module.training = training


def _run_loop(
    step: TrainingStep, recorder: Recorder, done: int, stop: threading.Event
) -> dict[str, Any]:
    """Train until the last step or until `stop` is set -> the result of `train`."""
    model, corpus, config = step.model, recorder.corpus, step.config
    say, stopping = recorder.display.say if recorder.display else None, False
    if say and done >= config.steps:
        say(f"the run is at step {done} already: raise steps to continue")
    if say and done < config.steps and config.ends_before_annealing:
        say(_unfinished_annealing(config))
    recorder.start(done)
    while done < config.steps and not stopping:
        batch = draw_batch(corpus, model, config, done)
        terms = step(batch, done)
        done += 1
        stopping = _any_process_stopped(stop.is_set(), step)
        recorder.after_step(batch, terms, stopping)
    if stopping and say:
        say(f"stopped and saved at step {done}: continue with --resume")
    return {
        "step": done,
        "interrupted": stopping,
        "best": recorder.best,
        "train": recorder.records.get("train"),
        "valid": recorder.records.get("valid"),
    }


def _any_process_stopped(stopped: bool, step: TrainingStep) -> bool:
    """Whether any process was asked to stop: all end after the same step."""
    if not step.group:
        return stopped
    flag = torch.tensor(float(stopped), device=wire(step.group, step.device))
    dist.all_reduce(flag, dist.ReduceOp.MAX, step.group)
    return bool(flag)


def _open_run(recorder: Recorder, notes: Iterable[str]) -> int:
    """Begin the run, or fill model, optimizer and recorder from its checkpoint -> steps done."""
    run, model, corpus, config = recorder.run, recorder.model, recorder.corpus, recorder.config
    vocabulary, say, state = corpus.vocabulary, recorder.display.say, None

    @cache
    def digests(of_before: bool) -> dict[str, str | None]:
        """Digests of all that training and validation read, or as runs of before have them."""
        if of_before:  # older runs: the first batch
            tokens = corpus.batch(config.batch_size, seeded_generator(config.seed, 0))
            return {"data": digest([tokens.numpy()])}
        validation = None if recorder.validation is None else recorder.validation.digest()
        return {"data": corpus.digest(), "validation": validation}

    if run.fresh:
        model.reading = reading_of(corpus)
        run.create(model, vocabulary, config, digests)
    else:
        run.check(model, vocabulary, config, digests)
        model.reading = check_reading(run.path, corpus)
        state = load_latest(run.path, model, recorder.optimizer, say)
        if state:
            run.check_checkpoint(config, digests(False), state)
    recorder.data, recorder.signed = digests(False), signatures(run.path)
    found = [getattr(data, "notes", list)() for data in (corpus, recorder.validation)]
    for note in dict.fromkeys(itertools.chain(notes, *found)):
        say(note)
    if state:
        recorder.best, recorder.window = state["best"], state["window"]
        if recorder.best is not None and not (run.path / BEST).exists():
            say(f"{run.path / BEST} is missing: the best weights from here on are kept")
            recorder.best = None
        if recorder.controller:
            recorder.controller.state.copy_(torch.tensor(state["kl_controller"]))
        # The run may have been killed after writing the checkpoint and before the weights.
        model.save_pretrained(run.path, vocabulary)
        say(f"resuming from step {state['step']}")
    elif (run.path / METRICS).exists():
        raise ValueError(f"{run.path} has metrics but no checkpoint: choose another folder")
    else:
        recorder.save_checkpoint(LAST)
    done = state["step"] if state else 0
    recorder.records = run.open_metrics(done, done - int(recorder.window["steps"]))
    return done


def _unfinished_annealing(config: TrainingConfig) -> str:
    """The warning that the run ends before its annealing."""
    last = config.kl_schedule(config.steps - 1)
    return (
        f"the KL weight is annealed until step {config.kl_end} (kl_end), but the run ends at step "
        f"{config.steps} (steps), with a weight of {last:.3g} instead of {config.kl_target:g}"
    )


def _check_data(name: str, data: Any, model: TextVAE) -> None:
    """Raise ValueError unless the data have the model's length and vocabulary size."""
    sizes, wanted = (data.length, data.vocabulary.size), (model.length, model.vocab_size)
    if sizes != wanted:
        raise ValueError(
            f"the {name} data have length {sizes[0]} and {sizes[1]} tokens, "
            f"the model {wanted[0]} and {wanted[1]}"
        )
