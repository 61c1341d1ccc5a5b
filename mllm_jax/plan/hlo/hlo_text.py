"""Parses the text of a compiled program, and finds its collectives, their number of runs, and its largest arrays.

The text is XLA's optimized HLO: one program for all devices, with the shapes of one device. The body of a loop occurs
once, and TPU programs repeat a collective in every fusion that it is split over. The parser corrects for both.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
        "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
        "f8e4m3": 8, "f8e5m2": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e3m4": 8,
        "f8e8m0fnu": 8}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Names in TPU programs of transfers between slices, which hosts send over the data-center network.
BETWEEN_SLICES = {"ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
                  "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"}  # fmt: skip
# Instructions that allocate no array, or only return arrays of a computation that is read separately.
NO_ARRAY = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
            "optimization-barrier", "partition-id", "after-all"}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(?:, execution_thread=.*)?\s*$")
_BEGIN = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_BRACKETS = re.compile(r"[()]")


class Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str  # shape of the result, as in the text
    operands: tuple[str, ...]  # names; for a constant its value, for a parameter its number
    attributes: str  # text after the operands
    root: bool

    @property
    def between_slices(self) -> str | None:
        """Kind of the collective between TPU slices that this `recv` belongs to. None for other instructions."""
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.attributes)
        return BETWEEN_SLICES.get(match[1], match[1].lower()) if match and self.opcode == "recv" else None

    @property
    def scope(self) -> str:
        """Names of jax's scopes, down to the operation."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *roles: str) -> list[str]:
        """Returns the computations that the instruction calls in these roles: `body`, `calls`, ..."""
        groups = re.findall(rf"\b(?:{'|'.join(roles)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)


class Program(NamedTuple):
    entry: str
    computations: dict[str, Computation]


class Transfer(NamedTuple):
    """A collective of the program."""

    kind: str  # one of KINDS
    runs: float  # runs on a device in one execution of the program
    bytes: float  # bytes of the result on one device in one run
    instruction: Instruction
    computation: Computation  # the computation that contains the instruction


def parse(text: str) -> Program:
    """Parses the text of an HLO module. Raises ValueError if it is not one."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, []

    def finish():
        if lines:
            instruction = _instruction("\n".join(lines))
            current.instructions[instruction.name] = instruction
            lines.clear()

    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = Computation(header[2], {})
                entry = header[2] if header[1] else entry
        elif _END.match(line):
            finish()
            computations[current.name], current = current, None
        elif _BEGIN.match(line):
            finish()
            lines.append(line)
        elif lines:  # attributes of TPU programs span lines
            lines.append(line)
    if not entry:
        raise ValueError("the text is not an HLO module: it has no ENTRY.")
    return Program(entry, computations)


def _instruction(text: str) -> Instruction:
    root, name, rest = _INSTRUCTION.match(text).groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part.strip() for part in inside.split(",") if part.strip()]
    return Instruction(name, rest[:opening], shape, tuple(operands), rest[closing + 1 :], bool(root))


def _closing(text: str, opening: int) -> int:
    """Returns the index at which the parenthesis at `opening` closes."""
    depth = 0
    for bracket in _BRACKETS.finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"unclosed parenthesis in HLO: {text[:200]!r}")


def shape_bytes(shape: str) -> float:
    """Returns the bytes of all arrays in a shape's text, without the padding of tiled layouts."""
    sizes = ((kind, [int(size) for size in sizes.split(",") if size]) for kind, sizes, _ in _ARRAY.findall(shape))
    return sum(BITS.get(kind, 0) * math.prod(sizes) for kind, sizes in sizes) / 8


def array_sizes(shape: str) -> list[int]:
    """Returns the number of values of each array in a shape's text."""
    return [math.prod(int(size) for size in sizes.split(",") if size) for _, sizes, _ in _ARRAY.findall(shape)]


def transfers(program: Program) -> list[Transfer]:
    """Returns all collectives of one execution of the program.

    The condition of a loop gives its number of runs. If it depends on data, the loop's scope does
    (`nn.runtime.expect_runs`); without such a scope the loop counts once. For a conditional, the branch that moves the
    most bytes counts.
    """
    return _merge_parts(_transfers(program, program.entry, fused=False))


def _transfers(program: Program, name: str, fused: bool) -> list[tuple[Transfer, bool]]:
    """Returns (collective, whether it is in a fusion) for a computation and all that it calls."""
    collectives, computation = [], program.computations[name]
    for instruction in computation.instructions.values():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in KINDS:
            size = _result_bytes(instruction) * _filled(opcode, instruction)
            collectives.append((Transfer(opcode, 1, size, instruction, computation), fused))
        elif between := instruction.between_slices:
            size = shape_bytes(_elements(instruction.shape)[0])
            collectives.append((Transfer(between, 1, size, instruction, computation), fused))
        elif opcode == "while":
            times = trips(program, computation, instruction)
            inner = [x for body in instruction.called("body") for x in _transfers(program, body, fused)]
            collectives += [(transfer._replace(runs=transfer.runs * times), deep) for transfer, deep in inner]
        elif opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            branches = [_transfers(program, branch, fused) for branch in names]
            collectives += max(
                branches, key=lambda branch: sum(transfer.runs * transfer.bytes for transfer, _ in branch)
            )
        elif opcode == "fusion":
            inner = [x for called in instruction.called("calls") for x in _transfers(program, called, True)]
            if "all-reduce-scatter" in "".join(instruction.called("calls")):  # a reduce-scatter in TPU programs
                inner = [
                    (x._replace(kind="reduce-scatter", bytes=shape_bytes(instruction.shape)), deep) for x, deep in inner
                ]
            collectives += inner
        elif opcode in ("call", "async", "custom-call"):
            for called in instruction.called("to_apply", "calls", "called_computations"):
                collectives += _transfers(program, called, fused)
    return collectives


def _merge_parts(found: list[tuple[Transfer, bool]]) -> list[Transfer]:
    """Merges the repetitions of a collective that is fused with several computations: they share a channel."""
    separate: list[Transfer] = []
    parts: dict[tuple[str, str], Transfer] = {}
    for transfer, fused in found:
        channel = re.search(r"channel_id=(\d+)", transfer.instruction.attributes)
        if not (fused and channel):
            separate.append(transfer)
            continue
        key = transfer.kind, channel[1]
        if key not in parts or transfer.runs * transfer.bytes > parts[key].runs * parts[key].bytes:
            parts[key] = transfer
    return separate + list(parts.values())


def _result_bytes(instruction: Instruction) -> float:
    """Returns the bytes of a collective's result. A `-start`, except all-reduce-start, has operands in its shape."""
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return shape_bytes(_elements(instruction.shape)[1])
    return shape_bytes(instruction.shape)


def _filled(kind: str, instruction: Instruction) -> float:
    """Returns the share of a result that is sent: below 1 only for a ragged exchange with `nn.runtime.expect_share`."""
    shares = re.findall(r"\bshare_(\d+(?:\.\d+)?)", instruction.scope) if kind == "ragged-all-to-all" else []
    return float(shares[-1]) if shares else 1.0


def _elements(shape: str) -> list[str]:
    """Splits a tuple's shape into its elements: "(f32[2], (s8[3], u8[]))" -> ["f32[2]", "(s8[3], u8[])"]."""
    parts, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or place == len(shape) - 1:
            parts.append(shape[begin:place].strip())
            begin = place + 1
    return parts


def trips(program: Program, computation: Computation, loop: Instruction) -> float:
    """Returns the number of iterations of a `while` loop in a computation."""
    if match := re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(match[1])
    (condition,) = (program.computations[name] for name in loop.called("condition"))
    before = computation.instructions[loop.operands[0]]
    compare, place = condition.root, condition
    if compare.opcode == "fusion":
        place = program.computations[compare.called("calls")[0]]
        outer, compare = compare, place.root
    else:
        outer = None

    def value(name: str) -> int | None:
        """Returns the value of a constant, also of one that is passed to the loop or to a fusion. None otherwise."""
        instruction = place.instructions[name]
        if outer is not None and instruction.opcode == "parameter":
            instruction = condition.instructions[outer.operands[int(instruction.operands[0])]]
        if instruction.opcode == "get-tuple-element" and before.opcode == "tuple":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            instruction = computation.instructions[before.operands[index]]
        return int(instruction.operands[0]) if instruction.opcode == "constant" else None

    if compare.opcode == "compare" and "direction=LT" in compare.attributes:
        begin, end = map(value, compare.operands)
        if end is not None:
            return max(end - (begin or 0), 0)
    expected = re.findall(r"\btimes_(\d+(?:\.\d+)?)", loop.scope)
    return float(expected[-1]) if expected else 1


def largest_arrays(program: Program, count: int) -> list[tuple[str, str, int]]:
    """Returns (shape, scope, bytes on a device) of the `count` largest arrays that the program creates in main memory.

    Arrays with equal shape and scope are listed once, since the text does not tell which are alive at the same time.
    """
    found: dict[tuple[str, str], int] = {}
    for instruction in _made(program, program.entry):
        for kind, sizes, layout in _ARRAY.findall(instruction.shape):
            shape = f"{kind}[{sizes}]"
            elsewhere = re.search(r"S\([1-9]\d*\)", layout)  # in a memory space other than main memory
            if instruction.scope and not elsewhere:
                found[shape, instruction.scope] = int(shape_bytes(shape))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return [(shape, scope, size) for (shape, scope), size in ranked[:count]]


def _made(program: Program, name: str) -> Iterator[Instruction]:
    """Yields the instructions that allocate arrays, which excludes those inside fusions."""
    for instruction in program.computations[name].instructions.values():
        if instruction.opcode not in NO_ARRAY:
            yield instruction
        if instruction.opcode.removesuffix("-start") in ("while", "conditional", "call"):
            roles = ("body", "branch_computations", "true_computation", "false_computation", "to_apply")
            for called in instruction.called(*roles):
                yield from _made(program, called)
