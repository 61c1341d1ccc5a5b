"""Checks for silent compiler problems, in the traced and in the compiled program.

Each warning is one line that begins with the name of its check:

    all-reduce for all-gather       weights are gathered by adding zeros, which sends twice the bytes (TPU, 3-D torus)
    all-reduce for reduce-scatter   gradients are all-reduced although a device needs a slice: twice the bytes
    head in every chunk             the head's weight is communicated for every chunk of the loss
    dense expert gradient           the weight gradient of the experts costs as if every expert read every token
    dense mask                      attention reads a mask of all queries times all keys
    attention on XLA                attention does not run in the kernel of the platform
    unknown loop                    a loop of unknown length is counted as one run
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from mllm_jax.model.vlm import abstract_params, head_table
from mllm_jax.plan.hlo import hlo_text
from mllm_jax.plan.hlo.jaxpr import Operation, part_of, place, unknown_loops
from mllm_jax.sharding.logical_axes import num_shards
from mllm_jax.train.runs.config import Run

MASK = 2**20  # smallest number of query-key pairs in a mask that gives a warning
MIB = 2**20
KERNEL = {"tpu": "splash", "gpu": "cuDNN"}
SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "transpose", "reshape")  # pass on the same values
PARTS = ("get-tuple-element", "all-reduce-done", "optimization-barrier")


def warnings_of(
    run: Run, platform: str, steps: list[Operation], program: hlo_text.Program, mesh: Mesh
) -> tuple[str, ...]:
    """Returns the warnings of all checks.

    Args:
      steps: operations of the traced step. program: the compiled step.
    """
    warnings = [
        *replaced_gathers(program),
        *replaced_scatters(platform, program),
        *head_exchanges(run, program, mesh),
        *dense_expert_gradients(platform, steps),
        *dense_masks(steps),
        *attention_on_xla(platform, steps),
        *(f"unknown loop: {place(scope) or scope} is counted as one run" for scope in unknown_loops(steps)),
    ]
    return tuple(dict.fromkeys(warnings))


def replaced_gathers(program: hlo_text.Program) -> Iterator[str]:
    """Finds all-reduces of arrays that contain a device's shard among zeros: gathers in disguise."""
    size = 0.0
    for transfer in hlo_text.transfers(program):
        if transfer.kind == "all-reduce":
            parts = (_origin(program, transfer.computation, name) for name in transfer.instruction.operands)
            zeros = sum(hlo_text.shape_bytes(part.shape) for part in parts if part.opcode == "dynamic-update-slice")
            size += transfer.runs * zeros
    if size > MIB:
        yield (
            f"all-reduce for all-gather: {size / MIB:.0f} MiB of a step are gathered by adding zeros, which sends twice"
            " the bytes. Let that mesh axis span less of the torus, or see train.async_gathers."
        )


def _origin(program: hlo_text.Program, computation: hlo_text.Computation, name: str) -> hlo_text.Instruction:
    """Returns the instruction that computes an operand, behind copies and layout changes. For a fusion: its root."""
    instruction = computation.instructions[name]
    while instruction.opcode in SAME:
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "fusion":
        return program.computations[instruction.called("calls")[0]].root
    return instruction


def replaced_scatters(platform: str, program: hlo_text.Program) -> Iterator[str]:
    """Finds all-reduces of which every device only reads a slice. Skips CPUs, where XLA always emits them."""
    size = 0.0
    for transfer in hlo_text.transfers(program) if platform != "cpu" else ():
        if transfer.kind != "all-reduce":
            continue
        arrays = [transfer.instruction]
        if transfer.instruction.shape.startswith("("):
            arrays = _readers(transfer.computation, transfer.instruction.name)
        for array in arrays:
            uses = set(_uses(program, transfer.computation, array.name))
            size += transfer.runs * hlo_text.shape_bytes(array.shape) * (uses == {"dynamic-slice"})
    if size > MIB:
        yield (
            f"all-reduce for reduce-scatter: {size / MIB:.0f} MiB of a step are all-reduced, but each device needs "
            "only a slice. A reduce-scatter would send half the bytes."
        )


