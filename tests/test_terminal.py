"""What a terminal does to a command: full disks, Ctrl-C, empty names, absurd sizes."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from test_cli import PROGRAM, TEXT, TINY

from fastvae import cli
from fastvae.console import print_json, track
from fastvae.models.hybrid import HybridVAE
from fastvae.text import CharVocabulary

MODULE = [sys.executable, "-m", "fastvae"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model without a run."""
    folder = tmp_path_factory.mktemp("model") / "model"
    vocabulary = CharVocabulary.from_text(TEXT)
    sizes = {"latent_size": 2, "encoder_channels": (4,), "feature_channels": 4, "hidden_size": 4}
    saved = HybridVAE(vocabulary.size, 16, pad_id=vocabulary.pad_id, **sizes)
    saved.save_pretrained(folder, vocabulary)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_json_has_no_number_for_nan_and_infinities(capsys):
    print_json({"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"))}, "d": "NaN"})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [1.5, None], "b": {"c": [None, None]}, "d": "NaN"}


@pytest.fixture
def refused(fastvae):
    """Run a command that must fail -> its one line on standard error."""

    def run(*arguments, stdin: bytes = b""):
        status, out, err = fastvae(*arguments, stdin=stdin)
        assert (status, out) == (2, "") and err.count("\n") == 1, err
        return err.removeprefix("fastvae: ").rstrip("\n")

    return run


def small_files(size: int):
    """In the child: no file may have more bytes than that, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_command(*arguments, **keywords) -> tuple[int, str]:
    """A process of its own -> its status and standard error."""
    command = [PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **keywords)
    return done.returncode, done.stderr


# Ctrl-C


@pytest.mark.parametrize("moment", ["torch", "fastvae._C", "fastvae.cli", "typer"])
def test_ctrl_c_while_the_module_is_imported(moment, tmp_path):
    """A finder before all others sends the signal when that import begins."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    how = {"env": environment, "cwd": tmp_path, "capture_output": True, "timeout": 60}
    for command in (MODULE, [PROGRAM]):
        done = subprocess.run([*command, "info"], **how)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b""), command


def test_ctrl_c_ends_no_other_program_that_imports_the_package(tmp_path):
    """`python -m program fastvae` keeps its own handler."""
    (tmp_path / "program.py").write_text(
        "import signal, fastvae\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    command = [sys.executable, "-m", "program", "fastvae"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    "when, ignored, status",
    [("at the end", False, 130), ("at the end", True, 0), ("torch", True, 0)],
)
def test_ctrl_c_after_the_command_or_ignored(when, ignored, status, tmp_path):
    """What runs last sends the signal; a shell's background jobs ignore it from the start."""
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {when!r}:\n"
        f"            {stop}\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"atexit.register(lambda: {when == 'at the end'} and {stop})\n"
    )
    places = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [PROGRAM, "--version"],
        env=environment,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None,
        timeout=60,
    )
    assert (done.returncode, done.stdout[:8], done.stderr) == (status, b"fastvae ", b"")


# Terminals


