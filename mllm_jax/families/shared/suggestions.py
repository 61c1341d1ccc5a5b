"""Errors for unsupported values in a file, with suggestions."""

from collections.abc import Iterable
from typing import Any

from mllm_jax.common.errors import nearest


def unsupported(named: str, name: Any, known: Iterable[str]) -> ValueError:
    """Returns the error for a value that is not one of `known`; it names the nearest supported value and all of them.

    Args:
      named: path of the field, such as "vision_config.model_type".
      name: its value.
    """
    known = sorted(known)
    meant = nearest(str(name), known)[0]
    return ValueError(f"{named}={name!r}: not supported. Did you mean {meant!r}? Supported: {', '.join(known)}.")
