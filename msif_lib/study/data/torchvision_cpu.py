"""Import torchvision beside a CPU build of torch.

The torchvision wheel of the Python package index is linked against CUDA libraries. Beside a CPU
build of torch its compiled part does not load, and ``import torchvision`` fails with "operator
torchvision::nms does not exist" (pytorch/vision issues 8985, 9077, 9085). Data sets, transforms
and classification models need none of the compiled operators, so declaring the two missing ones
is enough. ``torchvision.ops.nms``, detection models and ``torchvision.io`` stay unavailable.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import torchvision or one of its modules, with CPU torch as well as with CUDA torch.

    Parameters
    ----------
    module : str
        Name of the module, such as ``"torchvision.datasets"``.

    Returns
    -------
    ModuleType
        The module.

    Raises
    ------
    ImportError
        If torchvision is not installed.
    """
    global _library
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library = library
    return importlib.import_module(module)
