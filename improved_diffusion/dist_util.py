"""Launchers, ranks and collectives: alone in knowing MPI, torchrun, srun and torch.distributed.

Everything works without `setup_dist` too, as one process with rank 0; torch is imported only by
functions that compute something.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

# Other ranks wait while rank 0 does work of its own: above the longest such work.
COLLECTIVE_TIMEOUT = timedelta(hours=12)
JOIN_TIMEOUT = timedelta(minutes=30)  # from the first rank's start to the last one's
LONG_WAIT_S = 600.0  # from then on a rank that waits for the others says so

# MPI_Abort can be quicker than mpiexec's forwarding of what the failing rank just printed.
LAST_WORDS_S = 1.0

# Set for every process by the launcher; OMPI_* and PMIX_* also hold settings a user exports.
MPI_RANK_VARIABLES = ("PMI_RANK", "PMI_ID", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
MPI_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# Set by an mpiexec (MPICH's and Intel's, Open MPI's), and not by srun's PMI plug-ins.
MPIEXEC_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_RANK")


@dataclass
class _World:
    """This process among all; `mpi` is the MPI communicator where MPI was started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cores: int = 1
    mpi: Any = None
    started: bool = False
    wrapped: list[Any] = field(default_factory=list)  # what wrap_ddp made


_world = _World()


def launcher() -> str:
    """What started this process: "torchrun", "mpi", "srun", or "" for a plain process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "torchrun"
    if any(name in os.environ for name in MPI_RANK_VARIABLES) and not _ranks_are_of_srun():
        return "mpi"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return "srun"
    return ""


def _ranks_are_of_srun() -> bool:
    """Whether MPI's rank variables repeat srun's own, as with MpiDefault=pmi2 or pmix."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" not in env or any(name in env for name in MPIEXEC_VARIABLES):
        return False
    ranks = {env[name] for name in MPI_RANK_VARIABLES if name in env}
    sizes = {env.get("PMI_SIZE", env["SLURM_STEP_NUM_TASKS"])}
    return ranks == {env.get("SLURM_PROCID")} and sizes == {env["SLURM_STEP_NUM_TASKS"]}


def launch_command() -> str:
    """What stands before the script's name in a command that starts as many processes."""
    kind, ranks = launcher(), _world.size
    if kind == "mpi":
        return f"mpiexec -n {ranks} python"
    if kind == "srun":
        return f"srun --mpi=none -n {ranks} --wait=5 python"
    if kind == "torchrun":
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        nodes = "--standalone" if per_node == ranks else f"--nnodes={ranks // per_node}"
        return f"torchrun {nodes} --nproc_per_node={per_node}"
    return "python"


def setup_dist(timeout: timedelta | None = None) -> None:
    """Find this process's rank and join the others; call once, before any other function here.

    timeout: how long ranks wait for each other before they fail (None: COLLECTIVE_TIMEOUT).

    Raises ValueError under an mpiexec that mpi4py's MPI library does not belong to, and where mpi4py
    finds no MPI library.
    """
    import torch

    if _world.started:
        return
    _world.cores = len(_usable_cores())
    kind = launcher()
    join = {"torchrun": _join_torchrun, "mpi": _join_mpi, "srun": _join_srun}.get(kind)
    store = join() if join else None
    _world.started = True
    if kind == "mpi" and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(_world.cores)  # under mpiexec torch sees one core per rank
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    if _world.size > 1:
        # Its functions keep the group of the time of their import as a default argument: imported
        # later, by DistributedDataParallel, they would keep it and its threads past `cleanup`.
        import torch.distributed.nn.functional

        with collective("joining the other ranks"):
            torch.distributed.init_process_group(
                backend="nccl" if torch.cuda.is_available() else "gloo",
                store=store,
                rank=_world.rank,
                world_size=_world.size,
                timeout=timeout or COLLECTIVE_TIMEOUT,
            )


def _join_torchrun() -> Any:
    env = os.environ
    _world.rank, _world.size = int(env["RANK"]), int(env["WORLD_SIZE"])
    _world.local_rank = int(env.get("LOCAL_RANK", 0))
    _world.cores = max(1, _world.cores // int(env.get("LOCAL_WORLD_SIZE", 1)))
    if _world.size == 1:
        return None
    import torch

    return next(torch.distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))[0]


def _join_mpi() -> Any:
    """Ranks from MPI; rank 0 opens the rendezvous on a free port and tells the others over MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "started by mpiexec, but mpi4py finds no MPI library: set MPI4PY_LIBMPI to the one of "
            f"this mpiexec, or pip install mpich ({str(error).splitlines()[0]})"
        ) from None
    comm = MPI.COMM_WORLD
    launched = next((int(os.environ[name]) for name in MPI_SIZE_VARIABLES if name in os.environ), 1)
    if comm.size == 1 and launched > 1:
        raise ValueError(
            f"{launched} processes were started, but mpi4py's MPI library sees only itself: "
            "use its own mpiexec, or point MPI4PY_LIBMPI at this mpiexec's library, or use torchrun"
        )
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = node.allgather(_usable_cores())
    share = len(set().union(*cores)) // node.size
    _world.mpi, _world.rank, _world.size = comm, comm.rank, comm.size
    _world.local_rank, _world.cores = node.rank, max(1, min(_world.cores, share))
    if comm.size == 1:
        return None
    if comm.rank == 0:
        host = "127.0.0.1" if node.size == comm.size else socket.gethostname()
        store = _store(host, 0)
        comm.bcast((host, store.port))
        return store
    return _store(*comm.bcast(None))


def _join_srun() -> Any:
    env = os.environ
    _world.rank, _world.size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    _world.local_rank = int(env.get("SLURM_LOCALID", 0))
    host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
    port = env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 10000
    return _store(host, int(port))


def _store(host: str, port: int) -> Any:
    """The rendezvous: rank 0 serves it (port 0: a free one), the others connect."""
    import torch

    return torch.distributed.TCPStore(
        host, port, _world.size, _world.rank == 0, JOIN_TIMEOUT, wait_for_workers=False
    )


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[03-05,9],x1" gives "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r} names no host: set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _usable_cores() -> set[int]:
    """The cores this process may run on; where the system does not say (macOS), all of them."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def rank() -> int:
    """This process's number, 0 when alone."""
    return _world.rank


