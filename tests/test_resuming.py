"""Resuming: bit for bit after signals, kills, damage and full disks; two processes are one."""

import errno
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import (
    WORKER,
    Acting,
    Letters,
    interrupting,
    make_model,
    quiet,
    records,
    run,
    worker,
)

import fastvae
from fastvae.text import CharVocabulary
from fastvae.training import recorder
from fastvae.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("no_power_cuts")


def content(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_run(a, b, names=("last", "previous", "best", "model")):
    """Bit for bit: weights, optimizer, step, best, window and every record but its speed."""
    assert records(a) == records(b)
    for name in names:
        (one, about_one), (two, about_two) = (content(p / f"{name}.safetensors") for p in (a, b))
        assert about_one == about_two and one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_run_goes_on_exactly(whole, tmp_path, number):
    before = signal.getsignal(number)
    console = quiet()
    _, result = run(tmp_path / "parts", corpus=interrupting(7, number), console=console)
    assert result["interrupted"] and result["step"] == 7
    assert "--resume" in console.file.getvalue() and signal.getsignal(number) is before
    _, result = run(tmp_path / "parts", resume=True)
    assert not result["interrupted"] and result["step"] == 20
    # The checkpoint before is another one, that of the interruption or after it.
    assert_same_run(whole, tmp_path / "parts", ("last", "best", "model"))
    assert result["valid"] == [r for r in records(whole) if r["split"] == "valid"][-1]


def test_a_held_kl_is_resumed_exactly(tmp_path):
    changes = {"kl_nats": 1.0, "checkpoint_every": 7}
    run(tmp_path / "whole", **changes)
    run(tmp_path / "parts", corpus=interrupting(9, signal.SIGTERM), **changes)
    run(tmp_path / "parts", resume=True, **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", ("last", "best", "model"))
    state = json.loads(content(tmp_path / "parts" / "last.safetensors")[1]["fastvae"])
    _, weight, used = state["kl_controller"]
    assert used == records(tmp_path / "parts")[-1]["kl_weight"] != weight


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, result = run(tmp_path / "run", corpus=interrupting(7, signal.SIGHUP))
        assert not result["interrupted"] and result["step"] == 20
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interruption_tells_what_is_saved(tmp_path):
    console = quiet()

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", corpus=Acting(11, twice), console=console)
    assert (
        "stopped without saving: the last checkpoint is that of step 8" in console.file.getvalue()
    )


def test_a_terminal_hangs_up_twice(whole, tmp_path):
    """The shell and the system each send a signal: the run is saved after the first."""

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)
    _, result = run(tmp_path / "parts", corpus=Acting(7, twice))
    assert result["interrupted"] and result["step"] == 7
    assert signal.getsignal(signal.SIGHUP) is before
    run(tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts", ("last", "best", "model"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_closed_terminal_ends_no_run(tmp_path, number):
    """Nor a pipe without a reader, at which rich ends the program."""

    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    _, result = run(tmp_path / "run", console=Console(file=Closed(), force_terminal=True))
    assert result["step"] == 20 and (tmp_path / "run" / "last.safetensors").exists()


def test_metrics_after_the_checkpoint_are_cut(whole, tmp_path):
    run(tmp_path / "parts", corpus=interrupting(8))
    path, console = tmp_path / "parts" / "metrics.jsonl", quiet()
    later = json.dumps({**json.loads(path.read_text().splitlines()[-1]), "step": 9})
    with open(path, "a") as file:
        file.write(later + '\n{"step": 12, "spl')
    run(tmp_path / "parts", resume=True, console=console)
    assert "damaged" not in console.file.getvalue()
    assert records(whole) == records(tmp_path / "parts")


def test_a_longer_run_is_the_shorter_one_gone_on(tmp_path):
    run(tmp_path / "whole", log_every=4, eval_every=4)
    run(tmp_path / "parts", log_every=4, eval_every=4, steps=12)
    run(tmp_path / "parts", log_every=4, eval_every=4, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    console = quiet()
    _, result = run(tmp_path / "parts", log_every=4, eval_every=4, resume=True, console=console)
    assert "raise steps" in console.file.getvalue() and result["step"] == 20
    assert result["train"]["step"] == 20


def test_damaged_last_checkpoint(whole, tmp_path):
    run(tmp_path / "parts", corpus=interrupting(10))
    last = tmp_path / "parts" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-7])
    console = Console(file=io.StringIO(), width=300)
    run(tmp_path / "parts", resume=True, console=console)
    said = [line for line in console.file.getvalue().splitlines() if "damaged" in line]
    assert len(said) == 1 and "step 8" in said[0]
    assert_same_run(whole, tmp_path / "parts")


def spawn(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_random_moments(tmp_path):
    output = spawn(sys.executable, str(WORKER), "killed_at_random", str(tmp_path))
    assert json.loads(output.splitlines()[-1])["attempts"] > 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_between_any_two_file_operations(tmp_path):
    output = spawn(sys.executable, str(WORKER), "killed_at_files", str(tmp_path))
    kills = json.loads(output.splitlines()[-1])["kills"]
    assert kills > 20
    for n in range(1, kills + 1):
        assert_same_run(tmp_path / "whole", tmp_path / str(n))


@pytest.mark.parametrize("kind", ["shared", "shared_at_a_held_kl"])
def test_two_processes_are_one(tmp_path, kind):
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    spawn(*launch, str(WORKER), kind, str(tmp_path / "two"))
    getattr(worker, kind)(tmp_path / "one")
    for name in ("last", "best"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], msg=lambda m, key=key: f"{key}: {m}")
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and a["split"] == b["split"]
        numbers = [k for k in a if k != "split"]
        assert [b[k] for k in numbers] == pytest.approx([a[k] for k in numbers])


def test_processes_stop_together_where_one_is_asked_to(tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = spawn(*launch, str(WORKER), "stopped_by_one", str(tmp_path))
    ends = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert ends == 2 * [{"step": 5, "interrupted": True}]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learning_rate": 0.1}, "learning_rate = 0.001, got 0.1"),
        ({"seed": 1}, "seed"),
        ({"model": "aux_weight"}, "aux_weight = 0.2, got 0.5"),
        ({"model": "lstm_vae"}, "holds a HybridVAE, not a LSTMVAE"),
        ({"corpus": Letters(stride=3)}, "other training data"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, changes, name):
    run(tmp_path, steps=4)
    models = {
        "aux_weight": lambda: make_model(aux_weight=0.5),
        "lstm_vae": lambda: make_model("lstm_vae"),
    }
    if "model" in changes:
        changes = {"model": models[changes["model"]]()}
    before = {p: p.read_bytes() for p in tmp_path.glob("*") if p.is_file()}
    with pytest.raises(ValueError, match=name):
        run(tmp_path, resume=True, **changes)
    assert before == {p: p.read_bytes() for p in tmp_path.glob("*") if p.is_file()}


FREE = {"log_every": 1, "eval_every": 1, "eval_samples": 3, "checkpoint_every": 1}
FREE |= {"sample_every": 1, "samples": 2, "steps": 3}
FIXED = {"batch_size": 8, "learning_rate": 2e-3, "lr_decay": 0.8, "lr_decay_every": 6}
FIXED |= {"lr_decay_start": 1, "lr_floor": 1e-5, "kl_floor": 0.1, "kl_start": 1, "kl_end": 13}
FIXED |= {"kl_cycles": 2, "kl_rise": 0.5, "kl_target": 0.9, "kl_nats": 1.0, "free_bits": 0.1}
FIXED |= {"clip_norm": 2.0, "precision": "bf16", "accumulate": 2, "seed": 1}


def test_what_may_change_on_resume_and_what_may_not(tmp_path):
    assert FREE.keys() | FIXED.keys() == {f.name for f in fields(fastvae.TrainingConfig)}
    run(tmp_path, steps=2)
    for name, value in FIXED.items():
        wrong = rf"was started with {name} = [^,]+, got {value}: resume with the same"
        with pytest.raises(ValueError, match=wrong):
            run(tmp_path, resume=True, **{"steps": 2, name: value})
    assert run(tmp_path, resume=True, **FREE)[1]["step"] == 3


def test_resuming_nothing_begins_a_run(tmp_path):
    console = quiet()
    _, result = run(tmp_path, resume=True, steps=2, console=console)
    assert result["step"] == 2 and "no run" in console.file.getvalue()


def test_a_saved_model_is_no_run_to_resume(tmp_path):
    make_model().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):  # a refusal leaves nothing that a run would have left
        with pytest.raises(ValueError, match=r"has config.json but no training.json"):
            run(tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["text.json", "vocabulary.json", "learning-curve.png"])
def test_a_file_that_a_run_would_replace_is_kept(tmp_path, name):
    (tmp_path / name).write_text("precious")
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"has a {name}, which a run would replace"):
            run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("content", ["", "pid 7"])
