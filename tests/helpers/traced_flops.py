"""FLOPs of a traced program, to compare with those that are counted by hand."""

import math

import jax


def dot_flops(jaxpr, times=1):
    """FLOPs of all matrix products of a jaxpr, loops of known length included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            output = equation.outvars[0].aval.shape
            total += 2 * times * math.prod(output) * math.prod(left[axis] for axis in contracted)
            continue
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                total += dot_flops(value, inner)
    return total
