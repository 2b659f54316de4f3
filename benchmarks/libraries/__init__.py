"""The libraries, one file each: how each is asked for the same thing.

A library is imported in the process that measures it and nowhere else.
"""

from benchmarks.libraries import (
    captum,
    curvature,
    dattri,
    kronfluence,
    ours,
    plain,
    pydvl,
    torch_influence,
)
from benchmarks.libraries.base import Approximate, Exact, Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in (ours, plain, pydvl, curvature, torch_influence, dattri, captum, kronfluence)
    for method in module.METHODS
}

__all__ = ["METHODS", "Approximate", "Exact", "Method"]
