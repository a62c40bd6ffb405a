"""Training: settings, records, checkpoints and run folders, and what goes wrong in one line."""

import errno
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastvae.metrics import evaluate
from fastvae.models import load
from fastvae.training import TrainingConfig, recorder, train
from fastvae.training.progress import TrainingDisplay
from fastvae.training.run_directory import RunDirectory
from fastvae.training.step import seeded_generator

WORKER = Path(__file__).with_name("training_worker.py")
spec = importlib.util.spec_from_file_location("training_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
Letters, make_model = worker.Letters, worker.make_model
pytestmark = pytest.mark.usefixtures("no_power_cuts")
SPEEDS = ("steps_per_second", "characters_per_second")


def config(**changes):
    return TrainingConfig(**{**worker.CONFIG, **changes})


def quiet():
    return Console(file=io.StringIO())


def run(folder, model=None, corpus=None, resume=False, console=None, validation=None, **changes):
    model = make_model() if model is None else model
    result = train(
        model,
        corpus or Letters(),
        config(**changes),
        folder,
        validation=validation or Letters(),
        resume=resume,
        console=console or quiet(),
    )
    return model, result


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


class Acting(Letters):
    """Does something while the batch of a step, counted from 1, is drawn."""

    def __init__(self, step, act):
        super().__init__()
        self.left, self.act = step, act

    def batch(self, count, generator):
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().batch(count, generator)


def interrupting(step, number=signal.SIGINT):
    return Acting(step, lambda: os.kill(os.getpid(), number))


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", "many"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("lr_decay", -0.5),
        ("lr_decay_every", 0),
        ("clip_norm", 0),
        ("free_bits", -1),
        ("precision", "fp8"),
        ("precision", 32),
        ("accumulate", 3),
        ("seed", -1),
        ("eval_samples", 0),
        ("log_every", 0),
        ("kl_floor", float("inf")),
        ("kl_cycles", 0),
        ("kl_start", 100),
    ],
)
def test_senseless_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field.removeprefix("kl_")) as error:
        config(**{field: value})
    assert "\n" not in str(error.value)


LEAST = dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "checkpoint_every"), 1)
LEAST |= {"eval_samples": 1, "lr_decay_every": 1}
LEAST |= dict.fromkeys(("seed", "eval_every", "sample_every", "samples", "lr_decay_start"), 0)


@pytest.mark.parametrize("field", LEAST)
def test_least_and_largest_whole_numbers(field):
    least, largest = LEAST[field], 2**53
    assert getattr(TrainingConfig(**{field: least}), field) == least
    with pytest.raises(ValueError, match=f"^{field} must be {least} or more, got {least - 1}$"):
        TrainingConfig(**{field: least - 1})
    others = {"batch_size": largest} if field == "accumulate" else {}
    assert getattr(TrainingConfig(**{field: largest, **others}), field) == largest
    with pytest.raises(ValueError, match=f"^{field} must be at most {largest}, got {largest + 1}$"):
        TrainingConfig(**{field: largest + 1, **others})
    with pytest.raises(ValueError, match=f"^{field} must be at most {largest}, got a larger one"):
        TrainingConfig(**{field: 10**5000})


@pytest.mark.parametrize("field", ["lr_floor", "free_bits", "kl_floor", "kl_target"])
def test_numbers_may_be_zero_and_not_less(field):
    assert getattr(TrainingConfig(**{field: 0.0}), field) == 0
    with pytest.raises(ValueError, match=f"^{field} must be 0 or more, got -1e-09$"):
        TrainingConfig(**{field: -1e-9})


@pytest.mark.parametrize("field", ["learning_rate", "lr_decay", "clip_norm", "kl_nats"])
def test_numbers_above_zero_may_be_small(field):
    assert getattr(TrainingConfig(**{field: 1e-9}), field) == 1e-9
    with pytest.raises(ValueError, match=f"^{field} must be above 0, got 0.0$"):
        TrainingConfig(**{field: 0.0})


def test_unknown_fields_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"'step': did you mean steps\?"):
        TrainingConfig.from_dict({"step": 3})
    assert TrainingConfig.from_dict({"steps": 3}).steps == 3


