"""Parameters whose truth is on a worker (`parameters="remote"`): none of them is read here in silence.

After a call that has left new contents on a worker, the caller's tensors are *stale*: the same objects, over the same
memory, but of a class that brings them up to date before anything of torch's looks at their content. What is known
without it (shape, dtype, gradients, hooks) is answered as ever. Bringing up to date is all or nothing: whoever reads
one of them finds all of them as one and the same step has left them.

    stale --read, synchronize-->    current: content fetched and copied in place, the class is the old one
          --a compiled call-->      goes as a handle; within the call the class is lifted, for Dynamo's guards
          --its worker is lost-->   reading raises; synchronize(lost="rollback") takes the last synchronised state

Memory that somebody else can reach (a view, `detach()`, what `state_dict()` has returned) cannot be guarded by a class:
such a tensor never becomes stale, its content comes down with the call.
"""
from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from genie_dynamo.core.errors import GenieError, WorkerLostError

if TYPE_CHECKING:
    from genie_dynamo.runtime.client.session import Session
    from genie_dynamo.runtime.client.workers import WorkerLink

Tensor = torch.Tensor

_lock = threading.RLock()
_records: dict[int, Record] = {}
_before: dict[int, Before] = {}
_depth = 0                       # compiled calls under way, in all threads


class Record:
    """Where the content of one stale tensor is."""

    __slots__ = ("handle", "link", "plain", "ref", "session")

    def __init__(self, tensor: Tensor, session: Session, link: WorkerLink, handle: tuple[int, int]) -> None:
        address = id(tensor)
        self.ref = weakref.ref(tensor, lambda _: _records.pop(address, None))
        self.session, self.link, self.handle = session, link, handle
        self.plain = type(tensor)


class Before:
    """The last synchronised content of a tensor that came down since, while others did not: rollback wants it."""

    __slots__ = ("ref", "session", "value")

    def __init__(self, tensor: Tensor, session: Session) -> None:
        address = id(tensor)
        self.ref = weakref.ref(tensor, lambda _: _before.pop(address, None))
        self.session, self.value = session, tensor.detach().clone()


# ---------------------------------------------------------------- what may be asked of a stale tensor
_GETTERS = (
    "shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "names", "nbytes",
    "itemsize", "_version", "_backward_hooks", "_post_accumulate_grad_hooks", "retains_grad", "_grad", "_grad_fn",
    "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_sparse_csr", "is_nested", "is_quantized", "is_mkldnn", "is_xpu",
    "is_mps", "grad_dtype")
_METHODS = (
    "size", "dim", "numel", "nelement", "stride", "element_size", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "get_device", "register_hook",
    "is_conj", "is_neg", "register_post_accumulate_grad_hook", "requires_grad_", "_is_view", "__hash__")


def _harmless() -> frozenset[Any]:
    found: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_same_size, torch.is_inference}
    for name in _GETTERS:
        descriptor = getattr(Tensor, name, None)
        found.update(getattr(descriptor, verb) for verb in ("__get__", "__set__", "__delete__")
                     if descriptor is not None and hasattr(descriptor, verb))
    found.update(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name))
    return frozenset(found)


_HARMLESS = _harmless()
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Guard:
    """What the two classes of stale tensors share."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HARMLESS:
            sessions = {record.session for record in _records.values()} if func == _DATA else ()
            bring_home()
            for session in sessions:
                session.residency.touch(args)        # who takes `.data` may write to it, which no version shows
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    # Methods that look at the class before they look at the content.
    def __deepcopy__(self, memo: Any) -> Any:
        bring_home()
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        bring_home()
        return self.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        bring_home()
        return repr(self)


class StaleTensor(_Guard, Tensor):  # type: ignore[misc]
    """Optimizer state or a buffer whose content is on a worker."""


class StaleParameter(_Guard, torch.nn.Parameter):  # type: ignore[misc]
    """A parameter whose content is on a worker."""


_STALE: dict[type, type] = {Tensor: StaleTensor, torch.nn.Parameter: StaleParameter}


# ---------------------------------------------------------------- life
def _num_users(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        storage = tensor.untyped_storage()
        return int(torch._C._storage_Use_Count(storage._cdata))


_ALONE = _num_users(torch.nn.Parameter(torch.zeros(1)))
"""Users of memory that only one tensor has."""


def may_be_stale(tensor: Tensor) -> bool:
    """Whether nobody can read the tensor's content without asking the tensor."""
    return type(tensor) in _STALE.keys() | set(_STALE.values()) and _num_users(tensor) <= _ALONE