def test_a_person_who_types_is_told_how_to_end(model, monkeypatch, capsys):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    for stream, said in ((Terminal, "Type texts, one a line, then Ctrl-D.\n"), (io.BytesIO, "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream(b"the cat\n")))
        with pytest.raises(SystemExit):
            cli.main(["reconstruct", str(model)])
        out, err = capsys.readouterr()
        assert out.startswith("in  the cat\nout ") and err == said


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_removed(terminal, monkeypatch):
    file = io.StringIO()
    shown = Console(file=file, force_terminal=terminal, width=80)
    monkeypatch.setattr("fastvae.console.console", lambda stderr: shown)
    assert [*track((c for c in "abc"), "reading [/b]", 3)] == ["a", "b", "c"]
    said = file.getvalue()
    assert ("3/3" in said and "reading [/b]" in said) if terminal else said == ""
    assert said.rpartition("reading")[2].endswith("\x1b[2K" * terminal)


# Full disks


@pytest.mark.parametrize("arguments", [("-n", 3), ("-n", 2000), ("-n", 2000, "--json"), ("--raw",)])
def test_standard_output_is_full(model, arguments):
    with open("/dev/full", "w") as full:
        status, err = run_command("sample", model, *arguments, stdout=full)
    assert (status, err) == (2, "fastvae: cannot write standard output: No space left on device\n")


def test_both_outputs_are_full(model):
    with open("/dev/full", "w") as full:
        done = subprocess.run([PROGRAM, "sample", model], stdout=full, stderr=full, timeout=60)
    assert done.returncode == 2


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_error(model, option):
    command = [PROGRAM, "sample", model, "-n", "20000", *option]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (1, b"")


def test_outputs_on_a_full_disk_are_named(model, tmp_path):
    folder = tmp_path / "out"
    limited = {"preexec_fn": small_files(1024), "input": "the cat\n" * 500}
    for arguments in (
        ("encode", model, "--out", folder / "z.npy"),
        ("export", model, folder / "page.html"),
    ):
        status, err = run_command(*arguments, **limited)
        assert (status, err) == (2, f"fastvae: cannot write {arguments[-1]}: File too large\n")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size, named", [(256, "cache"), (6000, "model.safetensors")])
def test_a_run_on_a_full_disk_names_what_it_cannot_write(text, tmp_path, size, named):
    out = tmp_path / "run"
    arguments = "train", "--data", text, "--out", out, *TINY
    status, err = run_command(*arguments, preexec_fn=small_files(size))
    assert status == 2
    assert err.splitlines()[-1] == f"fastvae: cannot write {out / named}: File too large"
    assert "Traceback" not in err and "ignored" not in err


def test_standard_input_that_finds_no_room(model, tmp_path):
    status, err = run_command(
        "evaluate", model, "--data", "-", input="the cat " * 1000, preexec_fn=small_files(1024)
    )
    assert status == 2
    assert err.startswith("fastvae: cannot keep standard input in ") and err.count("\n") == 1


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, fastvae, text):
    assert fastvae("train", "--data", text, "--out", tmp_path / "run", *TINY)[0] == 0
    picture = tmp_path / "new" / "curve.png"
    assert fastvae("plot", tmp_path / "run", "--out", picture)[0] == 0
    before = picture.read_bytes()
    arguments = "plot", tmp_path / "run", "--out", picture
    status, err = run_command(*arguments, preexec_fn=small_files(1024), stdout=subprocess.PIPE)
    assert status == 2 and f"cannot write {picture}: File too large" in err.splitlines()[-1]
    assert picture.read_bytes() == before and os.listdir(picture.parent) == ["curve.png"]


def test_devices_are_not_replaced(model, tmp_path, refused):
    pipe = tmp_path / "pipe.npy"
    os.mkfifo(pipe)
    line = refused("encode", model, "--out", pipe, stdin=b"the cat\n")
    assert line == f"cannot write {pipe}: it is not a regular file"
    assert pipe.is_fifo()


# Run directories


@pytest.mark.parametrize("name", ["lock", "training.json", "last.safetensors", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "no regular file"])
def test_what_stands_in_place_of_a_runs_file(refused, text, tmp_path, name, kind):
    place = tmp_path / "run" / name
    place.parent.mkdir()
    if kind == "a folder":
        place.mkdir()
    elif kind == "a link to nothing":
        place.symlink_to(tmp_path / "nothing")
    else:
        os.mkfifo(place)
    line = refused("train", "--data", text, "--out", tmp_path / "run", *TINY)
    assert line == f"{place} is {kind}, but must be a file of a run: move it away"
    assert os.path.lexists(place) and not (tmp_path / "nothing").exists()


def test_latents_go_to_a_folder_that_is_made(fastvae, refused, model, tmp_path):
    out = tmp_path / "new" / "folder" / "z.npy"
    assert fastvae("encode", model, "--out", out, stdin=b"the cat\n")[0] == 0
    assert os.listdir(out.parent) == ["z.npy"]
    (tmp_path / "file").touch()
    line = refused("encode", model, "--out", tmp_path / "file" / "z.npy", stdin=b"the cat\n")
    assert line == f"cannot make the folder {tmp_path / 'file'}: File exists"


def test_a_folder_that_may_not_be_written_is_named_by_the_users_path(model, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    status, err = run_command("encode", model, "--out", tmp_path / "z.npy", input="the cat\n")
    assert (status, err) == (2, f"fastvae: cannot write {tmp_path / 'z.npy'}: Permission denied\n")


# Empty names and absurd sizes


@pytest.mark.parametrize(
    "arguments, option",
    [
        (("sample", ""), "RUN"),
        (("train", "--data", "", "--out", "x"), "--data"),
        (("train", "--data", __file__, "--out="), "--out"),
        (("train", "--data", __file__, "--out", "x", "--valid", ""), "--valid"),
        (("evaluate", "x", "--data="), "--data"),
        (("encode", "x", "--out", ""), "--out"),
        (("plot", "x", ""), "RUN..."),
        (("plot", "x", "--out", ""), "--out"),
        (("demo", "--out", ""), "--out"),
        (("export", "x", ""), "PAGE"),
        (("experiment", "fig3", "--out", ""), "--out"),
    ],
    ids=str,
)
def test_empty_names(refused, monkeypatch, tmp_path, arguments, option):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert option.lower() in line.lower() and line.endswith(
        "the name is empty: give a file or folder"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("sample", "-n", 10**12), "Invalid value for '-n' / '--number': "),
        (("sample", "--batch-size", 10**9, "-n", 10**9), "the sequences of count=1000000000 "),
        (
            ("sample", "-n", 10**9, "--json", "--temperature", 1),
            "the 1,000,000,000 texts of --json",
        ),
        (("interpolate", "the", "cat", "--steps", 10**9), "the sequences of steps=1000000000 "),
    ],
    ids=str,
)
def test_absurd_sizes(refused, model, arguments, line, monkeypatch):
    sixteen_gb = {"SC_PHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(os, "sysconf", sixteen_gb.__getitem__)
    command, *rest = arguments
    begin = time.monotonic()
    assert line in refused(command, model, *rest)
    assert time.monotonic() - begin < 5


def test_a_batch_may_be_larger_than_what_there_is(fastvae, model):
    """Only as many are decoded as are wanted."""
    status, out, _ = fastvae("sample", model, "-n", 3, "--batch-size", 10**9, "--json")
    assert status == 0 and len(json.loads(out)) == 3
