"""Tensors to arrays and back: views of the same memory wherever there is one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradpost.answers import Buffer
from gradpost.protocol.dtypes import NUMPY
from gradpost.tensors import bf16
from gradpost.torch.names import FLOATS, Entry

MASTERS: Mapping[str, torch.dtype] = {"F32": torch.float32, "F64": torch.float64}

_LARGE = 32_768
"""Elements from which torch divides a copy among its threads."""


def to_array(tensor: torch.Tensor) -> Any:
    """What a session sends of a tensor: a view of it if it is on the CPU.

    NumPy has no bfloat16: those are marked bits.
    """
    if tensor.dtype == torch.bfloat16:
        bits = tensor.detach().view(torch.int16).numpy(force=True)
        return bf16(bits.view(np.uint16))
    return tensor.numpy(force=True)


def to_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A view of an array that a session received; uint16 are the bits of bfloat16 numbers."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def master_of(entries: Iterable[Entry]) -> str:
    """The dtype of a session for these parameters."""
    return "F64" if any(entry.param.dtype == torch.float64 for entry in entries) else "F32"


def wanted(entries: Iterable[Entry], master: str) -> str | None:
    """The dtype in which to ask for parameters, so that nothing travels in vain.

    None is the session's own, which the server sends without a copy.
    """
    dtypes = {FLOATS[entry.param.dtype] for entry in entries}
    if len(dtypes) > 1:
        return "model"
    return None if dtypes == {master} else dtypes.pop()


def gradients(entries: Iterable[Entry], master: str, *, copy: bool) -> dict[str, Any]:
    """The gradients that there are, by name.

    Args:
        entries: The parameters that the server keeps.
        master: The session's dtype.
        copy: Of all of them, so that backward may go on meanwhile.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    found = {}
    for param, name, _ in entries:
        grad = param.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"The gradient of {name!r} is sparse and the server takes dense ones: make the "
                "embedding with sparse=False, or call param.grad = param.grad.to_dense()."
            )
        found[name] = grad
    if len({grad.dtype for grad in found.values()}) > 1:  # a push has one dtype
        found = {name: grad.to(MASTERS[master]) for name, grad in found.items()}
    if copy:
        found = {name: grad.to("cpu", copy=True) for name, grad in found.items()}
    return {name: to_array(grad) for name, grad in found.items()}


def _check(param: torch.Tensor, name: str, array: NDArray[Any] | None) -> None:
    """Refuses to write what is not a parameter's.

    Raises:
        ValueError: Nothing was received, or another shape.
    """
    if array is None or array.shape != param.shape:
        theirs = "no such tensor" if array is None else f"shape {list(array.shape)}"
        raise ValueError(
            f"The session holds another model: for {name!r} of shape {list(param.shape)} it has "
            f"{theirs}."
        )


def _write(param: torch.Tensor, array: NDArray[Any]) -> None:
    """Copies values into a parameter, in place.

    Large ones on the CPU by NumPy, in this thread: torch divides such a copy among its threads and
    waits for the slowest of them, which took ten times as long while a server was busy on the other
    core.
    """
    if array.size < _LARGE or not param.is_cpu or NUMPY[FLOATS[param.dtype]] != array.dtype:
        param.copy_(to_tensor(array))
        return
    bits = param.dtype == torch.bfloat16
    plain = param.detach().view(torch.int16) if bits else param.detach()
    np.copyto(plain.numpy().view(array.dtype), array)
    torch.autograd.graph.increment_version(param)  # autograd has to notice, as after copy_


class Mirror:
    """The server's parameters beside the model's: what was written last, and of which version.

    The arrays are views of one buffer that is used again, so this costs a trainer the memory of
    one received model and no further copy.

    Attributes:
        buffer: To receive into.
        at: (epoch, version) of what the model holds: gradients count as computed there.
    """

    def __init__(self) -> None:
        self.buffer = Buffer()
        self.at = (0, 0)
        self._arrays: Mapping[str, NDArray[Any]] = {}
        self._seen: dict[str, int] = {}

    def write(self, entries: Sequence[Entry], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copies received parameters into the model, in place.

        In place, so that views and tied modules stay valid; and as torch's optimizers do, so that
        autograd still notices a backward through what was overwritten.

        Raises:
            ValueError: The session holds another model.
        """
        for param, name, _ in entries:
            _check(param, name, arrays.get(name))
        with torch.no_grad():
            for param, name, _ in entries:
                _write(param, arrays[name])
                self._seen[name] = param._version
        self._arrays = arrays
        assert self.buffer.version is not None
        self.at = self.buffer.version

    def uploaded(self, entries: Iterable[Entry], at: tuple[int, int]) -> None:
        """Takes note that the server has these parameters as the model does, in this version."""
        self._seen |= {name: param._version for param, name, _ in entries}
        self.at = at

    def edited(self, entries: Iterable[Entry], *, closely: bool = False) -> list[Entry]:
        """The parameters that somebody else has changed in the model since.

        torch counts in-place changes (as by Module.load_state_dict), but not those through
        `.data`.

        Args:
            entries: To look at.
            closely: Compare all values, not only where torch has counted a change.
        """
        return [
            entry
            for entry in entries
            if (closely or entry.param._version != self._seen[entry.name])
            and not self._holds(entry)
        ]

    def _holds(self, entry: Entry) -> bool:
        array = self._arrays.get(entry.name)
        if array is None:
            return False
        ours = entry.param.detach().cpu()
        return bool(torch.equal(ours, to_tensor(array).to(ours.dtype)))
