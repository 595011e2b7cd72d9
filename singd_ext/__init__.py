"""Structured inverse-free natural gradient descent (SINGD) for PyTorch, compiled.

`SINGD` is the optimizer, `param_groups` makes its groups, `register_layer` teaches it further types
of layers, `StructuredMatrix` are the Kronecker
factors it keeps, `singd_ext.ops` the operators that both are made of.
"""

from ._load import load as _load

_load()

from .groups import param_groups  # noqa: E402  (the operators must be registered first)
from .optimizer import SINGD  # noqa: E402
from .registry import register_layer  # noqa: E402
from .structured import StructuredMatrix  # noqa: E402

__version__ = "0.1.0"
__all__ = ["SINGD", "StructuredMatrix", "__version__", "param_groups", "register_layer"]
