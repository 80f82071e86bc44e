"""The processes that train together, as ``torchrun`` started them; torch's process groups do the transport."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloop.errors import ProcessError, mute_warnings
from fluxloop.processes.agree import Agreement
from fluxloop.processes.watch import Watcher, prefixed, watched

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # whose public name has no types
    from torch.distributed.device_mesh import DeviceMesh

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
"""Which of torch's backends carry the tensors of a device; objects are sent from the host."""


class Group:
    """The processes that train together.

    There is one in a process, and none where a process trains alone: `current` returns it.

    Args:
        process_group: Torch's, of all processes.
        device: Where this process computes.
        watcher: Watches the others, and tells them of this one.

    Attributes:
        rank: The number of this process, from 0.
        size: How many processes there are.
        is_main: Whether this is the first process, which alone prints and writes.
        messages: How often something was sent, or was about to be.
        agreement: What the processes agree on while they train.
        spare: Whether the running step repeats rows, because this process has run out of others and all have to take
            part in each step: its rows count nothing. Who gives the batch sets it before the step.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, watcher: Watcher | None = None) -> None:
        self._process_group: dist.ProcessGroup | None = process_group
        self.device = device
        self.watcher = watcher
        self.messages = 0
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.is_main = self.rank == 0
        self.spare = False
        self._end = "a process has failed"
        mute_warnings(not self.is_main)
        self.agreement = Agreement(self)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Torch's process group of all processes.

        Raises:
            ProcessError: A process has failed, or the group has ended for one that has.
        """
        if self.watcher is not None:
            self.watcher.check()
        self.messages += 1
        if self._process_group is None:
            raise ProcessError(f"{self.ended}: nothing is sent between the processes any more")
        return self._process_group

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Torch's mesh of all processes, in a line: a sharded tensor over it has a part in each."""
        from torch.distributed.device_mesh import DeviceMesh  # takes a while, and most trainings need none

        return DeviceMesh.from_group(self.process_group, self.device.type)

    @property
    def ended(self) -> str | None:
        """Why the group has ended, for people; None while it has not."""
        if self._process_group is not None:
            return None
        return (self.watcher.failure if self.watcher is not None else None) or self._end

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Return the group itself: a copied learner trains with the same processes."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "the group of processes was to be pickled, which says nothing in another process; expected a learner's "
            "state: learner.state_dict()"
        )

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Add up a tensor over all processes, in place (or "max", "min").

        Args:
            tensor: Of one shape and type on all processes, on the group's device.
            op: What is done with the numbers.

        Returns:
            The tensor.
        """
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group=self.process_group)
        return tensor

    def broadcast(self, thing: Any, source: int = 0) -> Any:
        """Return what one process has, on all processes; anything that can be pickled."""
        things = [thing if self.rank == source else None]
        dist.broadcast_object_list(things, src=source, group=self.process_group)
        return things[0]

    def gather_objects(self, thing: Any) -> list[Any]:
        """Return what each process has, in the order of their numbers; anything that can be pickled."""
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.process_group)
        return things

    def wait(self) -> None:
        """Wait until all processes have come here."""
        dist.barrier(group=self.process_group)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the other processes, and let them watch this one, while a training runs inside; an error ends all.

        Raises:
            ProcessError: Another process has failed; names it, and what happened.
        """
        if self.ended is not None:
            raise ProcessError(f"{self.ended}, and the group has ended; expected a new start of all: torchrun ...")
        if self.watcher is None:
            yield
            return
        with watched(self.watcher, self.leave):
            yield

    def leave(self) -> None:
        """Leave for good after an error: what the others wait for from this process fails at once."""
        self._release()
        if dist.is_initialized() and self.device.type != "cuda":  # NCCL would wait for those that are gone
            dist.destroy_process_group()

    def leave_at_exit(self, destroy: bool) -> None:
        """Leave because this process ends well; the others have sent all that this one waits for.

        Gloo's threads end with the last reference to the process group. One that drops a tensor while Python takes
        itself apart would have the process abort, with "terminate called without an active exception".

        Args:
            destroy: Whether the process group is destroyed, rather than left to the script, which has initialised it.
        """
        self._end = "this process is ending"
        self._release()
        if destroy and dist.is_initialized():
            dist.destroy_process_group()

    def _release(self) -> None:
        """Hold torch's process group no longer: it closes its connections with the last reference."""
        vars(self).pop("mesh", None)
        self._process_group = None


_current: Group | None = None
_own = False
"""Whether the process group was initialised here."""


def current() -> Group | None:
    """Return the group of this process; None where it trains alone."""
    return _current


def started_by_torchrun() -> bool:
    """Return whether this is one of several processes that ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_rank() -> int | None:
    """Return the number of this process among those that ``torchrun`` started on this machine; None of one alone."""
    return int(os.environ["LOCAL_RANK"]) if are_several() and "LOCAL_RANK" in os.environ else None


def are_several() -> bool:
    """Return whether several processes train: ``torchrun`` started them, or the script has initialised their group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return started_by_torchrun()