def world_size() -> int:
    """The number of processes, 1 when alone."""
    return _world.size


def local_rank() -> int:
    """This process's number on its machine."""
    return _world.local_rank


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and talks to the user."""
    return _world.rank == 0


def cores() -> int:
    """CPU cores for this rank: an equal share of the machine's among its ranks."""
    return _world.cores if _world.started else len(_usable_cores())


def dev() -> torch.device:
    """The device to compute on: the GPU numbered like the rank on its machine, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", _world.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def collective(what: str) -> Iterator[None]:
    """Around code that waits for other ranks: a long wait, or a failure, is told with `what`."""
    if _world.size == 1:
        yield
        return
    began = time.monotonic()
    waiting = "rank %d of %d has waited %.0f s for another rank in: %s"
    numbers = (_world.rank, _world.size)
    timer = threading.Timer(LONG_WAIT_S, logger.warning, (waiting, *numbers, LONG_WAIT_S, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError:
        took = time.monotonic() - began
        logger.error("rank %d of %d failed after %.0f s in: %s", *numbers, took, what)
        raise
    finally:
        timer.cancel()


def barrier(what: str = "a barrier") -> None:
    """Wait until all ranks are here."""
    max_over_ranks(0, what=what)


def broadcast_object(value: Value, *, what: str = "a broadcast") -> Value:
    """Rank 0's `value` (anything that pickles) on every rank."""
    if _world.size == 1:
        return value
    import torch

    box = [value]
    with collective(what):
        torch.distributed.broadcast_object_list(box, src=0, device=dev())
    return box[0]


def gather_objects(value: Value, *, what: str = "a gathering") -> list[Value]:
    """Every rank's `value` (anything that pickles), in order of ranks, on every rank."""
    if _world.size == 1:
        return [value]
    import torch

    gathered = [value] * _world.size
    with collective(what):
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def hosts() -> list[str]:
    """The host name of every rank. All ranks must call."""
    return gather_objects(socket.gethostname(), what="the names of the hosts")


def all_gather(values: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape [N, ...] from every rank: [world_size * N, ...]."""
    if _world.size == 1:
        return values
    import torch

    parts = [torch.empty_like(values) for _ in range(_world.size)]
    with collective("a gathering of tensors"):
        torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def max_over_ranks(*values: int, what: str = "a maximum over ranks") -> tuple[int, ...]:
    """The largest of each integer over the ranks."""
    if _world.size == 1:
        return values
    import torch

    box = torch.tensor(values, device=dev())
    with collective(what):
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return tuple(box.tolist())


def take_max_over_ranks(values: Tensor, *, what: str = "a maximum over ranks") -> None:
    """Put the largest of each element over the ranks into `values`.

    On a GPU that is one more thing for it to do: the host does not wait.
    """
    if _world.size == 1:
        return
    import torch

    with collective(what):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """`model` with rank 0's parameters and gradients averaged over ranks; itself when alone."""
    if _world.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    device = dev()
    with collective("the broadcast of the parameters"):
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # else each gradient is there twice, and copied
        )
    _world.wrapped.append(wrapped)
    return wrapped


def without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it, backward passes of what `wrap_ddp` made leave gradients to this rank alone."""
    if any(model is wrapped for wrapped in _world.wrapped):
        return model.no_sync()  # type: ignore[operator]
    return contextlib.nullcontext()


def cleanup() -> None:
    """Leave the other ranks in an orderly way, at the end of the run; ends `wrap_ddp`'s modules.

    The group's threads end here. One that still let go of a tensor while the interpreter shuts down
    would be ended inside C++, which aborts a process whose work is done.
    """
    if _world.started and _world.size > 1:
        import torch

        # Whoever still holds one would keep the group and its threads.
        for module in _world.wrapped:
            del module.process_group, module.reducer, module.logger
        torch.distributed.destroy_process_group()
    _world.__dict__.update(_World().__dict__)


def abort(code: int) -> NoReturn:
    """End this process, and under MPI all ranks, at once: the others may be waiting for this one.

    torchrun ends its other processes by itself; srun does with --wait=5.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _world.mpi is not None:
        time.sleep(LAST_WORDS_S)
        _world.mpi.Abort(code)
    if _world.started:
        os._exit(code)  # interpreter shutdown would wait for data workers and pending collectives
    sys.exit(code)


def array_task() -> int | None:
    """SLURM_ARRAY_TASK_ID, or None outside of array jobs; ValueError where it is no number."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return None
    if not task.isdigit():
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID={task!r} is not a number: unset it or give the batch's index"
        )
    return int(task)
