"""The loops of products keep every sum in a register: on the stack it would be a quarter slower."""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from fastvae import _C

# That of this machine's instructions goes first: Python may be emulated.
OBJDUMP = shutil.which(f"{platform.machine()}-linux-gnu-objdump") or shutil.which("objdump")
MULTIPLY = re.compile(
    r"\b(vfn?m(add|sub)\d+p[sd]|vdpbf16ps|vpdpbusd|vpmaddwd|pmaddwd|mulp[sd]|fmla|mla|smull2?|bfdot|sdot)\b"
)
VECTOR = r"(%[xyz]mm\d|\b[qdv]\d+\b)"
STACK = re.compile(rf"{VECTOR}.*(\(%rsp|\[sp|\[x29)|\(%rsp.*{VECTOR}")
FRAME = re.compile(r"mov\s+%rsp,%rbp")  # without it rbp is a register like others
JUMP = re.compile(r"^(?:j[a-z]+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,.*,)\s+([0-9a-f]+)\b")


def product_functions() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name, and addresses with their instructions, of every function that multiplies operands."""
    command = [OBJDUMP, "-dC", "--no-show-raw-insn", _C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for function in text.split("\n\n"):
        head, *lines = function.strip().split("\n")
        if "multiply_rows<" not in head and "multiply_block<" not in head:
            continue
        rows = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines]
        yield head, [(int(row[1], 16), row[2]) for row in rows if row]


def inner_loops(rows: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The instructions from a backward jump's target to it, without another such jump between."""
    index = {address: i for i, (address, _) in enumerate(rows)}
    start = 0
    for i, (address, instruction) in enumerate(rows):
        jump = JUMP.match(instruction)
        target = int(jump[1], 16) if jump else address + 1
        if target <= address and index.get(target, -1) >= start:
            yield [instruction for _, instruction in rows[index[target] : i + 1]]
            start = i + 1


def stack_accesses(rows: list[tuple[int, str]], loop: list[str]) -> int:
    """How many instructions of a function's loop move a vector from or to the stack."""
    framed = any(FRAME.search(instruction) for _, instruction in rows)
    lines = [line.replace("(%rbp", "(%rsp") if framed else line for line in loop]
    return sum(bool(STACK.search(line)) for line in lines)


def test_loop_finder_sees_a_spill():
    """Of code as objdump prints it."""
    code = ["vmovups (%rsi),%zmm1", "vfmadd231ps %zmm1,%zmm2,%zmm0", "vmovaps %zmm0,0x40(%rsp)"]
    rows = [(16 * i, line) for i, line in enumerate([*code, "cmp %rax,%rdi", "jne    0 <f>"])]
    (loop,) = inner_loops(rows)
    assert len(loop) == 5 and MULTIPLY.search(loop[1]) and stack_accesses(rows, loop) == 1
    below = [line.replace("(%rsp)", "(%rbp)") for line in loop]
    assert stack_accesses(rows, below) == 0
    assert stack_accesses([(0, "mov    %rsp,%rbp"), *rows], below) == 1


@pytest.mark.skipif(not OBJDUMP, reason="objdump is not installed")
def test_product_loops_leave_the_stack_alone():
    loops = 0
    found = []
    for name, rows in product_functions():
        for loop in inner_loops(rows):
            if sum(bool(MULTIPLY.search(line)) for line in loop) < 4:
                continue
            loops += 1
            spilled = stack_accesses(rows, loop)
            if spilled:
                found.append(f"{spilled} stack accesses in a loop of {len(loop)}: {name}")
    assert loops > 20, "the functions were not found: is the module stripped?"
    assert not found, "\n".join(found)
