"""What a Hopper binary says about itself: its hot loops, and descriptors that nothing has set.

ptxas 12.8 computes wgmma descriptors that two loops share before the first one only, even where that has no
turn and is left out. It did so when queries lay at an address that changed from tile to tile: some lists of
entries gave wrong results, or none.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path


def disassembled(cubin: bytes) -> str:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [tool, "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout


def unset_descriptors(sass: str) -> list[str]:
    """Every wgmma one of whose descriptor registers is not set on some way there."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    before = _predecessors(code)
    written = [_written(text) for _, text in code]
    found = []
    for i, (at, text) in enumerate(code):
        if any(-1 in _sources(i, r, before, written, code) for r in _descriptors(text)):
            found.append(f"{at:#x} {text}")
    return found


def hot_loops(sass: str) -> list[list[str]]:
    """The instructions of every innermost loop with matrix products. What waits for a barrier in vain stands at
    the end of the code and comes back by a jump without condition: no loop."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    number = {at: i for i, (at, _) in enumerate(code)}
    found = []
    for i, (at, text) in enumerate(code):
        target = re.match(r"@.*BRA.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at and int(target[1], 16) in number:
            first = number[int(target[1], 16)]
            if any("GMMA" in t for _, t in code[first:i]):
                found.append((first, i))
    inner = [x for x in found if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in found)]
    return [[_bare(text) for _, text in code[a : b + 1]] for a, b in inner]


def order(loop: list[str]) -> str:
    """What a loop does, in order, a letter for every run of like instructions: Q scores (operands in shared
    memory), P products of weights (the left operand in registers), w waits for products, e exponentials."""
    letters = []
    for text in loop:
        if "GMMA" in text:
            letters.append("P" if re.search(r"R\d+, R\d+, gdesc", text) else "Q")
        elif text.startswith("WARPGROUP.DEPBAR"):
            letters.append("w")
        elif text.startswith("MUFU.EX2"):
            letters.append("e")
    return "".join(x for i, x in enumerate(letters) if i == 0 or letters[i - 1] != x)


def _predecessors(code: list[tuple[int, str]]) -> list[list[int]]:
    number = {at: i for i, (at, _) in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    for i, (_, text) in enumerate(code):
        operation = _bare(text).split(" ")[0]
        target = re.search(r"0x([0-9a-f]+)", text) if operation.startswith("BRA") else None
        if target and int(target[1], 16) in number:
            before[number[int(target[1], 16)]].append(i)
        leaves = operation.startswith(("BRA", "BRX", "EXIT", "RET"))
        if i + 1 < len(code) and (
            not leaves or text.startswith("@") or "P" in text[3:].split("0x")[0]
        ):
            before[i + 1].append(i)
    return before


def _sources(i: int, register: int, before, written, code) -> set[int]:
    """The instructions that the register may come from; -1: none on some way."""
    sources, seen, left = set(), set(), list(before[i]) or [-1]
    while left:
        j = left.pop()
        if j in seen:
            continue
        seen.add(j)
        if j == -1:
            sources.add(j)
            continue
        if register in written[j]:
            sources.add(j)
            if not code[j][1].startswith("@"):
                continue
        # The head of a partition of warps is reached by a computed jump only.
        left += before[j] + ([] if any(k < j for k in before[j]) else [-1])
    return sources


def _bare(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text)


def _written(text: str) -> set[int]:
    operation, _, operands = _bare(text).partition(" ")
    if not operation.startswith(("U", "R2UR", "S2UR", "VOTEU")) or operation.startswith("UTMA"):
        return set()
    wide = 2 if ".64" in operation or operation.startswith("UIMAD.WIDE") else 1
    for operand in operands.split(",")[:3]:
        if register := re.fullmatch(r"\s*UR(\d+)\s*", operand):
            return set(range(int(register[1]), int(register[1]) + wide))
        if not re.fullmatch(r"\s*U?P\w+\s*", operand):
            break
    return set()


def _descriptors(text: str) -> set[int]:
    """Two registers of each operand in shared memory; those of the second one follow those of the first."""
    found = re.search(r"GMMA.*gdesc\[UR(\d+)\]", text)
    if not found:
        return set()
    first = int(found[1])
    left_in_registers = re.search(r"R\d+, R\d+, gdesc", text) is not None
    return set(range(first + 2 * left_in_registers, first + 4))