def join(device: torch.device, timeout: timedelta | None = None) -> Group:
    """Join the processes that ``torchrun`` started; once joined, the same group is returned.

    A process group that the script has initialised is used as it is.

    Args:
        device: Where this process computes.
        timeout: How long one process waits for another; left out, torch's (30 minutes on the CPU).

    Raises:
        ValueError: Nothing carries tensors of this device, or the environment does not say where to meet.
        ProcessError: A process of the group has failed.
    """
    global _current, _own
    if _current is not None and _current.ended is not None:
        raise ProcessError(f"{_current.ended}, and the group has ended; expected a new start of all: torchrun ...")
    if _current is not None and dist.is_initialized():
        return _current
    if device.type not in BACKENDS:
        raise ValueError(
            f"device={str(device)!r} was given, and several processes cannot train there; expected Accelerator('cpu') "
            "or GPUs, or one process: python instead of torchrun, or Accelerator(strategy='none')"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _own = not dist.is_initialized()
    # Its functions keep the group that there is when they are imported, as a default argument (torch 2.13). DTensor
    # imports them: without this, its import in a training would keep a destroyed group, and gloo's threads
    import_module("torch.distributed.nn.functional")
    if _own:
        rank, size, store = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _open_store(timeout)
        store = prefixed(f"fluxloop/{_meet(store, rank, size)}", store)
        watcher: Watcher | None = Watcher(store, rank, size)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        own_store = _torchs_store()
        rank, size = dist.get_rank(), dist.get_world_size()
        watcher = None if own_store is None else Watcher(prefixed("fluxloop", own_store), rank, size)
        dist.barrier()  # nobody looks at another who is not yet there
    world = dist.group.WORLD
    if world is None:  # for type checkers: it is there once it was initialised
        raise ProcessError("torch.distributed has no process group after it was initialised")
    if _current is None:
        atexit.register(_leave_at_exit)
    _current = Group(world, device, watcher)
    return _current


def _open_store(timeout: timedelta | None) -> Store:
    """Connect to the store where the processes meet; the first one opens it, unless ``torchrun`` has.

    Raises:
        ValueError: The environment does not say where it is.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, and {' and '.join(missing)} not; expected a start by torchrun, which sets "
            "all of them: torchrun --nproc-per-node 2 script.py. To train alone: unset WORLD_SIZE, or "
            "Accelerator(strategy='none')"
        )
    hosts = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it without saying so
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=hosts,
        wait_for_workers=False,
        multi_tenant=True,
        **options,
    )
    return store


def _meet(store: Store, rank: int, size: int) -> str:
    """Agree on a name for this start of the processes, and return it.

    The store of ``torchrun`` outlives a restart, and what the processes of an earlier attempt wrote is still in it:
    one that is early would meet those that are gone. The count of restarts tells attempts apart on one machine alone,
    as each machine counts its own failures. So the first process names the start, and tells it to each of the others
    under a name of that one's own.

    Raises:
        ProcessError: Some do not come; says which.
    """
    own = uuid4().hex
    if rank:
        store.set(f"here/{rank}", own)
        start: str = store.get(f"welcome/{own}").decode()  # waits
        store.add(f"{start}/came", 1)
        return start
    welcomed = dict.fromkeys(range(1, size), "")
    deadline = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]  # it is there
    while store.add(f"{own}/came", 0) < size - 1:
        for other, known in welcomed.items():
            found = store.get(f"here/{other}").decode() if store.check([f"here/{other}"]) else ""
            if found != known:
                store.set(f"welcome/{found}", own)
                welcomed[other] = found
        if time.monotonic() > deadline:
            missing = [other for other, known in welcomed.items() if not known]
            raise ProcessError(
                f"{size} processes were to train together (WORLD_SIZE), and {missing or 'some'} have not come; were "
                "all of them started, and can they reach MASTER_ADDR?",
                missing,
            )
        time.sleep(0.02)
    return own


def _torchs_store() -> Store | None:
    """Return the store of a process group that the script has initialised; None where this torch does not tell it."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)  # torch has no public name for it
    return None if get is None else get()


def _leave_at_exit() -> None:
    """Leave when the process ends, whatever way: without it torch may count a finished run as failed."""
    group = _current
    if group is None:
        return
    failed = group.ended is not None
    if group.watcher is not None:
        failed = failed or group.watcher.failure is not None
        group.watcher.close()
        hosts = _own and group.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if hosts and not failed:
            group.watcher.wait_for_others()
    if not (failed and group.device.type == "cuda"):  # NCCL would wait for those that are gone
        group.leave_at_exit(destroy=_own)
