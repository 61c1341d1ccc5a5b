"""Traces a few steps for xprof and TensorBoard: `--profile_steps=10:13`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mllm_jax.common.config import ConfigError


def steps_of(text: str | None) -> range:
    """Parses a range of steps: "10:13" -> steps 10, 11, 12 and 13, None -> no steps. Raises ConfigError."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--profile_steps={text} must be FIRST:LAST, steps from 1 on, such as 10:13.")
    return range(int(match[1]), int(match[2]) + 1)


class Tracer:
    """Traces `steps` into `folder`. Only process 0 traces."""

    def __init__(self, steps: range, folder: Path):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder, self._on = folder, False

    def run(self, step: int, function: Callable, *arguments: Any) -> Any:
        """Returns `function(*arguments)`, traced if `step` is among the traced steps."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            out = function(*arguments)
        if self._on and step == self._steps[-1]:
            jax.block_until_ready(out)
            self.close()
        return out

    def close(self) -> None:
        """Writes the trace if one was started."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
