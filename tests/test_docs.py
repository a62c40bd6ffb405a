"""What README and docs show runs: Python blocks whole, commands on tiny texts and sizes."""

import ast
import gzip
import inspect
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import fastvae
from fastvae import cli, metrics, models, nn, objective, ops, presets, text, training

ROOT = Path(__file__).parents[1]
NAMES = ("README", "docs/getting-started", "docs/training", "docs/generation", "docs/ops")
PAGES = {name: (ROOT / f"{name}.md").read_text() for name in NAMES}
PAGES |= {
    name: (ROOT / f"{name}.md").read_text() for name in ("docs/first-runs", "docs/performance")
}
BLOCKS = [
    pytest.param(block, id=f"{name}-{n}")
    for name in NAMES
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", PAGES[name], re.S))
]
TINY = "--steps 2 --batch-size 2 --hidden-size 8 --encoder-channels 4,4 --feature-channels 4 "
TINY += "--eval-samples 4 --kl-start 0 --kl-end 1 --length 16"
LONG = ("demo", "experiment")  # other tests run these


def commands(page):
    """The lines of a page's blocks that call fastvae: what is piped into it, and its arguments."""
    joined = page.replace("\\\n", " ")
    found = []
    for line in re.findall(r"^    (.*)", joined, re.M):
        piped, _, after = line.rpartition("| ")
        for part in (after or line).split("&& "):
            if part.startswith("fastvae "):
                text = shlex.split(piped)[1] + "\n" if piped else ""
                found.append((text, shlex.split(part)[1:]))
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(block, tmp_path):
    short = re.sub(r"steps=500(.*)kl_end=250", r"steps=2\1kl_end=1", block)
    code = [sys.executable, "-c", short]
    (tmp_path / "train.txt").write_text("a year earlier, the company said it will sell\n" * 9)
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    if "fastvae.load" in block:
        assert done.stdout.startswith("[") and done.stdout.count(", ") >= 4
        assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_example_for_gpus_is_valid():
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["docs/performance"], re.S)
    ast.parse(block)


@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "a year earlier\nthe company said\n" * 20
    for file in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / file).write_text(text)
    (tmp_path / "tweets.txt.gz").write_bytes(gzip.compress(text.encode()))
    for piped, arguments in commands(PAGES[name]):
        if arguments[0] in LONG:
            continue
        if arguments[0] == "train":
            arguments = [*arguments, *shlex.split(TINY)]
        if piped:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert not ended.value.code, (arguments, capsys.readouterr().err)


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name):
    group = get_command(cli.app)
    for _, arguments in commands(PAGES[name]):
        command = group.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])


def test_every_command_is_shown():
    shown = {arguments[0] for page in PAGES.values() for _, arguments in commands(page)}
    assert shown == {*get_command(cli.app).commands}


def test_readme_is_short():
    page = PAGES["README"]
    assert len(page.encode()) <= 8000
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(example.strip().splitlines()) <= 10


def test_readme_shows_rows_that_were_measured():
    rows = [row for row in PAGES["README"].splitlines() if " ms | " in row or " s | " in row]
    assert len(rows) >= 6
    for row in rows[:6]:
        assert row in PAGES["docs/performance"].splitlines()


def test_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), (path, link)


@pytest.mark.parametrize("name", ops.__all__)
def test_help_of_an_op_tells_all(name):
    """Its equation or what it returns, shapes, errors and every argument."""
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    assert "->" in text.splitlines()[0] and "Returns:" in text and "RuntimeError:" in text
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, argument


MODULES = (fastvae, models, nn, ops, text, training, metrics, objective, presets)


def documented():
    """Public functions, classes and methods of the package's own, by name."""
    found = {}
    for module in MODULES:
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            home = module.__name__ if not hasattr(module, "__all__") else "fastvae"
            if name.startswith("_") or not getattr(value, "__module__", "").startswith(home):
                continue
            if inspect.isfunction(value):
                found[value.__qualname__] = value
            if inspect.isclass(value):
                found[value.__qualname__] = value
                for method in vars(value).values():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method) and not method.__name__.startswith("_"):
                        found[method.__qualname__] = method
    return found


@pytest.mark.parametrize("name", documented())
def test_public_names_are_documented(name):
    """In Google style: where there is a choice of arguments, each has its line."""
    value = documented()[name]
    own = inspect.isfunction(value) or "__init__" in vars(value) or "__annotations__" in vars(value)
    parameters = inspect.signature(value).parameters if own else {}
    arguments = [p for p in parameters if p not in ("self", "cls")]
    said = inspect.getdoc(value)
    assert said and not said.startswith(("Args:", "\n"))
    if len(arguments) > 1:
        _, _, listed = said.partition("\nArgs:\n")
        missing = [p for p in arguments if not re.search(rf"^    {re.escape(p)}: \S", listed, re.M)]
        assert not missing, f"{name}: {missing}"
