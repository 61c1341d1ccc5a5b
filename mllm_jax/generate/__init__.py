"""Generation: `mllm_jax.generate(vlm, conversations)` in Python, `python -m mllm_jax.generate` in a shell.

Function and package share a name. Whoever imports anything from the package binds `mllm_jax.generate` to it, so the
package itself can be called, and then is the function.
"""

import sys
import types

from mllm_jax.generate.decode import generate_ids
from mllm_jax.generate.requests import generate

__all__ = ["generate", "generate_ids"]


class _Package(types.ModuleType):
    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Package