def _readers(computation: hlo_text.Computation, name: str) -> list[hlo_text.Instruction]:
    return [reader for reader in computation.instructions.values() if name in reader.operands]


def _uses(program: hlo_text.Program, computation: hlo_text.Computation, name: str) -> Iterator[str]:
    """Yields the opcodes of the instructions that read an array, ignoring copies, layout changes and fusions."""
    for reader in _readers(computation, name):
        if reader.opcode in (*SAME, *PARTS):
            yield from _uses(program, computation, reader.name)
        elif reader.opcode == "fusion":
            inner = program.computations[reader.called("calls")[0]]
            numbers = [str(number) for number, operand in enumerate(reader.operands) if operand == name]
            for instruction in inner.instructions.values():
                if instruction.opcode == "parameter" and instruction.operands[0] in numbers:
                    yield from _uses(program, inner, instruction.name)
        else:
            yield reader.opcode


def head_exchanges(run: Run, program: hlo_text.Program, mesh: Mesh) -> Iterator[str]:
    """Finds collectives of the head's weight, or of its gradient, inside the loop over chunks of the loss."""
    table = head_table(abstract_params(run.model))
    part = table.size // num_shards("vocab", run.model.runtime.rules, mesh)
    for transfer in hlo_text.transfers(program):
        scope, shape = transfer.instruction.scope, transfer.instruction.shape
        inside = "/while/body/" in scope and part_of(scope) == "head"
        if inside and {part, table.size} & set(hlo_text.array_sizes(shape)) and transfer.kind != "collective-permute":
            yield (
                f"head in every chunk: {transfer.kind} of {transfer.bytes / MIB:.1f} MiB, "
                f"{transfer.runs * transfer.bytes / MIB:.0f} MiB in a step"
            )


def dense_expert_gradients(platform: str, steps: list[Operation]) -> Iterator[str]:
    """Finds `ragged_dot`, of which XLA expands the weight gradient on TPUs, and every product on GPUs."""
    for step in steps:
        if step.equation.primitive.name == "ragged_dot_general":
            numbers = step.equation.params["ragged_dot_dimension_numbers"]
            if platform == "gpu" or (platform == "tpu" and not numbers.rhs_group_dimensions):
                yield f"dense expert gradient: {step.scope} is ragged_dot. Use a grouped kernel (runtime.grouped)."


def dense_masks(steps: list[Operation]) -> Iterator[str]:
    """Finds masks bool[... T S] that an operation of attention creates."""
    for step in steps:
        if "attention" not in step.scope:
            continue
        for out in step.equation.outvars:
            shape = getattr(out.aval, "shape", ())
            if len(shape) > 1 and out.aval.dtype == bool and math.prod(shape[-2:]) >= MASK:
                sizes = ", ".join(map(str, shape))
                yield f"dense mask: {_layer(step.scope)} makes bool[{sizes}], {math.prod(shape) / MIB:.0f} MiB"


def attention_on_xla(platform: str, steps: list[Operation]) -> Iterator[str]:
    """Finds products of queries and keys outside of a kernel."""
    if platform not in KERNEL:
        return
    for step in steps:
        if step.equation.primitive.name == "dot_general" and "attention" in step.scope and _of_pairs(step.equation):
            yield f"attention on XLA: {_layer(step.scope)} does not run in {KERNEL[platform]}. See runtime.attention."


def _of_pairs(equation: Any) -> bool:
    """Returns whether a product has batch dimensions (rows, heads) and free ones on both sides (queries, keys)."""
    numbers = equation.params["dimension_numbers"]
    sides = [variable.aval.ndim for variable in equation.invars]
    free = [ndim - len(joined) - len(batch) for ndim, joined, batch in zip(sides, *numbers)]
    return bool(numbers[1][0]) and min(free) > 0


def _layer(scope: str) -> str:
    """Returns the attention module of a scope inside it: "decoder/layers/attention/q" -> "decoder/layers/attention"."""
    return place(scope).partition("attention")[0] + "attention"
