"""Counts the operations of a block for which a host waits for its GPU, on tensors of any device."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ_BY_PYTHON = {"tolist", "numpy", "cpu", "__array__", "pin_memory"}  # on a CPU they reach no operator
ATEN = torch.ops.aten
READ_BY_OPERATORS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero}
INDEXED = {ATEN.index, ATEN.index_put_, ATEN.index_put, ATEN._unsafe_index, ATEN._index_put_impl_}


class _Calls(TorchFunctionMode):
    def __init__(self, found: "Counter[str]") -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READ_BY_PYTHON:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """A seed that is drawn from the CPU's own generator lies in host memory on any machine, so reading it is free."""

    def __init__(self, found: "Counter[str]") -> None:
        super().__init__()
        self.found = found
        self.drawn: set[int] = set()

    def __torch_dispatch__(self, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, result = operator.overloadpacket, operator(*args, **(kwargs or {}))
        if packet is ATEN.random_:
            self.drawn.add(result.data_ptr())
        elif packet in READ_BY_OPERATORS and args[0].data_ptr() not in self.drawn:
            self.found[str(packet)] += 1
        elif packet in INDEXED and any(isinstance(of, Tensor) and of.dtype == torch.bool for of in args[1]):
            self.found["boolean index"] += 1
        return result


@contextmanager
def counted_read_backs() -> Iterator["Counter[str]"]:
    """The read-backs of the block by operation, forward and backward."""
    found: Counter[str] = Counter()
    with _Calls(found), _Operators(found):
        yield found
