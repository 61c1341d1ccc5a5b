"""Generation: `mllm_jax.generate(vlm, conversations)` in Python, `python -m mllm_jax.generate` in a shell.

The function and the package share a name, and importing anything from the package binds `mllm_jax.generate` to the
package. The package is therefore callable: calling it calls the function.
"""

import sys
import types

from mllm_jax.generate.decode import generate_ids
from mllm_jax.generate.requests import generate

__all__ = ["generate", "generate_ids"]


class _Package(types.ModuleType):
    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Package