def test_a_lock_that_no_run_has_made_is_a_persons(tmp_path, content):
    names = {"lock": content, "text.json": "mine", "model.safetensors.12.tmp": "mine too"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"has a text\.json, which a run would replace"):
        run(tmp_path)
    (tmp_path / "text.json").unlink()
    run(tmp_path, steps=1)
    assert (tmp_path / "model.safetensors.12.tmp").read_text() == "mine too"
    assert (tmp_path / "lock").read_text() == content
    run(tmp_path, resume=True, steps=2)  # now a temporary file is what a killed run has left
    assert not (tmp_path / "model.safetensors.12.tmp").exists()


def test_fewer_steps_than_were_made_say_nothing_of_annealing(tmp_path):
    schedule = {"kl_end": 5, "kl_nats": None}
    run(tmp_path, steps=4, **schedule)
    console = quiet()
    run(tmp_path, resume=True, steps=3, console=console, **schedule)
    said = console.file.getvalue()
    assert "the run is at step 4 already" in said and "annealed" not in said


def test_a_run_whose_folder_was_replaced_writes_nothing_there(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def replace():
        folder.rename(moved)
        run(folder, steps=4, seed=5)

    with pytest.raises(OSError, match=r"run is not the folder that this run began in"):
        run(folder, corpus=Acting(7, replace), steps=20)
    run(tmp_path / "alone", steps=4, seed=5)
    assert_same_run(folder, tmp_path / "alone", ("last", "model"))


def test_a_run_whose_folder_is_gone_is_one_clear_line(tmp_path):
    folder = tmp_path / "run"
    corpus = Acting(7, lambda: folder.rename(tmp_path / "moved"))
    with pytest.raises(OSError, match=r"^.*run is not the folder that this run began in"):
        run(folder, corpus=corpus, steps=20)
    assert not folder.exists()


def test_what_a_killed_process_left_half_written_goes(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("last.safetensors.7.tmp", "last.safetensors.tmp", "notes.7.tmp"):
        (folder / name).write_bytes(b"half")
    run(folder, resume=True, steps=30)
    found = sorted(path.name for path in folder.glob("*.tmp"))
    assert found == ["last.safetensors.tmp", "notes.7.tmp"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_no_part_of_a_run(whole, tmp_path, dtype):
    run(tmp_path, steps=6)
    torch.set_default_dtype(dtype)
    try:
        _, result = run(tmp_path, make_model().float(), resume=True, steps=9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result["step"] == 9


@pytest.mark.parametrize("name", ["last.safetensors", "previous.safetensors"])
def test_a_checkpoint_of_another_run_is_refused(whole, tmp_path, name):
    """Of the same sizes and settings, on other data or with another vocabulary."""

    class Others(Letters):
        vocabulary = CharVocabulary("jklmnopqr\n")

    for corpus, message in ((Letters(stride=3), "on other data"), (Others(), "another vocabulary")):
        other, mixed = tmp_path / f"other {message}", tmp_path / f"mixed {message}"
        run(other, corpus=corpus, validation=corpus)
        shutil.copytree(whole, mixed)
        for path in mixed.glob("[lp]*.safetensors"):
            path.unlink()
        shutil.copy(other / name, mixed)
        with pytest.raises(ValueError, match=message):
            run(mixed, resume=True, steps=30)
        if message == "another vocabulary":
            shutil.copy(other / "best.safetensors", mixed)
            with pytest.raises(ValueError, match=r"vocabulary.json is damaged or not the one"):
                fastvae.load(mixed, best=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "text.json"])
def test_a_folder_in_place_of_a_file_is_told_first(whole, tmp_path, name, resume):
    folder = tmp_path / "run"
    if resume:
        shutil.copytree(whole, folder)
        (folder / name).unlink()
    (folder / name).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"{name} is a folder, but must be a file of a run: move it away"
    ):
        run(folder, resume=resume)


@pytest.mark.parametrize("left", ["last.safetensors", "best.safetensors", "metrics.jsonl"])
def test_a_run_without_its_settings_keeps_what_it_holds(whole, tmp_path, left):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in {"training.json", "last.safetensors", "previous.safetensors", "best.safetensors"}:
        if name != left:
            (folder / name).unlink()
    if left != "metrics.jsonl":
        (folder / "metrics.jsonl").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"no training.json, so it cannot be resumed"):
        run(folder, resume=True)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_metrics_without_their_last_line_end_or_missing(whole, tmp_path):
    folder, console = tmp_path / "run", quiet()
    shutil.copytree(whole, folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    run(folder, resume=True, console=console)
    assert records(folder) == records(whole) and "metrics" not in console.file.getvalue()
    path.unlink()
    run(folder, resume=True, console=console)
    said = " ".join(console.file.getvalue().split())
    assert "metrics.jsonl is missing: it begins anew after step" in said


@pytest.mark.parametrize(
    ("kept", "held"),
    [
        (0, "has no training record, but step 9 was recorded:"),
        (2, "ends at step 6, but step 9 was recorded:"),
        (3, None),
    ],
)
def test_metrics_that_lost_their_end_are_told(tmp_path, kept, held):
    """Records after the checkpoint's last one are cut in any case."""
    folder, console = tmp_path / "run", quiet()
    run(folder, corpus=interrupting(10), eval_every=0)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9]
    path.write_bytes(b"".join(lines[:kept]))
    run(folder, resume=True, eval_every=0, console=console)
    said = [line for line in console.file.getvalue().splitlines() if "metrics.jsonl" in line]
    assert len(said) == (held is not None) and all(f"metrics.jsonl {held}" in s for s in said)
    assert [r["step"] for r in records(folder)] == [*[3, 6, 9][:kept], 12, 15, 18, 20]


def test_best_weights_that_are_missing_are_kept_anew(tmp_path, monkeypatch):
    """A bound that is worse than the lost one's is then the best."""
    folder, console, bounds = tmp_path / "run", quiet(), iter([4.0, 5.0])
    measured = recorder.evaluate
    monkeypatch.setattr(
        recorder, "evaluate", lambda *a, **k: {**measured(*a, **k), "bound": next(bounds)}
    )
    settings = {"log_every": 2, "eval_every": 2, "checkpoint_every": 2}
    run(folder, steps=2, **settings)
    (folder / "best.safetensors").unlink()
    _, result = run(folder, steps=4, resume=True, console=console, **settings)
    assert result["best"] == 5.0 and (folder / "best.safetensors").exists()
    assert "best.safetensors is missing: the best weights from here on" in console.file.getvalue()


def test_a_bound_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    bounds = itertools.chain([math.nan, 5.0, math.inf, 4.0], itertools.repeat(6.0))
    whole_result = recorder.evaluate

    def evaluate(*arguments, **options):
        return whole_result(*arguments, **options) | {"bound": next(bounds)}

    monkeypatch.setattr(recorder, "evaluate", evaluate)
    console = quiet()
    _, result = run(tmp_path / "run", console=console, eval_every=1)
    assert result["best"] == 4.0
    said = " ".join(console.file.getvalue().split())
    assert "validation at step 1: the bound is nan" in said
    assert "validation at step 3: the bound is inf" in said


def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"run \xff")
    with pytest.raises(ValueError, match=r"is not UTF-8: rename it"):
        run(folder)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"is not UTF-8: rename it"):
        fastvae.load(folder)


