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
import torch
from typer.main import get_command

import fastvae
from fastvae import (
    cli,
    distributed,
    evaluation,
    metrics,
    models,
    nn,
    objective,
    ops,
    page,
    presets,
    testing,
    text,
    training,
)

ROOT = Path(__file__).parents[1]
NAMES = (
    *("README", "docs/getting-started", "docs/lines", "docs/training", "docs/generation"),
    *("docs/page", "docs/ops"),
)
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
TINY += "--eval-samples 4 --length 16"
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
    lines = [f"a year earlier, the company said it will sell {n}\n" for n in range(200)]
    (tmp_path / "train.txt").write_text("".join(lines))
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
    (tmp_path / "names.txt").write_text("Hamburg\nSan Francisco\nLyon\nMo i Rana\n" * 9)
    places = [
        f"{n}\t{name}\tx\n"
        for n, name in enumerate(("Hamburg", "San Francisco", "Novosibirsk") * 9)
    ]
    (tmp_path / "cities500.txt").write_text("".join(places))
    molecules = [f"gdb_{n},{'C' * n}O\n" for n in range(1, 9)] * 3
    (tmp_path / "qm9.csv").write_text("mol_id,smiles\n" + "".join(molecules))
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


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_takes_what_its_reference_takes(name):
    """In the same order, with the same defaults."""
    op = getattr(ops, name)
    reference = getattr(sys.modules[op.__module__], f"{name}_reference", op)
    assert inspect.signature(reference) == inspect.signature(op)


@pytest.mark.parametrize("name", ops.__all__)
def test_the_defaults_of_a_schema_are_those_of_the_op(name):
    op = getattr(torch.ops.fastvae, name, None)
    parameters = inspect.signature(getattr(ops, name)).parameters
    for argument in op.default._schema.arguments if op else ():
        if argument.has_default_value():
            assert argument.default_value == parameters[argument.name].default


MODULES = (
    *(fastvae, models, nn, ops, text, training, metrics, objective, presets),
    *(evaluation, distributed, testing, page),
)


def documented():
    """The package's public functions, classes, methods and properties -> their docstrings."""
    found = {}
    for module in MODULES:
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            home = "fastvae" if hasattr(module, "__all__") else module.__name__
            if name.startswith("_") or not getattr(value, "__module__", "").startswith(home):
                continue
            if inspect.isfunction(value):
                found[f"{value.__module__}.{name}"] = value, value.__doc__
            elif inspect.isclass(value):
                found |= documented_class(value)
    return found


def documented_class(value):
    """A class, its bases in the package, and their public methods and properties.

    A method may inherit its docstring from a base in the package, not from torch's.
    """
    found = {}
    own = [cls for cls in value.__mro__ if cls.__module__.startswith("fastvae")]
    for cls in own:
        # dataclass and NamedTuple make a docstring such as "Preset(description, model)".
        made = (vars(cls).get("__doc__") or "").startswith(f"{cls.__name__}(")
        found[f"{cls.__module__}.{cls.__qualname__}"] = cls, None if made else cls.__doc__
        for name, member in vars(cls).items():
            member = getattr(member, "__func__", member)
            is_method = inspect.isfunction(member) or isinstance(member, property)
            if is_method and not name.startswith("_"):
                said = [getattr(vars(base).get(name), "__doc__", None) for base in own]
                doc = member.__doc__ or next(filter(None, said), None)
                found[f"{cls.__module__}.{cls.__qualname__}.{name}"] = member, doc
    return found


def missing_in(value, doc):
    """What a docstring in Google style lacks: a first line, arguments, what is returned."""
    doc = inspect.cleandoc(doc or "")
    first = doc.partition("\n")[0]
    if not first or first in ("Args:", "Returns:", "Raises:"):
        return ["a first line"]
    own = not inspect.isclass(value) or {"__init__", "__annotations__"} & vars(value).keys()
    signature = inspect.signature(value) if own and not isinstance(value, property) else None
    parameters = [p for p in signature.parameters if p not in ("self", "cls")] if signature else []
    section = re.search(r"^Args:\n((?:    .*\n?)*)", doc, re.M)
    listed = re.findall(r"^    (\w+): \S", section[1], re.M) if section else []
    found = [f"the argument {p}" for p in parameters if len(parameters) > 1 and p not in listed]
    if signature:
        found += [f"a parameter named {p}" for p in listed if p not in parameters]
    if inspect.isfunction(value) and section:
        returns = signature.return_annotation not in (None, inspect.Signature.empty)
        if returns and "Returns:" not in doc and "->" not in first:
            found.append("what it returns")
    return found


DOCUMENTED = documented()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_documented(name):
    """In Google style: where there is a choice of arguments, each has its line."""
    assert not missing_in(*DOCUMENTED[name])


def test_public_names_are_found():
    """Functions, classes, bases, methods and properties, of modules with and without __all__."""
    assert {
        "fastvae.models.load",
        "fastvae.models.hybrid.HybridVAE",
        "fastvae.models.pretrained.PretrainedMixin.from_pretrained",
        "fastvae.nn.LayerNormLSTM.forward",
        "fastvae.text.vocabulary.Vocabulary.start_id",
        "fastvae.objective.VAEOutput",
        "fastvae.metrics.evaluate",
        "fastvae.ops.linear.linear",
    } <= DOCUMENTED.keys()


def test_what_a_docstring_lacks_is_told():
    def both(a: int, b: int) -> int:
        return a + b

    class Undocumented(torch.nn.Module):
        pass

    whole = "Add.\n\nArgs:\n    a: one.\n    b: the other.\n\nReturns:\n    the sum."
    assert missing_in(both, whole) == []
    assert missing_in(both, None) == missing_in(both, "Args:\n    a: one.") == ["a first line"]
    assert missing_in(both, whole.replace("b:", "c:")) == [
        "the argument b",
        "a parameter named c",
    ]
    assert missing_in(both, whole.replace("Returns:\n    the sum.", "")) == ["what it returns"]
    assert missing_in(both, "Add.\n\nReturns:\n    a: one.\n    b: the other.") == [
        "the argument a",
        "the argument b",
    ]
    Undocumented.__module__ = "fastvae.nn"
    ((name, found),) = documented_class(Undocumented).items()
    assert name.endswith("Undocumented") and missing_in(*found) == ["a first line"]
