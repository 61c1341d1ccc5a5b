"""Loaders and placement of batches: every process makes its share of a batch and puts it on its devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.workers import Reading
from mllm_jax.sharding.logical_axes import Rules, partition_spec
from mllm_jax.train.runs.data import DataConfig
from mllm_jax.types import Batch, DualBatch

STREAMS = 64  # default maximum, because each stream holds conversations that wait to be packed


def open_data(
    data: DataConfig,
    processor: Processor | DualProcessor,
    mesh: Mesh,
    rules: Rules,
    reading: Reading | None = None,
) -> Any:
    """Returns the loader of this process's share of batches: an iterator of (Batch, Info) with get_state, set_state.

    reading: see `make_loader`.
    """
    index, count = shares_of(data.batch, mesh, rules)
    check_streams(data, count)
    return loader_of(data, processor, reading, index, count)


def check_streams(data: DataConfig, count: int) -> None:
    """Raises ConfigError if the streams do not divide among `count` processes with separate rows."""
    streams = streams_of(data)
    if streams % count:
        raise ConfigError(
            f"config.data: {streams} streams do not divide among {count} processes. Set config.data.streams to a "
            f"divisor of batch={data.batch} that is a multiple of {count}."
        )


def streams_of(data: DataConfig) -> int:
    """Returns the number of streams that fill the rows of a batch."""
    return data.streams or max(divisor for divisor in range(1, STREAMS + 1) if data.batch % divisor == 0)


def loader_of(
    data: DataConfig,
    processor: Processor | DualProcessor,
    reading: Reading | None = None,
    index: int = 0,
    count: int = 1,
) -> Any:
    """Returns the loader of share `index` of `count` of every batch. reading: see `make_loader`."""
    return make_loader(
        data.source(),
        processor,
        data.budget,
        data.batch,
        seed=data.seed,
        epochs=data.epochs,
        window=data.window,
        streams=streams_of(data),
        workers=data.workers,
        processes=data.processes,
        prefetch=data.prefetch,
        process_index=index,
        process_count=count,
        fail_on_bad_record=data.fail_on_bad_record,
        max_bad_fraction=data.max_bad_fraction,
        reading=reading,
    )


def shares_of(batch: int, mesh: Mesh, rules: Rules) -> tuple[int, int]:
    """Returns (index, count): this process's share of the rows of a batch, see `row_share`."""
    sharding = NamedSharding(mesh, partition_spec(("batch",), rules, mesh, (batch,), "config.data.batch"))
    return row_share(sharding, batch)


def row_share(sharding: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """Returns (index, count): this process's share of the rows of a global batch.

    Processes whose devices hold the same rows (a model sharded over hosts) have the same share. Example: with rows 0-3
    on processes 0 and 1, and rows 4-7 on processes 2 and 3, process 2 gets (1, 2).
    """
    first: dict[int, int] = {}
    for device, (device_rows, *_) in sharding.devices_indices_map((rows,)).items():
        start = device_rows.start or 0
        first[device.process_index] = min(start, first.get(device.process_index, start))
    shares = sorted(set(first.values()))
    return shares.index(first[jax.process_index()]), len(shares)


class Placer:
    """Puts this process's rows of every batch on the devices of the mesh, as parts of one global batch.

    rows: number of rows of the global batch.
    shardings: returns the NamedSharding of every array of a global batch.
    """

    def __init__(self, rows: int, shardings: Callable[[Any], Any]):
        self.rows, self._shardings = rows, shardings
        self._layout = None  # shardings of the first batch; all batches have the same shapes

    def __call__(self, batch: Batch | DualBatch) -> Batch | DualBatch:
        shares = self.rows // batch.rows
        global_shape = lambda x: (shares * x.shape[0], *x.shape[1:])
        if self._layout is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(global_shape(x), x.dtype), batch)
            self._layout = self._shardings(shapes)
        place = lambda x, sharding: jax.make_array_from_process_local_data(sharding, x, global_shape(x))
        return jax.tree.map(place, batch, self._layout)