def mark(session: Session, tensor: Tensor, link: WorkerLink, handle: tuple[int, int]) -> None:
    """The content of the tensor is on a worker from now on. It may be stale already: then it is so once more."""
    with _lock:
        before = _records.get(id(tensor))
        record = Record(tensor, session, link, handle)
        if before is not None:
            record.plain = before.plain
        _records[id(tensor)] = record
        tensor.__class__ = _STALE[record.plain]


def comes_down(session: Session, tensor: Tensor) -> None:
    """A tensor that somebody else can read is about to get its new content, which others have on a worker alone."""
    with _lock:
        if id(tensor) not in _before:
            _before[id(tensor)] = Before(tensor, session)


def is_stale(tensor: Any) -> bool:
    return bool(_records) and id(tensor) in _records


def is_referred_to(tensor: Any) -> bool:
    """Whether the tensor is stale, or its last synchronised content is kept here."""
    return id(tensor) in _records or id(tensor) in _before


def any_stale() -> bool:
    return bool(_records)


def bring_home() -> None:
    """Bring every stale tensor up to date, in place.

    Raises: WorkerLostError where one cannot be fetched; all of them are as stale as before then.
    """
    if not _records:
        _before.clear()          # what else there was is gone: nothing is behind, so there is nothing to go back to
        return
    with _lock:
        fetched = []
        for record in list(_records.values()):
            try:
                record.session.check_open()
                fetched.append((record, record.session.fetch(record.link, *record.handle)))
            except GenieError as error:
                raise WorkerLostError(
                    f"{len(_records)} parameters and optimizer states live on workers alone, and {record.link.name} "
                    f"cannot be asked for its own ({error}). This process has them as of the last time they were "
                    'synchronised: genie.synchronize(module, lost="rollback") takes that state. To lose less next '
                    "time, call genie.synchronize(module) and save a checkpoint every so many steps",
                    worker=record.link.name) from error
        for record, value in fetched:
            tensor = record.ref()
            if tensor is not None:
                tensor.__class__ = record.plain
                with torch.no_grad():
                    tensor.data.copy_(value)         # .data: it is no edit, the version stays
                record.session.residency.came_home(tensor)
        _records.clear()
        _before.clear()


def rollback() -> None:
    """Take what this process has, the last synchronised state, as the truth."""
    with _lock:
        for record in list(_records.values()):
            tensor = record.ref()
            if tensor is not None:
                tensor.__class__ = record.plain
                del _records[id(tensor)]
                record.session.residency.touch([tensor])
        _records.clear()
        for before in list(_before.values()):
            tensor = before.ref()
            if tensor is not None:
                tensor.data.copy_(before.value)
                before.session.residency.touch([tensor])
        _before.clear()


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """While compiled calls are under way, stale tensors have the class that Dynamo's guards expect."""
    global _depth
    if not _records:
        yield
        return
    with _lock:
        _depth += 1
        for record in _records.values():
            tensor = record.ref()
            if tensor is not None:
                tensor.__class__ = record.plain
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for record in _records.values():
                    tensor = record.ref()
                    if tensor is not None:
                        tensor.__class__ = _STALE[record.plain]


def _before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # The user's hooks run as they are, also in a compiled step, where the guard is lifted.
    if _records and optimizer._optimizer_step_pre_hooks:
        bring_home()


register_optimizer_step_pre_hook(_before_step)