def test_schedules():
    settings = TrainingConfig(
        learning_rate=1.0, lr_decay=0.5, lr_decay_every=10, lr_decay_start=20, kl_floor=0.1,
        kl_start=10, kl_end=20, kl_target=0.9,
    )  # fmt: skip
    rates = {0: 1.0, 29: 1.0, 30: 0.5, 39: 0.5, 40: 0.25}
    assert {step: settings.learning_rate_at(step) for step in rates} == rates
    weights = {0: 0.1, 10: 0.1, 15: 0.5, 20: 0.9, 99: 0.9}
    assert {step: settings.kl_schedule(step) for step in weights} == pytest.approx(weights)


# What a run does


def test_a_run_learns_and_leaves_a_model(tmp_path):
    model, result = run(tmp_path, steps=100, eval_every=50, learning_rate=1e-2)
    assert result["step"] == 100 and not result["interrupted"]
    assert all(parameter.grad is None for parameter in model.parameters())  # they are released
    assert result["valid"]["bound"] < 8 * math.log(10)  # what the letters' frequencies alone give
    loaded, vocabulary = load(tmp_path)
    assert vocabulary == Letters.vocabulary
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    # The last record is that of the model which was saved.
    again = evaluate(loaded, Letters().batches(4), kl_weight=1.0)
    assert result["valid"] == {"step": 100, "split": "valid", "kl_weight": 1.0, **again}


@pytest.mark.parametrize("target", [0.2, 1.0])
def test_the_kl_is_held_at_its_target(tmp_path, target):
    """Of the log 10 = 2.3 nats that a text of letters holds."""
    changes = {"steps": 1500, "batch_size": 32, "learning_rate": 5e-3, "lr_decay": 1.0}
    changes |= {"log_every": 100, "eval_every": 0, "checkpoint_every": 1500}
    run(tmp_path, kl_nats=target, **changes)
    kls = [r["kl"] for r in records(tmp_path)[-5:]]
    assert sum(kls) / 5 == pytest.approx(target, rel=0.05)
    weights = [r["kl_weight"] for r in records(tmp_path)]
    assert len(set(weights)) == len(weights)


def test_a_target_that_no_text_has_is_refused(tmp_path):
    most = 8 * math.log(11)
    with pytest.raises(ValueError, match=rf"kl_nats must be at most {most:.1f}, .*, got 20"):
        run(tmp_path, kl_nats=20.0)
    assert run(tmp_path / "most", kl_nats=most, steps=1)[1]["step"] == 1
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="kl_nats must be"):
            TrainingConfig(kl_nats=target)


