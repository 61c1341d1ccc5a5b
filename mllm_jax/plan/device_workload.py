"""Computes the workload of one device in a step: its rows, and its shards of the weights."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mllm_jax.plan.sharded_weight import ShardedWeight, Weight, abstract_mesh, lay, read_weights
from mllm_jax.sharding.logical_axes import divisible_axes, partition_spec, rules_of, split_axes
from mllm_jax.train.monitor.flops import Counts, Flops, count_flops, near_pairs
from mllm_jax.train.runs.config import Run

TOWERS = ("encoder", "decoder")


class Shapes(NamedTuple):
    """Properties of a run that do not depend on mesh, remat policy and sharding rules. All batch rows count as full."""

    weights: tuple[Weight, ...]
    flops: dict[str, Flops]  # FLOPs of a step by part, on all devices together
    attention: dict[str, float]  # FLOPs of attention in the forward pass, by part


def read_shapes(run: Run) -> Shapes:
    """Computes the shapes of a run. Raises ValueError if a pattern of the optimizer matches no weight."""
    data, budget = run.data, run.data.budget
    patch_rows = data.batch * budget.patch_rows
    counts = Counts(
        tokens=float(data.batch * budget.tokens),
        token_pairs=data.batch * budget.tokens**2 / 2,
        patches=float(patch_rows * budget.patches_per_row),
        patch_pairs=float(patch_rows * budget.patches_per_row**2),
        targets=float(data.batch * budget.tokens),
        near_pairs=near_pairs(np.full(data.batch, float(budget.tokens)), run.model.decoder.window),
        images=float(patch_rows * budget.images_per_row),
        instruction_tokens=float(patch_rows * budget.images_per_row * budget.instruction_tokens),
    )
    flops = count_flops(run.model, counts, run.optim.freeze)
    without = count_flops(
        run.model, counts._replace(token_pairs=0.0, near_pairs=0.0, patch_pairs=0.0), run.optim.freeze
    )
    attention = {part: flops[part].forward - without[part].forward for part in flops}
    return Shapes(read_weights(run), flops, attention)


class Rows(NamedTuple):
    """Input of one part of the model on one device."""

    count: float  # tokens or patches of a micro-batch
    axes: tuple[str, ...]  # mesh axes that shard them


class DeviceWorkload:
    """Workload of one device for one of the `grad_accum_steps` micro-batches of a step.

    Raises ValueError if the mesh does not divide a weight, the batch or its tokens; the message contains a fix.
    """

    def __init__(self, shapes: Shapes, run: Run, sizes: Mapping[str, int]):
        self.shapes, self.run, self.budget = shapes, run, run.data.budget
        self.mesh, rules = abstract_mesh(sizes), run.model.runtime.rules
        self.bytes = jnp.dtype(run.model.runtime.dtype).itemsize
        self.grad_accum_steps, self.moe = run.train.grad_accum_steps, run.model.decoder.moe
        what = (
            "config.data.batch" if self.grad_accum_steps == 1 else "config.data.batch / config.train.grad_accum_steps"
        )
        micro_batch = run.data.batch // self.grad_accum_steps
        partition_spec(("batch",), rules, self.mesh, (micro_batch,), what)
        partition_spec(("length",), rules, self.mesh, (self.budget.tokens,), "config.data.tokens")
        self.rules = {part: rules_of(part, rules) for part in ("encoder", "connector", "decoder")}
        self.known = {
            part: {name: split_axes(name, own, self.mesh) for name in (None, *dict(own))}
            for part, own in self.rules.items()
        }
        text = self.known["decoder"]
        self.batch = micro_batch / self.size(text["batch"])
        tokens = self.batch * self.budget.tokens / self.size(text["length"])
        self.rows = {"decoder": Rows(tokens, (*text["batch"], *text["length"]))}
        if run.model.encoder is not None:
            sizes = self.budget.patches_per_row, self.budget.images_per_row
            visual = int(run.model.connector.num_tokens(*sizes))
            self.rows["encoder"] = self._patch_rows("encoder", micro_batch, self.budget.patches_per_row)
            self.rows["connector"] = self._patch_rows("connector", micro_batch, visual)
        self.towers = [part for part in TOWERS if part in self.rows]
        self.laid = [self._lay(weight) for weight in shapes.weights]
        inside = lambda weight, part: weight.is_matrix and weight.part == part and "layers" in weight.names
        self._matrices = {part: [laid for laid in self.laid if inside(laid.weight, part)] for part in self.towers}

    def _patch_rows(self, part: str, batch: int, length: int) -> Rows:
        """Returns a device's patches or visual tokens, from patch rows of `length`.

        Batch rows and patch rows form one axis, as in model/encoders/vit.py.
        """
        names, sizes = ("batch", "length"), (batch * self.budget.patch_rows, length)
        axes = [axis for n, x in zip(names, sizes) for axis in divisible_axes(n, x, self.rules[part], self.mesh)]
        return Rows(math.prod(sizes) / self.size(axes), tuple(axes))

    def _lay(self, weight: Weight) -> ShardedWeight:
        part = weight.part
        return lay(weight, self.rules[part], self.mesh, self.rows[part].axes, self.known[part])

    @property
    def text(self) -> dict[str | None, tuple[str, ...]]:
        """Mesh axes that shard each named axis of the decoder."""
        return self.known["decoder"]

    def parted(self, part: str) -> tuple[str, ...]:
        """Returns the axes that shard a tower's tokens between layers, but not within them (sequence parallelism)."""
        return tuple(axis for axis in self.text["residual"] if part == "decoder" and axis not in self.rows[part].axes)

    @property
    def patches(self) -> float:
        """Number of patches in the device's batch rows."""
        return self.batch * self.budget.patch_rows * self.budget.patches_per_row

    @property
    def images(self) -> float:
        """Number of images that the device's batch rows hold, for connectors with queries."""
        return self.batch * self.budget.patch_rows * self.budget.images_per_row

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.shape.values())

    def size(self, axes) -> int:
        """Returns the number of devices along these axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def rows_through(self, laid: ShardedWeight) -> float:
        """Returns the rows that a weight multiplies. For experts, a token counts once per expert that it chooses."""
        rows = self.rows[laid.weight.part].count
        return rows * self.moe.top_k if laid.weight.of_experts else rows

    def exchanged(self) -> float:
        """Returns the rows that all devices together send to the experts of this one, in one layer."""
        devices, rows, runtime = self.size(self.text["expert"]), self.rows["decoder"].count, self.run.model.runtime
        most = rows * min(self.moe.top_k, self.moe.experts / devices)
        room = runtime.capacity_factor * rows * self.moe.top_k / devices if runtime.capacity_factor else most
        return devices * min(most, room)

    def tower(self, part: str) -> list[ShardedWeight]:
        """Returns the matrices in the layers of a tower."""
        return self._matrices[part]

    def width(self, part: str) -> int:
        return getattr(self.run.model, part).width

    def layers(self, part: str) -> int:
        return getattr(self.run.model, part).layers

    def trains(self, part: str) -> bool:
        """Returns whether the backward pass reaches this part."""
        return self.shapes.flops[part].backward > 0
