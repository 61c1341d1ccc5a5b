"""Comparison of trees of arrays, bit for bit."""

import numpy as np

from mllm_jax.common.trees import flatten


def bits(array):
    """The bytes of every element, u8[... bytes]."""
    array = np.asarray(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize)


def assert_same_bits(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].shape == right[path].shape and left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(bits(left[path]), bits(right[path]), err_msg=path)