@pytest.mark.parametrize("free_bits", [0.0, 0.1])
def test_records_are_means_of_the_steps_terms(tmp_path, free_bits):
    """Against a plain loop over torch.optim.Adam, drawn from the same (seed, step)."""
    steps, model = 6, make_model(dtype=torch.float64)
    settings = {"steps": steps, "log_every": 3, "seed": 5, "free_bits": free_bits}
    run(tmp_path, make_model(dtype=torch.float64), **settings)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    expected = []
    for step in range(steps):
        generator = seeded_generator(5, step)
        tokens = Letters().batch(4, generator)
        noise = torch.randn(4, 3, generator=generator)
        drop_mask = torch.rand(4, 8, generator=generator) < 0.3
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.9 ** (step // 5)
        weight = min(max(step - 2, 0) / 10, 1.0)
        out = model(tokens, weight, free_bits=free_bits, eps=noise, drop_mask=drop_mask)
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append([t.item() for t in (*out[:4], norm)])
    names = ("loss", "reconstruction", "kl", "auxiliary", "gradient_norm")
    train_records = [r for r in records(tmp_path) if r["split"] == "train"]
    for record, rows in zip(train_records, (expected[:3], expected[3:]), strict=True):
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        assert [record[name] for name in names] == pytest.approx(means)
    assert [r["learning_rate"] for r in train_records] == pytest.approx([1e-3, 0.9e-3])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(load(tmp_path)[0].state_dict()[name], value)


def test_records_of_lines_count_what_the_loss_counts(tmp_path, monkeypatch):
    """And the seconds of steps alone, by a clock that the batches move on."""
    now = [0.0]

    class Padded(Letters):
        def batch(self, count, generator):
            now[0] += 0.25
            return super().batch(count, generator)

        def _samples(self, index):
            ends = 3 + index.view(-1, 1) % 5
            return super()._samples(index).masked_fill(torch.arange(8) >= ends, 10)

    def slow(*arguments, **options):
        now[0] += 7.0
        return evaluate(*arguments, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(recorder, "evaluate", slow)
    corpus, pads = Padded(), {"mask_pad": True, "dtype": torch.float64}
    run(tmp_path, make_model(**pads), corpus, validation=corpus, steps=9, eval_every=2, seed=2)
    written = [r for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    written = [r for r in written if r["split"] == "train"]
    assert [r["step"] for r in written] == [3, 6, 9]
    for record in written:
        steps = range(record["step"] - 3, record["step"])
        tokens = torch.cat([Padded().batch(4, seeded_generator(2, n)) for n in steps])
        characters = (tokens != 10).sum().item() / 12
        assert record["bound"] == pytest.approx(record["reconstruction"] + record["kl"])
        assert record["bpc"] == pytest.approx(record["bound"] / (characters * math.log(2)))
        assert record["steps_per_second"] == 4
        assert record["characters_per_second"] == 4 * 4 * 8


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_mode_stays(tmp_path, mode):
    model = make_model().train(mode)
    model.encoder.train(not mode)  # as where a part is frozen
    modes = {name: module.training for name, module in model.named_modules()}
    run(tmp_path, model, steps=1)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}


@pytest.mark.filterwarnings("ignore:word_dropout is")
def test_a_setting_that_changes_in_training_harms_no_checkpoint(tmp_path):
    model = make_model()

    def anneal():
        model.word_dropout = 0.5

    run(tmp_path, model, Acting(3, anneal), steps=4, checkpoint_every=2)
    before = make_model().word_dropout
    assert before != 0.5 and load(tmp_path, best=True)[0].word_dropout == before
    assert run(tmp_path, resume=True, steps=6)[1]["step"] == 6


def test_a_model_that_could_not_be_loaded_does_not_train(tmp_path):
    model = make_model()
    torch.nn.utils.parametrizations.weight_norm(model.head, "weight")
    with pytest.raises(ValueError, match=r"remove_parametrizations first$"):
        run(tmp_path / "run", model, steps=1)
    assert not (tmp_path / "run" / "training.json").exists()


def test_a_run_without_validation_data_evaluates_nothing(tmp_path):
    result = train(make_model(), Letters(), config(steps=6), tmp_path, console=quiet())
    assert result["valid"] is None and result["best"] is None and result["train"]["step"] == 6
    assert {r["split"] for r in records(tmp_path)} == {"train"}
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("status, stays", [(1, True), (143, False)])
def test_a_closed_pipe_is_no_signal(status, stays):
    """Where a pipe has no reader rich exits with 1, and the run goes on without output."""
    display = TrainingDisplay(quiet(), 100, 0.5)
    display.console.print = lambda *_, **__: sys.exit(status)
    if stays:
        display.say("text")
        display.say("more")
    else:
        with pytest.raises(SystemExit, match=str(status)):
            display.say("text")


def test_progress_without_a_terminal(monkeypatch):
    """A line after more than ten seconds, and at the end."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = quiet()
    display = TrainingDisplay(console, 100, 0.5)
    record = {"reconstruction": 12.345, "kl": 2.5, "kl_weight": 0.25, "bpc": 1.23456}
    record |= {"steps_per_second": 7.06, "characters_per_second": 1234.4}
    for step, at, weight in ((1, 1, 0.25), (2, 10, 0.25), (3, 10.5, 0.25), (4, 20.5, 0.5)):
        now[0] = at
        display.update(step, {**record, "kl_weight": weight})
    display.update(98, None)
    now[0] = 21
    display.update(99, {**record, "kl_weight": 0.5})
    display.update(100, {**record, "kl_weight": 0.5})
    display.update(100, None)
    speed = "7.1 steps/s  1,234 characters/s"
    assert console.file.getvalue().splitlines() == [
        f"step 3 of 100  rec 12.35  KL 2.50 (weight 0.25)  {speed}",
        f"step 99 of 100  rec 12.35  KL 2.50  bpc 1.235  {speed}",
        f"step 100 of 100  rec 12.35  KL 2.50  bpc 1.235  {speed}",
    ]


def test_looking_on_changes_nothing(tmp_path):
    torch.manual_seed(7)
    run(tmp_path / "a", eval_every=2, sample_every=2, log_every=1, checkpoint_every=3)
    run(tmp_path / "b", eval_every=0, sample_every=0, log_every=20, checkpoint_every=20)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_accumulated_gradients_are_the_whole_batchs(tmp_path):
    finals = []
    for n in (1, 2, 4):
        model = make_model("lstm_vae", dtype=torch.float64)  # no batch norm: micro-batches add up
        run(tmp_path / str(n), model, steps=8, accumulate=n)
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value)
        torch.testing.assert_close(finals[2][name], value)


@pytest.mark.parametrize("seed", [0, 5])
def test_best_checkpoint_is_the_lowest_bound(tmp_path, seed):
    """The run's seed is that of the validation's noise."""
    _, result = run(tmp_path, steps=40, learning_rate=0.05, seed=seed)
    bounds = {r["step"]: r["bound"] for r in records(tmp_path) if r["split"] == "valid"}
    assert len(bounds) > 4 and result["best"] == min(bounds.values())
    best, _ = load(tmp_path, best=True)
    assert evaluate(best, Letters().batches(4), seed=seed)["bound"] == result["best"]


def test_records_name_the_settings_of_their_last_step(tmp_path):
    """Not those of the next one: steps 5 and 10 are the last before the learning rate falls."""
    run(tmp_path, steps=11, log_every=5, eval_every=5)
    written = records(tmp_path)
    rates = {r["step"]: r["learning_rate"] for r in written if r["split"] == "train"}
    assert rates == pytest.approx({5: 1e-3, 10: 0.9e-3, 11: 0.81e-3})
    for split in ("train", "valid"):  # the weight rises from step 2 to step 12
        weights = {r["step"]: r["kl_weight"] for r in written if r["split"] == split}
        assert weights == pytest.approx({5: 0.2, 10: 0.7, 11: 0.8})


def test_validation_has_the_precision_of_training(tmp_path):
    model, _ = run(tmp_path, steps=6, precision="bf16")
    (record,) = (r for r in records(tmp_path) if r["split"] == "valid")
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(model, Letters().batches(4))
    assert record["bound"] == expected["bound"] != evaluate(model, Letters().batches(4))["bound"]


def test_evaluation_is_no_part_of_the_speed(tmp_path, monkeypatch):
    def slow(*arguments, **options):
        time.sleep(0.5)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(recorder, "evaluate", slow)
    _, result = run(tmp_path, steps=6, log_every=6, eval_every=1)
    assert result["train"]["steps_per_second"] > 3  # below 2 with it


def test_tensorboard_has_the_same_numbers(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, corpus=interrupting(9))  # a step that is logged
    time.sleep(1 - time.time() % 1)  # files are ordered by the second they begin in
    run(tmp_path, resume=True)
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for split, name in (("train", "kl"), ("valid", "bound")):
        mine = [(r["step"], r[name]) for r in records(tmp_path) if r["split"] == split]
        theirs = [(e.step, e.value) for e in events.Scalars(f"{split}/{name}")]
        assert [s for s, _ in theirs] == [s for s, _ in mine]
        assert [v for _, v in theirs] == pytest.approx([v for _, v in mine])


@pytest.mark.parametrize("call", ["write", "flush"])
def test_a_failing_tensorboard_ends_no_run(tmp_path, monkeypatch, call):
    """One line tells of it; the error of its thread is not printed as well."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    tracebacks, console = [], quiet()
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    corpus = Acting(6, lambda: monkeypatch.setattr(writer, call, full))
    _, result = run(tmp_path, corpus=corpus, console=console)
    assert result["step"] == 20 and records(tmp_path)[-1]["step"] == 20
    assert (
        console.file.getvalue().count("no TensorBoard log from here on: [Errno 28] No space") == 1
    )
    assert console.file.getvalue().count("TensorBoard") == 1
    assert not tracebacks
    thread = threading.Thread(target=full)
    thread.start()
    thread.join()
    assert len(tracebacks) == 1  # threads of others are reported as before


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    console = quiet()
    run(tmp_path, console=console, steps=2)
    assert console.file.getvalue().count("no TensorBoard log") == 1


def test_samples_are_printed_escaped(tmp_path):
    class Markup(Letters):
        vocabulary = worker.CharVocabulary("[/b]\n\x1befgh")

    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    run(
        tmp_path,
        corpus=Markup(),
        validation=Markup(),
        steps=60,
        sample_every=60,
        learning_rate=0.02,
        console=console,
    )
    text = console.file.getvalue()
    assert text.count("samples at step 60") == 1
    assert "\x1b" not in text and ("[/b]" in text or "⏎" in text or "\\x1b" in text)


@pytest.mark.parametrize("seed", [0, 3])
def test_samples_are_those_of_the_runs_seed(tmp_path, monkeypatch, seed):
    model, latents = make_model(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda z: latents.append(z) or generate(z))
    run(tmp_path, model, steps=4, sample_every=2, seed=seed)
    expected = torch.randn(5, 3, generator=seeded_generator(seed, "samples"))
    assert len(latents) == 2 and all(torch.equal(z, expected) for z in latents)


def test_close_seeds_and_steps_draw_apart():
    pairs = itertools.product(range(30), repeat=2)
    draws = {seeded_generator(seed, step).initial_seed() for seed, step in pairs}
    assert len(draws) == 900


def test_a_terminal_gets_a_progress_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    run(tmp_path, console=console)
    text = console.file.getvalue()
    assert all(part in text for part in ("rec", "KL", "bpc", "steps/s", "characters/s", "20/20"))


def test_bf16_keeps_fp32_weights_and_resumes_exactly(tmp_path):
    model, result = run(tmp_path / "bf16", precision="bf16")
    assert result["train"]["loss"] == pytest.approx(
        run(tmp_path / "fp32")[1]["train"]["loss"], 0.05
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
    run(tmp_path / "parts", precision="bf16", corpus=interrupting(8))
    run(tmp_path / "parts", precision="bf16", resume=True)
    assert records(tmp_path / "bf16") == records(tmp_path / "parts")


# What goes wrong


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path):
    run(tmp_path, steps=2)
    before = {p: p.read_bytes() for p in tmp_path.glob("*") if p.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.glob("*") if p.is_file()}


def test_a_saved_model_is_not_overwritten(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)


def test_one_folder_has_one_trainer(tmp_path):
    class Twice(Letters):
        def batch(self, count, generator):
            with pytest.raises(ValueError, match="in use by another"):
                run(tmp_path, resume=True)
            return super().batch(count, generator)

    run(tmp_path, corpus=Twice(), steps=1)
    run(tmp_path, resume=True)  # released


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OSError, match="cannot make the folder"):
            run(folder)


def test_data_of_another_length_or_vocabulary(tmp_path):
    class Longer(Letters):
        length = 12

    with pytest.raises(ValueError, match="length 12 and 11 tokens, the model 8 and 11"):
        run(tmp_path / "run", corpus=Longer())

    class Other(Letters):
        vocabulary = worker.CharVocabulary("ABCDEFGHIJ")

    with pytest.raises(ValueError, match="another vocabulary"):
        run(tmp_path / "run", corpus=Other())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("log_every", [2, 1000])
@pytest.mark.parametrize("share, told", [(0.3, 1), (0.4, 0)])
def test_busy_cores_are_told_once(tmp_path, monkeypatch, share, told, log_every):
    """Where the thread runs for a share of the time alone; before the first record too."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(time, "thread_time", lambda: share * next(clock))
    console = quiet()
    run(tmp_path / "run", console=console, log_every=log_every)
    assert console.file.getvalue().count("the cores are busy") == told


def test_a_record_is_written_whole_where_the_system_takes_a_part(tmp_path):
    class Slow(io.FileIO):
        def write(self, content):
            return super().write(content[:7])

    folder = RunDirectory(tmp_path, resume=False, say=print)
    folder.open_metrics(0, 0)
    folder._metrics.close()
    folder._metrics = Slow(tmp_path / "metrics.jsonl", "ab")
    written = [{"step": n, "split": "train", "loss": n / 3} for n in range(3)]
    for record in written:
        folder.log(record)
    folder.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == written


def test_a_system_without_posix_locks_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match=r"^training needs POSIX file locks.*WSL$"):
        run(tmp_path / "run")


def test_logits_beyond_the_memory_are_refused(tmp_path):
    """A batch whose ids would fit: 8 tokens of 11 logits each, with their gradients."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    batch = int(1.5 * memory) // (8 * 11 * 8)
    with pytest.raises(ValueError, match=rf"the ids and logits of a step \(batch_size {batch}\)"):
        run(tmp_path / "run", batch_size=batch)


def test_small_tensors_travel_from_where_the_group_can_take_them():
    import torch.distributed as dist

    from fastvae.training.processes import wire

    elsewhere = torch.device("meta")
    for backend, where in (("gloo", torch.device("cpu")), ("fake", elsewhere)):
        if backend == "fake":
            pytest.importorskip("torch.testing._internal.distributed.fake_pg")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert wire(dist.group.WORLD, elsewhere) == where
        finally:
            dist.destroy_process_group()