def test_a_loss_that_is_not_finite_stops_the_run(whole, tmp_path):
    def poison():
        with torch.no_grad():
            model.head.bias[0] = float("inf")

    model = make_model()
    with pytest.raises(ValueError, match=r"step 10 .*auxiliary nan.*checkpoint is that of step 8"):
        run(tmp_path / "poisoned", model, Acting(10, poison))
    run(tmp_path / "poisoned", resume=True)
    assert_same_run(whole, tmp_path / "poisoned")


def test_full_disk_keeps_the_last_checkpoint(whole, tmp_path):
    def fill():
        """No file may grow any more beyond what the small ones need."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"cannot write .*safetensors: .*kept"):
            run(tmp_path / "full", corpus=Acting(9, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "full").glob("*.tmp"))
    run(tmp_path / "full", resume=True)
    assert_same_run(whole, tmp_path / "full")


@pytest.mark.parametrize("patient", [False, True])
def test_a_second_signal_waits_only_among_several_processes(patient):
    """There the others have to be told first, after the step."""
    from fastvae.signals import stop_signals

    before = signal.getsignal(signal.SIGINT)
    with stop_signals(patient) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        if patient:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_leaves_by_a_signal_as_by_an_exit(number, status):
    """Unless it is ignored; and as before when the command is over."""
    from fastvae.signals import orderly_exit

    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end, orderly_exit():
            os.kill(os.getpid(), number)
        assert end.value.code == status and signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with orderly_exit():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_in_a_thread_are_the_main_ones():
    from fastvae.signals import stop_signals

    before, found = signal.getsignal(signal.SIGINT), []

    def look():
        with stop_signals(patient=False) as stop:
            found.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, before)]


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "fits"),
    [(12, 2, 3, True), (12, 2, 4, False), (12, 1, 4, True), (4, 1, 3, False)],
)
def test_a_batch_is_divided_among_processes(batch, accumulate, processes, fits):
    """Each row once, micro-batch by micro-batch."""
    config = fastvae.TrainingConfig(batch_size=batch, accumulate=accumulate)
    groups = [SimpleNamespace(rank=lambda r=r: r, size=lambda: processes) for r in range(processes)]
    model, told = make_model(), f"{processes} processes times accumulate {accumulate}"
    if not fits:
        with pytest.raises(ValueError, match=f"batch_size {batch} is not divisible by {told}"):
            TrainingStep(model, model, config, groups[0])
        return
    steps = [TrainingStep(model, model, config, group) for group in groups]
    rows = [range(batch)[step._own_rows(n)] for n in range(accumulate) for step in steps]
    assert [row for part in rows for row in part] == list(range(batch))
    assert len({len(part) for part in rows}) == 1
