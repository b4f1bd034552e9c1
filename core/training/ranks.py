"""The processes of a run: how this one finds the others, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain.contracts.platform import Platform, SharesMachine
from drivetrain.errors import ConfigError, DrivetrainError, RankLostError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

_Result = TypeVar("_Result")

_MEET_SECONDS = 300.0
"""How long ranks may take to come together, at least."""

_HANDED_OVER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun's agent tells each process that it starts. It is the agent's protocol, not a configuration of ours."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    local_rank: among those of this machine; it is the index of the device.
    mesh:       all ranks along the axis ``data``; None when this process is alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | torch.Tensor) -> tuple[float, ...]:
        """The sum of each of the values over ranks."""
        import torch
        import torch.distributed as dist

        if self.mesh is None:
            return tuple(float(value) for value in values)
        device = self.mesh.device_type
        summed = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        dist.all_reduce(summed, group=self.mesh.get_group())
        return tuple(summed.tolist())

    def of_first(self, value: _Result) -> _Result:
        """What rank 0 gives, on every rank."""
        import torch.distributed as dist

        told = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(told, group=self.mesh.get_group(), group_src=0)
        return told[0]

    def gather(self, value: _Result) -> list[_Result]:
        """What each rank gives, on every rank."""
        import torch.distributed as dist

        if self.mesh is None:
            return [value]
        told: list[_Result] = [value] * self.world_size
        dist.all_gather_object(told, value, group=self.mesh.get_group())
        return told

    def together(self, what: str, work: Callable[[], _Result]) -> _Result:
        """Do ``work`` on every rank; when it fails on one, all of them raise, so that none is left waiting.

        A rank raises its own error, and the others a TrainingError that tells of the first rank that failed.
        """
        if self.mesh is None:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # handed on below, once the other ranks know of it
            failure = error
        told = self.gather(None if failure is None else _sentence(failure))
        if failure is not None:
            raise known_to_all(failure)
        failed = next((rank for rank, text in enumerate(told) if text is not None), None)
        if failed is not None:
            raise known_to_all(TrainingError(f"{what} failed: {told[failed]}", where=f"rank {failed}"))
        return result


_Error = TypeVar("_Error", bound=BaseException)


def known_to_all(error: _Error) -> _Error:
    """``error``, marked as one that every rank raises, so that rank 0 alone may tell of it."""
    error.__dict__["is_known_to_all"] = True
    return error


def is_known_to_all(error: BaseException) -> bool:
    return bool(error.__dict__.get("is_known_to_all"))


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, DrivetrainError) else f"{type(error).__name__}: {error}"


def started_by_agent() -> bool:
    """Whether torchrun's agent, or something that speaks its protocol, has started this process as one of several."""
    return all(name in os.environ for name in _HANDED_OVER)


def agent_rank() -> int:
    """This process's rank as the agent has told it; 0 for a process on its own."""
    return int(os.environ["RANK"]) if started_by_agent() else 0


def local_rank() -> int:
    """The number among the processes that the agent has started on this machine; 0 for a process on its own."""
    return int(os.environ["LOCAL_RANK"]) if started_by_agent() else 0


def num_machines() -> int:
    """Machines that take part, as the agent has told it; 1 for a process on its own."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) if started_by_agent() else 1


def open_platform(platform: Platform) -> Platform:
    """Open this process's own device, and return the platform."""
    if isinstance(platform, SharesMachine):
        platform.take_device(local_rank())
    platform.activate()
    return platform


@contextmanager
def known_to_all_ranks() -> Iterator[None]:
    """What is raised within is raised by every rank alike, so that rank 0 alone tells of it."""
    try:
        yield
    except DrivetrainError as error:
        known_to_all(error)
        raise


@contextmanager
def joined_ranks(device: torch.device, collective: str, timeout_seconds: float) -> Iterator[Ranks]:
    """Join the other processes of the run, and leave them in the end.

    A process group that exists already is used as it is, and left open. Raises ConfigError when the group can't be
    made, and RankLostError when another rank is lost, within too.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield _ranks(device)
        return
    if not started_by_agent():
        yield Ranks()
        return
    try:
        # Ranks start far apart where a machine has much to do: they have longer to meet than to make a step.
        to_meet = timedelta(seconds=max(timeout_seconds, _MEET_SECONDS))
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=to_meet)))
        store = dist.PrefixStore("training", store)
        store.get(_first_to_last(store, world_size))
        dist.init_process_group(
            collective, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
        )
    except (RuntimeError, ValueError) as error:
        if _tells_of_a_lost_rank(error):
            raise RankLostError(f"the ranks did not meet: {error}") from error
        raise ConfigError(
            f"the ranks could not be joined: {error}", where=f"collective library {collective}"
        ) from error
    try:
        yield _ranks(device)
    except Exception as error:
        if not _tells_of_a_lost_rank(error):
            raise
        raise RankLostError(
            f"another rank is gone, or made no progress for {timeout_seconds:g} s",
            where=f"rank {dist.get_rank()} of {dist.get_world_size()}",
            hint="Start the run again: it goes on from its newest saved state.",
        ) from error
    finally:
        dist.destroy_process_group()


def _first_to_last(store: Any, world_size: int) -> str:
    """A key that is there once every rank has asked for it."""
    if store.add("came", 1) == world_size:
        store.set("all came", "yes")
    return "all came"


_LOST_WORDS = ("gloo", "pair closure", "closed by peer", "reset by peer", "broken pipe", "timed out waiting")
"""What errors of Gloo have in their text: most begin with the file of its source that raised them, but not all."""


def _tells_of_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective has failed. Gloo raises nothing more special than a RuntimeError, known by its words."""
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if type(seen) is RuntimeError and any(words in str(seen).lower() for words in _LOST_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _ranks(device: torch.device) -> Ranks:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    world_size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",)) if world_size > 1 else None
    return Ranks(dist.get_rank(), world_size, local_rank(), mesh)
