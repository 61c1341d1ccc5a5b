"""Input pipeline from conversations or image-text pairs to the devices: every process makes its share of a batch."""

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

STREAMS = 64  # default maximum: each holds its own conversations that wait to be packed


def open_data(
    data: DataConfig,
    processor: Processor | DualProcessor,
    mesh: Mesh,
    rules: Rules,
    reading: Reading | None = None,
) -> Any:
    """The loader of this process's share of every batch: an iterator of (Batch, Info) with get_state and set_state.

    reading: see `make_loader`.
    """
    index, count = shares_of(data.batch, mesh, rules)
    check_streams(data, count)
    return loader_of(data, processor, reading, index, count)


def check_streams(data: DataConfig, count: int) -> None:
    """Raises ConfigError unless each of `count` processes with separate rows has equally many streams."""
    streams = streams_of(data)
    if streams % count:
        raise ConfigError(
            f"config.data: {streams} streams do not divide among {count} processes; set config.data.streams, a divisor "
            f"of batch={data.batch} and a multiple of {count}"
        )


def streams_of(data: DataConfig) -> int:
    """The streams that fill the rows of a batch."""
    return data.streams or max(divisor for divisor in range(1, STREAMS + 1) if data.batch % divisor == 0)


def loader_of(
    data: DataConfig,
    processor: Processor | DualProcessor,
    reading: Reading | None = None,
    index: int = 0,
    count: int = 1,
) -> Any:
    """The loader of the share `index` of `count` of every batch; `reading` as in `make_loader`."""
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
    """(index, count): which share of the rows of a batch this process reads, see `row_share`."""
    sharding = NamedSharding(mesh, partition_spec(("batch",), rules, mesh, (batch,), "config.data.batch"))
    return row_share(sharding, batch)


def row_share(sharding: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """(index, count): which share of the rows of a global batch this process feeds.

    Processes whose devices hold the same rows (a model spread over hosts) feed the same share.
    """
    first: dict[int, int] = {}
    for device, (rows_here, *_) in sharding.devices_indices_map((rows,)).items():
        start = rows_here.start or 0
        first[device.process_index] = min(start, first.get(device.process_index, start))
    shares = sorted(set(first.values()))
    return shares.index(first[jax.process_index()]), len(shares)


class Placer:
    """Puts this process's rows of every batch on the devices of the mesh, as parts of one global batch.

    rows: of the global batch. shardings: gives the NamedSharding of every array of a global batch.
    """

    def __init__(self, rows: int, shardings: Callable[[Any], Any]):
        self.rows, self._shardings = rows, shardings
        self._layout = None  # that of the first batch: all have one shape

    def __call__(self, batch: Batch | DualBatch) -> Batch | DualBatch:
        shares = self.rows // batch.rows
        whole = lambda x: (shares * x.shape[0], *x.shape[1:])
        if self._layout is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(whole(x), x.dtype), batch)
            self._layout = self._shardings(shapes)
        place = lambda x, sharding: jax.make_array_from_process_local_data(sharding, x, whole(x))
        return jax.tree.map(place, batch, self._layout)
