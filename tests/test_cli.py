import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fastvae import _C, cli, plots
from fastvae.console import escape, one_line, table
from fastvae.device import find_device
from fastvae.info import ON_GPU, PERSISTENT_PROVED, PROVED
from fastvae.models import load
from fastvae.models.hybrid import HybridVAE
from fastvae.plots import compare_runs, learning_curves, read_metrics
from fastvae.text import ByteVocabulary, CharVocabulary, SyntheticCorpus

TEXT = "the cat sat on the mat.\na dog ran to the [/b] cat.\n" * 40
TINY = [
    *("--steps=4", "--batch-size=4", "--length=16", "--latent-size=3", "--encoder-channels=4"),
    *("--hidden-size=8", "--feature-channels=4", "--log-every=2", "--eval-every=2"),
]
COMMANDS = ["demo", "train", "evaluate", "sample", "reconstruct", "interpolate", "encode", "info"]
COMMANDS += ["experiment", "fields", "plot"]
PROGRAM = str(Path(sys.executable).with_name("fastvae"))


@pytest.fixture
def refused(fastvae):
    """Run a command that must fail as bad input does -> its line on standard error."""

    def run(*arguments, stdin: bytes = b""):
        status, out, err = fastvae(*arguments, stdin=stdin)
        assert status == 2, err
        assert err.startswith("fastvae: ") and err.count("\n") == 1, err
        assert out == ""
        return err

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on characters."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    data = "--data", str(folder / "text.txt"), "--valid", str(folder / "text.txt")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *data, "--out", str(folder / "run"), *TINY])
    assert end.value.code == 0
    return folder / "run"


@pytest.fixture
def hostile(tmp_path):
    """A model that says little but markup, newlines and control characters."""
    vocabulary = CharVocabulary("[/b]\n\x1b\x07\u202e")
    sizes = {"latent_size": 2, "encoder_channels": (4,), "feature_channels": 4, "hidden_size": 4}
    model = HybridVAE(vocabulary.size, 16, pad_id=vocabulary.pad_id, **sizes)
    model.save_pretrained(tmp_path / "hostile", vocabulary)
    return tmp_path / "hostile"


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=str)
def test_help(fastvae, command):
    status, out, err = fastvae(*command, "--help")
    assert (status, err) == (0, "")
    assert "Usage" in out
    if not command:
        assert all(name in out for name in COMMANDS)
        assert fastvae("-h") == (0, out, "")


def test_training_leaves_a_run_and_a_summary(fastvae, text, tmp_path):
    out = tmp_path / "run"
    status, shown, _ = fastvae("train", "--data", text, "--valid", text, "--out", out, *TINY)
    assert status == 0
    assert shown.splitlines()[1].split()[:2] == ["train", "4"]
    assert shown.splitlines()[-1] == f"nats per text; next: fastvae sample {out}"
    odd = "train", "--data", text, "--out", tmp_path / "new\nline", *TINY
    assert fastvae(*odd)[1].splitlines()[-1] == "nats per text; next: fastvae sample FOLDER"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["split"]) for r in records] == [
        (2, "train"), (2, "valid"), (4, "train"), (4, "valid")
    ]  # fmt: skip
    model, vocabulary = load(out)
    assert (model.length, model.config["hidden_size"], model.end_id) == (16, 8, None)
    assert vocabulary == CharVocabulary.from_text(TEXT)


