"""Precision of products: fp32 operands stay fp32. TPUs and GPUs round them by default."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision of a product of operands of `dtype`: the highest for fp32, else the platform's own."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def einsum(equation: str, x, y, out: DTypeLike | None = None):
    """Returns `jnp.einsum` of two operands, with the precision of the first.

    Args:
      out: dtype of sum and result. None: that of the operands.
    """
    return jnp.einsum(equation, x, y, precision=precision_of(x.dtype), preferred_element_type=out)