def test_resumed_run_equals_an_uninterrupted_one(fastvae, text, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert fastvae("train", "--data", text, "--out", once, *TINY)[0] == 0
    assert fastvae("train", "--data", text, "--out", twice, *TINY, "--steps", 2)[0] == 0
    status, out, _ = fastvae("train", "--data", text, "--out", twice, *TINY, "--resume", "--json")
    assert status == 0
    assert json.loads(out)["step"] == 4
    ours, theirs = load(once)[0].state_dict(), load(twice)[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path):
    out = tmp_path / "run"
    command = [PROGRAM, "train", "--data", text, "--out", out, *TINY, "--steps=1000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    load(out)


def test_evaluate(fastvae, run, text):
    limits = "--limit", 9, "--nll-texts", 3, "--nll-samples", 5, "--mi-texts", 8
    status, out, _ = fastvae("evaluate", run, "--data", text, *limits, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["samples"] == 9
    assert found["bound"] == pytest.approx(found["reconstruction"] + found["kl"])
    assert found["bpc"] == pytest.approx(found["bound"] / 16 / np.log(2))
    assert 0 <= found["active_units"] <= 3
    assert -1e-6 < found["mutual_information"] <= np.log(8)
    assert found["importance_weighted_nll"] > 0
    again = json.loads(fastvae("evaluate", run, "--data", text, *limits, "--json")[1])
    assert again == found
    shown = fastvae("evaluate", run, "--data", text, *limits, "--int8-texts", 9, "--best")[1]
    measures = "bound", "bits per character", "active units", "importance-weighted NLL"
    measures += "exact reconstruction", "shuffled control", "higher --kl-nats"
    for name in (*measures, "int8 token agreement", "int8 greedy agreement"):
        assert name in shown


@pytest.mark.parametrize("limit", ["--limit=1", "--reconstruct-texts=1"])
def test_evaluate_says_that_one_text_has_no_shuffled_control(fastvae, run, text, limit):
    status, out, err = fastvae("evaluate", run, "--data", text, limit, "--nll-samples=2")
    assert status == 0 and "exact reconstruction needs 2 texts or more" in err
    assert "exact reconstruction" not in out and (" 1 text" in out) == (limit == "--limit=1")
    assert "1 texts" not in out
    assert "2 texts" not in fastvae("evaluate", run, "--data", text, "--reconstruct-texts=0")[2]


def test_what_fills_no_window_is_told(fastvae, run, tmp_path):
    (tmp_path / "text").write_text("the cat ran to the mat." + "t" * 14)
    for command in (("evaluate", "--nll-samples=1"), ("encode", "--out", tmp_path / "z.npy")):
        err = fastvae(*command[:1], run, "--data", tmp_path / "text", *command[1:])[2]
        assert "the last 5 characters left out: they fill no window of 16" in err
    (tmp_path / "text").write_text("the cat ran to the mat." + "t" * 9)
    assert "left out" not in fastvae("evaluate", run, "--data", tmp_path / "text")[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_makes_no_texts(refused, run, tmp_path, value):
    model, vocabulary = load(run)
    with torch.no_grad():
        model.decoder.classifier.bias[1] = value
    model.save_pretrained(tmp_path / "diverged", vocabulary)
    for command in (("sample",), ("reconstruct",), ("interpolate", "a", "b")):
        err = refused(command[0], tmp_path / "diverged", *command[1:])
        assert "decoder.classifier.bias is not finite" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--decoder=none", "--word-dropout=0.5"), "word_dropout has no effect with decoder none"),
        (("--decoder", "none", "--aux-weight", "2"), "aux_weight has no effect with decoder none"),
        (("--conv-layers", "9"), "conv_layers has no effect with decoder lstm"),
        (("--carry", "false"), "carry has no effect with decoder lstm"),
        (
            ("--decoder=bytenet", "--hidden-size=9"),
            "hidden_size has no effect with decoder bytenet",
        ),
        (("--kl-nats", "3", "--kl-end", "10"), "kl_end has no effect with kl_nats, which takes"),
        (("--lr-decay", "1", "--lr-floor", "0.1"), "lr_floor has no effect with lr_decay 1: leave"),
    ],
)
def test_options_without_effect_are_refused(refused, text, tmp_path, options, message):
    assert message in refused("train", "--data", text, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_by_the_command_that_began_it(fastvae, run, tmp_path):
    """Also one with an option that has no effect, as earlier versions took it."""
    shutil.copytree(run, tmp_path / "run")
    text = run.parent / "text.txt"
    options = "--data", text, "--valid", text, "--out", tmp_path / "run", *TINY, "--conv-layers=3"
    status, _, err = fastvae("train", *options, "--resume")
    assert status == 0 and "the run is at step 4 already" in err


def test_a_run_of_any_name_can_be_sampled_from(fastvae, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-odd", "a b$c'd"):
        status, out, _ = fastvae("train", "--data", text, f"--out={name}", *TINY)
        (command,) = [line for line in out.splitlines() if "; next: " in line]
        words = shlex.split(command.partition("next: ")[2])
        assert status == 0 and words[0] == "fastvae" and Path(words[2]) == Path(name)
        assert fastvae(*words[1:], "-n", 1)[0] == 0


def test_typed_texts_are_counted(fastvae, run):
    typed = b"the cat\n" * 12
    shown = [fastvae("reconstruct", run, *n, stdin=typed)[1] for n in ((), ("-n", 2))]
    assert [out.count("in  ") for out in shown] == [12, 2]


def test_a_file_that_is_read_is_not_written(refused, run, tmp_path):
    texts = tmp_path / "texts.html"
    texts.write_text("the cat ran to the mat\n")
    (tmp_path / "link.npy").symlink_to(texts)
    said = refused("encode", run, "--data", texts, "--out", tmp_path / "link.npy")
    assert "link.npy is a file that is read" in said
    assert texts.read_text() == "the cat ran to the mat\n"


def test_samples_depend_on_the_seed_alone(fastvae, run):
    def sample(*more):
        status, out, _ = fastvae("sample", run, "-n", 6, "-t", 1, "--batch-size", 4, *more)
        assert status == 0
        return out

    lines = sample().splitlines()
    assert [escape(text) for text in json.loads(sample("--json"))] == lines
    assert len(lines) == 6
    assert sample("--seed", 1).splitlines() != lines


def test_reconstruct_from_standard_input_and_from_a_file(fastvae, run, text):
    status, out, _ = fastvae(
        "reconstruct", run, "--json", stdin=b"the cat\n\nthe dog ran to the mat\n"
    )
    assert status == 0
    pairs = json.loads(out)
    assert [pair["text"] for pair in pairs] == ["the cat", "the dog ran to t"]
    shown = fastvae("reconstruct", run, stdin=b"the cat\n")[1].splitlines()
    assert shown == ["in  the cat", f"out {escape(pairs[0]['reconstruction'])}"]
    assert fastvae("reconstruct", run, stdin=b"a cat\n" * 12)[1].count("in  a cat\n") == 12
    from_file = json.loads(fastvae("reconstruct", run, "--data", text, "-n", 3, "--json")[1])
    assert "".join(pair["text"] for pair in from_file) == TEXT[:48]


def test_interpolation_ends_in_the_reconstructions(fastvae, run):
    ends = "the cat sat on t", "a dog ran to the"
    status, out, _ = fastvae("interpolate", run, *ends, "--steps", 5, "--json")
    assert status == 0
    texts = json.loads(out)
    assert len(texts) == 5
    pairs = json.loads(fastvae("reconstruct", run, "--json", stdin="\n".join(ends).encode())[1])
    assert [texts[0], texts[-1]] == [pair["reconstruction"] for pair in pairs]
    assert fastvae("interpolate", run, *ends)[1].count("\n") == 7


def test_encode_writes_posterior_means(fastvae, run, text, tmp_path):
    out = tmp_path / "z.npy"
    assert fastvae("encode", run, "--data", text, "--out", out, "--limit", 7)[0] == 0
    model, vocabulary = load(run)
    windows = [TEXT[n * 16 : n * 16 + 16] for n in range(7)]
    tokens = torch.tensor([vocabulary.encode(w) for w in windows])
    assert np.load(out).dtype == np.float32
    np.testing.assert_array_equal(np.load(out), model.posterior(tokens)[0].detach())
    assert fastvae("encode", run, "--out", out, stdin=windows[0].encode())[0] == 0
    np.testing.assert_array_equal(np.load(out), model.posterior(tokens[:1])[0].detach())
    parts = "--data", text, "--limit", 7, "--batch-size", 3
    assert fastvae("encode", run, "--out", out, *parts)[0] == 0
    want = torch.cat([model.posterior(part)[0] for part in tokens.split(3)])
    np.testing.assert_array_equal(np.load(out), want.detach())


def test_tweets_are_normalized_wherever_they_come_from(fastvae, tmp_path):
    model = HybridVAE(259, 32, pad_id=0, end_id=2, latent_size=2, encoder_channels=(4,))
    model.save_pretrained(tmp_path / "m", ByteVocabulary())
    line = "@ann http://x.y ok"
    (tmp_path / "tweets").write_text(line + "\n")
    piped = fastvae("reconstruct", tmp_path / "m", "--json", stdin=line.encode())[1]
    read = fastvae("reconstruct", tmp_path / "m", "--json", "--data", tmp_path / "tweets")[1]
    assert json.loads(piped)[0]["text"] == "@userid url ok"
    assert json.loads(piped) == json.loads(read)


def test_info_names_what_serves_each_op(fastvae):
    """Where there is no GPU, what would serve one."""
    pytest.importorskip("triton")
    status, out, _ = fastvae("info", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["torch"].startswith(torch.__version__)
    for op in ("layer_norm_lstm", "highway_conv_gate_backward", "decode_lstm", "decode_bytenet"):
        assert found["ops"][op]["cpu"] == "C++ kernel" and "Triton" in found["ops"][op]["cuda"]
    said = found["persistent CUDA kernels"]
    built = f"built; serving decode_bytenet; {PERSISTENT_PROVED}"
    assert said in ("not built; `pip install -v` says why", built)
    assert not [op for op in found["ops"] if op.endswith("_persistent")]
    assert found["ops"]["linear"] == {"cpu": "C++ kernel", "cuda": "PyTorch"}


def test_the_tables_of_info_are_its_json(fastvae, monkeypatch):
    import fastvae as package

    monkeypatch.setenv("COLUMNS", "300")
    found, shown = json.loads(fastvae("info", "--json")[1]), fastvae("info")[1]
    assert (found["fastvae"], found["threads"]) == (package.__version__, torch.get_num_threads())
    assert found["Triton kernels"] == PROVED and "fastvae.reference" in found["without kernels"]
    if not torch.cuda.is_available():
        assert found["GPU"] == "none"
    if not (torch.version.cuda or torch.version.hip):
        assert found["torch"] == f"{torch.__version__}, CPU only"
    rows = [re.split(r" {2,}", line.strip()) for line in shown.splitlines()]
    ops = found.pop("ops")
    assert [row for row in rows if row[0] in found] == [[k, str(v)] for k, v in found.items()]
    assert ["op", "CPU", "CUDA"] in rows
    served = [[op, server["cpu"], server["cuda"]] for op, server in ops.items()]
    assert [row for row in rows if row[0] in ops] == served


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux has the CPU's name there")
def test_info_names_the_cpu(fastvae):
    name, _, isa = json.loads(fastvae("info", "--json")[1])["CPU"].rpartition(", ")
    told = Path("/proc/cpuinfo").read_text()
    assert f"model name\t: {name}\n" in told if "model name" in told else name
    assert isa == _C.cpu_capability()


def test_the_table_of_servers_is_that_of_the_kernels_and_of_the_readme():
    kernels = pytest.importorskip("fastvae.kernels")
    triton = {op for op, server in ON_GPU.items() if "Triton" in server}
    assert triton == {*kernels.MODULES}
    rows = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    for op, server in ON_GPU.items():
        if not op.endswith(("_backward", "_pack")):
            (row,) = [row for row in rows if row.startswith(f"| `{op}` |")]
            assert row.endswith(f"| {server} |")


def test_info_of_persistent_kernels(fastvae, monkeypatch):
    """Whether they were built, and for what they serve."""
    persistent = pytest.importorskip("fastvae.kernels.persistent")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    built = [f"fastvae::{op}_persistent" for op in persistent.DTYPES]
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: (op in built and key == "CUDA") or has(op, key),
    )

    def said():
        return json.loads(fastvae("info", "--json")[1])["persistent CUDA kernels"]

    assert said() == f"built; serving decode_bytenet; {PERSISTENT_PROVED}"
    with persistent.serve(["decode_lstm"]):
        assert said() == f"built; serving decode_lstm; {PERSISTENT_PROVED}"
    with persistent.serve([]):
        assert said() == f"built; serving nothing; {PERSISTENT_PROVED}"


def test_info_without_triton(fastvae, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    servers = json.loads(fastvae("info", "--json")[1])["ops"]
    without = {"cpu": "C++ kernel", "cuda": "nothing: Triton is not installed"}
    assert servers["layer_norm_lstm"] == without
    assert servers["linear"] == {"cpu": "C++ kernel", "cuda": "PyTorch"}


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    from fastvae import kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("fastvae.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    kernels.kernel.cache_clear()
    with pytest.raises(ImportError, match=r"decode_lstm on a GPU needs Triton.*pip install triton"):
        kernels.kernel("decode_lstm")


LIGHT = (
    "import sys, torch; before = {*sys.modules}; import fastvae; print(*{*sys.modules} - before)"
)


def test_importing_the_package_imports_no_program(tmp_path):
    """What only the command line, plots, the Hub and GPUs need is imported where it is used."""
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastvae" in modules
    assert not modules & {"rich", "typer", "matplotlib", "huggingface_hub", "triton", "sklearn"}


def test_the_package_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "fastvae"]
    run = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "Usage: fastvae [OPTIONS] COMMAND" in run.stdout
    run = subprocess.run([*command, "sample", "none"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("fastvae: ")


def test_escape():
    assert (
        escape("a\nb\t\x1b[1m\x7f\x85\u202e[/b]é😀") == "a⏎b\\x09\\x1b[1m\\x7f\\x85\\u202e[/b]é😀"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("  a [/b]\x1b "), "a [/b]\\x1b"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
        (OSError("cannot write x"), "cannot write x"),
    ],
)
def test_an_error_is_one_line(error, line):
    assert one_line(error) == line


def test_cells_of_a_table():
    """Numbers to four digits below ten, else to hundredths; columns of numbers to the right."""
    out = Console(file=io.StringIO(), width=60)
    rows = [("a", 0.123456, 1234567, True), ("[/b]", -1234.567, 8, False), ("c", 10.0, 0, None)]
    out.print(table(("name", "x", "n", "is"), rows, title="T"))
    assert [line.rstrip() for line in out.file.getvalue().splitlines()] == [
        "T",
        " name          x          n  is",
        " a        0.1235  1,234,567  True",
        " [/b]  -1,234.57          8  False",
        " c         10.00          0  None",
    ]


def test_generated_control_characters_and_markup_come_out_escaped(fastvae, hostile):
    for command in (
        ("sample", hostile, "-n", 50, "-t", 2),
        ("interpolate", hostile, "[/b][/b]", "[b]]]"),
        ("reconstruct", hostile, "-t", 2),
    ):
        status, out, err = fastvae(*command, stdin=b"[/b]\n[b]\n" * 5)
        assert (status, err) == (0, "")
        assert all(c.isprintable() for line in out.splitlines() for c in line)
    assert "in  [/b]" in out
    sampled = fastvae("sample", hostile, "-n", 50, "-t", 2)[1]
    assert all(part in sampled for part in ("⏎", "\\x1b", "\\x07", "\\u202e", "["))


def test_a_terminal_of_few_characters(tmp_path, monkeypatch):
    """What it lacks is shown by its code: texts as well as errors."""
    vocabulary = CharVocabulary("é☃")
    sizes = {"latent_size": 2, "encoder_channels": (4,), "feature_channels": 4, "hidden_size": 4}
    model = HybridVAE(vocabulary.size, 16, pad_id=vocabulary.pad_id, **sizes)
    model.save_pretrained(tmp_path / "model", vocabulary)
    said = {}
    for name, status in (("model", 0), ("é", 2)):
        streams = [io.BytesIO(), io.BytesIO()]
        for stream, content in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, stream, io.TextIOWrapper(content, "ascii"))
        with pytest.raises(SystemExit) as end:
            cli.main(["sample", str(tmp_path / name), "-t", "2"])
        assert end.value.code == status
        said[name] = [content.getvalue().decode("ascii") for content in streams]
    out, err = said["model"]
    assert err == "" and {*out.replace("\\xe9", "1").replace("\\u2603", "2")} == {"1", "2", "\n"}
    out, err = said["é"]
    assert out == "" and err.startswith(f"fastvae: {tmp_path}/\\xe9 is not a folder")


def test_a_closed_pipe_is_quiet(run):
    command = f"{PROGRAM} sample {run} -n 20000 -t 1 | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, (), "no such file: {data}"),
        (b"", (), "{data} is empty"),
        (b"short", (), "{data} has 5 characters, fewer than one window of 16"),
        (b"x" * 31 + b"\xff\n", (), "line 1 of {data} is not UTF-8 at byte 31"),
        (b"x" * 99 + b"\n", ("--preset", "tweets"), "{data}: no line fits the length"),
        (TEXT.encode(), ("--length", "18", "--encoder-channels", "4,4"), "not divisible by 4"),
        (TEXT.encode(), ("--preset", "huge"), "no preset 'huge': there are lines, small, ptb-lstm"),
        (TEXT.encode(), ("--speed", "9"), "No such option: --speed"),
        (TEXT.encode(), ("--steps", "many"), "steps = 'many': expected a whole number"),
        (TEXT.encode(), ("--steps",), "--steps"),
        (TEXT.encode(), ("stray",), "unexpected extra argument"),
        (TEXT.encode(), ("--decoder", "magic"), "decoder must be"),
        (TEXT.encode(), ("--device", "abacus"), "device abacus cannot be used here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_train_refuses(refused, tmp_path, content, more, message):
    data = tmp_path / "data"
    if content is not None:
        data.write_bytes(content)
    out = tmp_path / "run"
    err = refused("train", "--data", data, "--out", out, *TINY, *more)
    assert message.format(data=data) in err
    assert not (out / "config.json").exists()


def test_train_refuses_folders_it_cannot_use(refused, run, text, tmp_path):
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    err = refused("train", "--data", text, "--out", run, *TINY)
    assert f"{run} already holds a run" in err
    assert before == {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert "text.txt" in refused("train", "--data", text, "--out", text / "below", *TINY)
    assert "was started with" in refused(
        "train", "--data", text, "--out", run, *TINY, "--resume", "--hidden-size", 9
    )


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sample", ["--number", "--batch-size", "--threads"]),
        ("evaluate", ["--limit", "--batch-size", "--nll-samples", "--threads"]),
        ("reconstruct", ["--number", "--batch-size", "--threads"]),
        ("encode", ["--limit", "--batch-size", "--threads"]),
        ("experiment", ["--limit", "--steps", "--seeds", "--jobs"]),
    ],
)
def test_counts_are_at_least_one(refused, run, text, tmp_path, command, options):
    arguments = {"sample": [], "experiment": []}.get(command, ["--data", text])
    if command == "encode":
        arguments = [*arguments, "--out", tmp_path / "z.npy"]
    for option in options:
        subject = "fig6" if command == "experiment" else run
        said = refused(command, subject, *arguments, option, 0)
        assert option in said and "1" in said


def test_bad_use_is_one_line(refused, fastvae, run, text, tmp_path):
    assert "No such command 'fly'" in refused("fly")
    assert "--fast" in refused("sample", run, "--fast")
    assert "--number" in refused("sample", run, "-n", 0)
    assert "--data" in refused("evaluate", run)
    assert "nowhere is not a folder" in refused("sample", tmp_path / "nowhere")
    assert ".npy" in refused("encode", run, "--data", text, "--out", tmp_path / "z.txt")
    (tmp_path / "folder.npy").mkdir()
    folder = tmp_path / "folder.npy"
    assert "is a folder: name a file" in refused("encode", run, "--data", text, "--out", folder)
    below_a_file = text / "z.npy"
    assert "cannot make the folder" in refused("encode", run, "--data", text, "--out", below_a_file)
    status, out, err = fastvae()
    assert (status, err) == (2, "") and "Usage" in out


def test_inference_refuses_texts_that_do_not_fit(refused, run, tmp_path):
    assert "standard input holds no text" in refused("reconstruct", run)
    assert "'Z' (U+005A) at position 4" in refused("interpolate", run, "the Z", "a")
    assert "(U+0042) at position 2" in refused("reconstruct", run, stdin=b"a B\n")
    assert "not UTF-8 at byte 2" in refused("reconstruct", run, stdin=b"a \xff\n")
    other = tmp_path / "other"
    other.write_text("Unseen " * 20)
    assert f"'U' (U+0055) at position 0 of {other}" in refused("evaluate", run, "--data", other)
    model = HybridVAE(259, 8, pad_id=0, end_id=2, latent_size=2, encoder_channels=(4,))
    model.save_pretrained(tmp_path / "m", ByteVocabulary())
    assert "8 bytes, more than the 7 that fit" in refused(
        "reconstruct", tmp_path / "m", stdin=b"x" * 8
    )


def test_damaged_and_foreign_models_are_refused(refused, run, tmp_path):
    def copy(name):
        return Path(shutil.copytree(run, tmp_path / name))

    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    assert f"{truncated} is damaged" in refused("sample", truncated.parent)
    foreign = copy("foreign") / "config.json"
    foreign.write_text(foreign.read_text().replace('"hidden_size": 8', '"hidden_size": 7'))
    assert "model.safetensors" in refused("sample", foreign.parent)
    bare = copy("bare")
    (bare / "vocabulary.json").unlink()
    assert "vocabulary.json" in refused("sample", bare)
    empty = copy("empty")
    (empty / "model.safetensors").unlink()
    assert "model.safetensors" in refused("sample", empty)


def test_a_full_disk_keeps_the_old_file(refused, fastvae, run, text, tmp_path):
    out = tmp_path / "z.npy"
    assert fastvae("encode", run, "--data", text, "--out", out, "--limit", 2)[0] == 0
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
        err = refused("encode", run, "--data", text, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "File too large" in err
    assert out.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_demo(fastvae, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    figures, draw = [], plots.learning_curves
    monkeypatch.setattr(
        sys.modules["fastvae.cli.demo"],
        "learning_curves",
        lambda *given, **how: figures.append(how) or draw(*given, **how),
    )
    status, out, _ = fastvae("demo", "--steps", 5, "--seed", 3)
    assert status == 0
    for part in ("Samples", "reconstruction", "seven points", "Speed", "13.39"):
        assert part in out
    folder = tmp_path / "fastvae-demo"
    settings = json.loads((folder / "training.json").read_text())["config"]
    wanted = {"steps": 5, "seed": 3, "kl_floor": 0.05, "kl_end": 2, "learning_rate": 3e-3}
    wanted |= {"lr_decay": 0.5, "lr_decay_every": 1, "lr_decay_start": 3, "log_every": 1}
    assert {name: settings[name] for name in wanted} == wanted
    corpus, (trained, _) = SyntheticCorpus(48), load(folder)
    shown = [line.split() for line in out.splitlines() if "━" in line]
    assert [row[0] for row in shown] == ["1", "2", "3", "4", "5"]
    for row, record in zip(shown, read_metrics(folder / "metrics.jsonl")["valid"], strict=True):
        bound = record["bound"]
        values = [record["reconstruction"], record["kl"], bound, bound - corpus.entropy]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(values, abs=0.0051)
        assert row[5] == "━" * min(30, max(1, round(values[3] / 3)))
    samples = trained.sample(200, generator=torch.Generator().manual_seed(3))
    right = [corpus.describe(line) for line in corpus.vocabulary.batch_decode(samples)]
    assert f"✓ a line of the grammar: {200 - right.count(None)} of 200\n" in out
    fresh = corpus.batch(200, torch.Generator().manual_seed(5))
    lines, copies = map(
        corpus.vocabulary.batch_decode, (fresh, trained.generate(trained.encode(fresh)))
    )
    pairs = [
        (corpus.describe(a), corpus.describe(b) or {}) for a, b in zip(lines, copies, strict=True)
    ]
    shares = [f"{n} {sum(a[n] == b.get(n) for a, b in pairs) / 2:.0f} %" for n in corpus.factors]
    assert f"kept in 200 of them: {', '.join(shares)}\n" in out
    assert f"    {lines[0]}\n  → {escape(copies[0])}" in out
    ends = trained.encode(corpus.batch(2, torch.Generator().manual_seed(6)))
    path = [
        f"    {escape(t)}" for t in corpus.vocabulary.batch_decode(trained.interpolate(*ends, 7))
    ]
    assert "\n".join(["From one line to another in seven points of z", *path, ""]) in out
    assert [figure["entropy"] for figure in figures] == [corpus.entropy]
    speeds = re.findall(r"of 64 lines +([\d.]+) ms +([\d.]+) ms +([\d.]+)x", out)
    assert len(speeds) == 2
    for ours, plain, ratio in (map(float, row) for row in speeds):
        low, high = (plain - 0.05) / (ours + 0.05), (plain + 0.05) / (ours - 0.05)
        assert low - 0.05 <= ratio <= high + 0.05
    png = (folder / "learning-curve.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert (folder / "metrics.jsonl").exists()
    model, vocabulary = load(folder)
    assert vocabulary.decode(model.sample(1)[0]) is not None
    assert "is not empty" in refused("demo", "--steps", 2, "--out", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_tells_what_is_saved(fastvae, tmp_path, monkeypatch, number):
    drawn = []

    class Interrupting(SyntheticCorpus):
        def batch(self, count, generator):
            drawn.append(count)
            if len(drawn) == 5:
                os.kill(os.getpid(), number)
            return super().batch(count, generator)

    monkeypatch.setattr(sys.modules["fastvae.cli.demo"], "SyntheticCorpus", Interrupting)
    folder = tmp_path / "demo"
    status, out, err = fastvae("demo", "--steps", 24, "--out", folder)
    assert status == 130 and len(drawn) == 5 and "Samples" not in out
    assert err == f"stopped and saved at step 5: try fastvae sample {folder}\n"
    assert fastvae("sample", folder, "-n", 1)[0] == 0


def test_demo_counts_what_copies_keep():
    """Of the lines half come back as they are, and of the others nothing."""
    corpus, console = SyntheticCorpus(48), Console(file=io.StringIO(), width=120)

    class Half:
        encode = staticmethod(lambda tokens: tokens)

        def generate(self, tokens):
            return torch.cat([tokens[:100], torch.full_like(tokens[100:], tokens.max())])

    sys.modules["fastvae.cli.demo"]._show_reconstructions(Half(), corpus, 0, console)
    shares = ", ".join(f"{name} 50 %" for name in corpus.factors)
    assert f"kept in 200 of them: {shares}\n" in console.file.getvalue()


def test_demos_go_to_the_first_free_folder(fastvae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastvae.cli.training.run_demo", lambda out, **rest: out.mkdir() or {})
    for name in ("fastvae-demo", "fastvae-demo-2", "fastvae-demo-3"):
        assert not Path(name).exists() and fastvae("demo")[0] == 0
        assert Path(name).is_dir()


def test_learning_curves_need_rows(tmp_path):
    empty = tmp_path / "metrics.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="no rows yet"):
        learning_curves(read_metrics(empty), tmp_path / "x.png")
    terms = {"bound": 3, "bpc": 0.5, "reconstruction": 2, "kl": 1, "kl_weight": 0}
    row = {"step": 1, "split": "valid", **terms}
    empty.write_text(json.dumps(row) + "\n")
    learning_curves(read_metrics(empty), tmp_path / "x.svg", entropy=1.25, title="one [/b] row")
    assert "</svg>" in (tmp_path / "x.svg").read_text()
    assert not plots.pyplot().get_fignums()  # none is kept open


TITLES = {
    "bound": "bound = reconstruction + KL, nats",
    "bpc": "bits per character of the bound",
    "reconstruction": "reconstruction, nats",
    "kl": "KL, nats",
}


def panels(figure):
    """Term -> its panel; the lines of a panel by label."""
    axes = {axis.get_title(): axis for axis in figure.axes}
    found = {term: axes[title] for term, title in TITLES.items()}
    lines = {
        term: {x.get_label(): [*zip(*map(list, x.get_data()), strict=True)] for x in axis.lines}
        for term, axis in found.items()
    }
    return found, lines


def curve(split, shift=0.0, last=100):
    """Records of every fifth step, whose terms are all different."""
    terms = {"bound": 40, "bpc": 4, "reconstruction": 30, "kl": 10, "kl_weight": 1}
    return [
        {"step": step, "split": split} | {k: v + shift + v / step for k, v in terms.items()}
        for step in range(5, last + 1, 5)
    ]


def test_learning_curves_show_every_term(drawn):
    metrics = {"train": curve("train"), "valid": curve("valid", shift=0.5, last=50)}
    metrics["valid"][1] |= {"kl": math.nan, "bpc": None}
    learning_curves(metrics, "x.png", entropy=13.25, title="a $run$")
    (figure,) = drawn
    assert figure.get_suptitle() == r"a \$run\$"
    axes, lines = panels(figure)
    for term, axis in axes.items():
        for split, rows in metrics.items():
            points = [(r["step"], r[term]) for r in rows]
            left_out = [points[1]] * (split == "valid" and term in ("kl", "bpc"))
            assert lines[term][split] == [p for p in points if p not in left_out]
        assert axis.get_xlabel() == "step"
    names = ["train", "valid", "entropy of the corpus, 13.2"]
    assert [*lines["bound"]] == names
    assert [text.get_text() for text in axes["bound"].get_legend().texts] == names
    markers = {line.get_label(): line.get_marker() for line in axes["bound"].lines}
    assert (markers["train"], markers["valid"]) == ("None", "o")  # of ten evaluations
    assert {y for _, y in lines["bound"]["entropy of the corpus, 13.2"]} == {13.25}
    assert all(lines[term].keys() == {"train", "valid"} for term in ("bpc", "reconstruction", "kl"))
    (weight,) = [a for a in figure.axes if a not in axes.values()]
    assert [*zip(*map(list, weight.lines[0].get_data()), strict=True)] == [
        (r["step"], r["kl_weight"]) for r in metrics["train"]
    ]
    assert weight.get_ylim() == pytest.approx((0, 1.08 * 1.2))


def test_frames_fit_what_follows_the_first_steps(drawn):
    """Of 100 steps the first five; logarithmic where the rest spans more than a factor of ten."""
    rows = curve("train")
    for row in rows:
        first = row["step"] == 5
        row["bound"] = 1000.0 if first else 2.0
        row["bpc"] = 1000.0 if first else 2.0
        row["kl"] = 1e-3 if first else -1.0
    rows[1] |= {"bound": 20.0, "bpc": 20.5, "kl": 3.0}
    learning_curves({"train": rows, "valid": []}, "x.png")
    axes, _ = panels(drawn[0])
    assert axes["bound"].get_yscale() == axes["kl"].get_yscale() == "linear"
    assert axes["bound"].get_ylim() == pytest.approx((0, 1.08 * 20))
    assert axes["kl"].get_ylim() == pytest.approx((0, 1.08 * 3))
    assert axes["bpc"].get_yscale() == "log"
    assert axes["bpc"].get_ylim() == pytest.approx((2 / 1.3, 20.5 * 1.3))


def test_runs_are_compared_by_their_validation_where_they_have_one(drawn):
    one = {"train": curve("train"), "valid": curve("valid", 0.5)}
    other = {"train": curve("train", 2.0), "valid": []}
    compare_runs({"_one": one, "two": other}, "x.png")
    _, lines = panels(drawn[0])
    for term in TITLES:
        assert lines[term] == {
            " _one": [(r["step"], r[term]) for r in one["valid"]],
            "two": [(r["step"], r[term]) for r in other["train"]],
        }
    (bound, *_) = drawn[0].axes
    assert [text.get_text() for text in bound.get_legend().texts] == [" _one", "two"]
    assert len({line.get_color() for line in bound.lines}) == 2


def test_runs_are_named_where_their_bound_is_not_drawn(drawn):
    runs = {name: {"train": curve("train"), "valid": []} for name in ("one", "two")}
    for row in runs["two"]["train"]:
        row["bound"] = math.nan
    compare_runs(runs, "x.png")
    for row in runs["one"]["train"]:
        row |= dict.fromkeys(TITLES, None)
    compare_runs({"one": runs["one"]}, "x.png")
    named, nothing = (figure.axes[0].get_legend() for figure in drawn)
    assert [text.get_text() for text in named.texts] == ["one", "two"] and nothing is None


def test_a_run_leaves_its_learning_curve_and_runs_are_compared(
    fastvae, refused, run, tmp_path, monkeypatch
):
    picture = run / "learning-curve.png"
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG")
    picture.unlink()
    status, out, _ = fastvae("plot", run)
    assert status == 0 and str(picture) in out and picture.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "_another $run$^ 東京"
    shutil.copytree(run, other)
    drawing = tmp_path / "both.svg"
    assert fastvae("plot", run, other, "--out", drawing)[0] == 0
    assert "</svg>" in drawing.read_text()
    monkeypatch.chdir(tmp_path)
    assert fastvae("plot", run, other) == (0, "Written: learning-curves.png\n", "")
    assert Path("learning-curves.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = fastvae("plot", other)
    assert (status, err) == (0, "")
    (other / "learning-curve.png").unlink()
    (other / "learning-curve.png").mkdir()
    data = "--data", run.parent / "text.txt", "--valid", run.parent / "text.txt"
    status, _, err = fastvae("train", *data, "--out", other, *TINY, "--resume")
    assert status == 0 and "learning-curve.png: Is a directory" in err
    assert "no-run" in refused("plot", tmp_path / "no-run")
    (other / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "metrics.jsonl: line 1 is no record of a run" in refused("plot", other)
    (other / "metrics.jsonl").write_text("")
    assert f"{other}: metrics.jsonl has no rows yet" in refused("plot", run, other)
    assert "cannot make the folder" in refused("plot", run, "--out", other / "lock" / "x.png")
    for wrong in (tmp_path, tmp_path / "x.word", run / "model.safetensors"):
        assert ".png, .svg or .pdf" in refused("plot", run, "--out", wrong)
    row = (run / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(row)["split"] == "train"
    for damaged in (
        '{"step": 1, "split": "train"}',
        row.replace('"step": ', '"step": "a", "b": '),
        "[" * 10_000,
        "\udcff",
    ):
        (other / "metrics.jsonl").write_text(f"{row}\n{damaged}\n", errors="surrogateescape")
        assert "metrics.jsonl: line 2 is no record of a run" in refused("plot", other)
    (other / "metrics.jsonl").write_text(row + '\n{"step": 9, "spl')  # cut off by a kill
    assert fastvae("plot", other, "--out", drawing)[0] == 0
    endless = {**json.loads(row), "bound": math.inf, "kl": math.nan, "kl_weight": math.nan}
    (other / "metrics.jsonl").write_text(json.dumps(endless) + "\n")
    assert fastvae("plot", other, "--out", drawing)[0] == 0


# Options that several commands share


def test_version(fastvae):
    import fastvae as package

    assert fastvae("--version") == (0, f"fastvae {package.__version__}\n", "")


def test_threads(fastvae, run):
    before = torch.get_num_threads()
    try:
        for command in (("sample", run, "-n", 1), ("interpolate", run, "the cat", "a dog")):
            torch.set_num_threads(before)
            assert fastvae(*command, "--threads", before + 3)[0] == 0
            assert torch.get_num_threads() == before + 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_none(refused, run):
    assert "--threads" in refused("sample", run, "--threads", 0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", 100_000, "--threads"),
        ("--seed", 2**64, "--seed"),
        ("--temperature", "inf", "temperature must be 0 to 1e+37, got inf"),
        ("--temperature", "nan", "--temperature"),
        ("--temperature", -0.5, "Invalid value for '--temperature' / '-t'"),
        ("--device", "meta", "device meta holds no numbers"),
        ("--device", "mps", "device mps cannot be used here"),
        ("--device", "cpu:7", "device must be cpu or cpu:0, got cpu:7"),
        ("--device", "cpu:-1", "device cpu:-1 cannot be used here"),
        ("--device", "", "device must be cpu, cuda, cuda:1 or the like, got ''"),
    ],
)
def test_options_out_of_range(refused, run, option, value, message):
    said = refused("sample", run, option, value)
    assert message in said and len(said) < 300


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_by_either_name(fastvae, run, name):
    assert find_device(name) == torch.device("cpu")
    assert fastvae("sample", run, "-n", 1, "--device", name)[0] == 0


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(run, streams):
    command = f'"{sys.executable}" -m fastvae sample "{run}" -n 1 {streams}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd="/")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert bool(ended.stdout) == (streams == "2>&-")


@pytest.mark.parametrize("columns", [60, 100])
def test_help_of_train_has_every_field(columns):
    from fastvae.presets import MEANINGS, PRESETS

    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [PROGRAM, "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "…" not in done.stdout
    said = " ".join(done.stdout.replace("│", " ").split())
    for name, meaning in MEANINGS.items():
        assert f"--{name.replace('_', '-')} " in said
        assert meaning.split()[0] in said
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.description}" in said
    assert (
        "--decoder lstm, bytenet (masked convolutions) or none (no history). (default lstm)" in said
    )


def test_fields(fastvae, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    status, out, _ = fastvae("fields", "--preset", "tweets-lstm-vae", "--json")
    rows = {row["field"]: row for row in json.loads(out)}
    assert status == 0 and rows["length"]["default"] == 128 and rows["clip_norm"]["default"] == 100
    assert rows["word_dropout"]["group"] == "Model" and "carry" not in rows
    assert all(row["meaning"].endswith(".") for row in rows.values())
    status, out, _ = fastvae("fields")
    assert status == 0 and "--encoder-channels" in out and "128,256" in out
    assert re.search(r"--kl-end +7000 ", out)  # 70 % of the steps
    titles = [line.strip() for line in out.splitlines() if "  " not in line.strip()]
    assert titles == ["Model, preset lines", "Training"]


def test_fields_of_no_preset(refused):
    assert "no preset 'huge'" in refused("fields", "--preset", "huge")


def test_options_may_have_underscores(refused, text, tmp_path):
    said = refused("train", "--data", text, "--out", tmp_path / "run", "--hidden_size=a")
    assert "hidden_size = 'a': expected a whole number" in said


@pytest.mark.parametrize(
    "options, message",
    [
        (("--hidden-size", 10**6), "Adam's moments need 64"),
        (("--batch-size", 10**9), "batch_size 1000000000"),
        (("--batch-size", 10**30), "batch_size must be at most"),
        (("--seed", 2**70), "seed must be at most"),
        (("--lr-decay", 1e300), "lr_decay"),
    ],
    ids=str,
)
def test_absurd_sizes(refused, text, tmp_path, options, message):
    said = refused("train", "--data", text, "--out", tmp_path / "run", *TINY, *options)
    assert message in said and not list((tmp_path / "run").glob("*.safetensors"))


def test_encode_makes_the_folder(fastvae, run, text, tmp_path):
    out = tmp_path / "a" / "b" / "latents.npy"
    assert fastvae("encode", run, "--data", text, "--out", out)[0] == 0
    assert np.load(out).shape[1] == 3


READ_ONLY = """
access = os.access
os.access = lambda path, *rest, **named: path != Path.home() and access(path, *rest, **named)
"""
NONE = """
def home():
    raise RuntimeError("Could not determine home directory.")
Path.home = home
"""


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("home", [READ_ONLY, NONE], ids=["read-only", "none"])
def test_pictures_without_a_home_to_write_to(tmp_path, home, told):
    """Matplotlib keeps its cache elsewhere."""
    program = f"import os\nfrom pathlib import Path\n{home}"
    program += """
from fastvae.plots import pyplot
pyplot()
import matplotlib
print(matplotlib.get_cachedir())
"""
    environment = {k: v for k, v in os.environ.items() if k != "MPLCONFIGDIR"}
    if told:
        environment["MPLCONFIGDIR"] = str(tmp_path)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    folder = Path(done.stdout.strip())
    if told:
        assert folder == tmp_path
    else:
        assert folder.name.startswith("fastvae-") and not folder.exists()


@pytest.mark.parametrize("moment", [0.05, 0.2, 0.4, 0.6, 0.8])
def test_interrupted_while_it_is_imported(moment):
    process = subprocess.Popen([PROGRAM, "info"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # At first Python itself, which runs no code of ours yet, tells of it; on busy cores for longer.
    before_the_command = b"fastvae_command/__init__.py" not in said and said != b""
    # Killed by the signal where Python has put its handlers away; the shell says 130 then too.
    assert process.returncode in (130, 0, -signal.SIGINT) or before_the_command, said
    assert b"Traceback" not in said or before_the_command


@pytest.mark.parametrize("name", ["hpu", "mkldnn", "opengl", "privateuseone", "nonsense"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"device {name} cannot be used here") as error:
        find_device(name)
    assert "\n" not in str(error.value) and "/" not in str(error.value)
