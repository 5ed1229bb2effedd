"""Launch detection, and collectives over two real processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from improved_diffusion import dist_util, logger

MPIEXEC = str(Path(sys.executable).parent / "mpiexec")
LAUNCH_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "PMI_SIZE",
    *dist_util.MPI_RANK_VARIABLES,
    *dist_util.MPIEXEC_VARIABLES,
)
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"OMPI_ALLOW_RUN_AS_ROOT": "1", "PMIX_MCA_gds": "hash"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "0"}, "torchrun"),
        # mpiexec inside a job, whose helpers MPICH starts with srun
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}, "mpi"),
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "mpi"),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, "mpi"),
        ({**SRUN, "PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1"}, "mpi"),
        # srun with MpiDefault=pmi2 and pmix
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9"}, "srun"),
        ({**SRUN, "PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_RANK": "0"}, ""),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "mpi"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),
    ],
)
def test_launcher_is_found_in_the_order_torchrun_mpi_srun(monkeypatch, environment, expected):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dist_util.launcher() == expected


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[03-05,9],x1", "gpu03"),
        ("node7", "node7"),
        ("a-1,b[2-3]", "a-1"),
        ("r[12]-ib,q", "r12-ib"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist, host):
    assert dist_util.first_host(nodelist) == host


def test_one_process_needs_no_setup():
    assert (dist_util.rank(), dist_util.world_size(), dist_util.local_rank()) == (0, 1, 0)
    assert dist_util.is_main()
    assert dist_util.broadcast_object({"a": 1}) == {"a": 1}
    assert dist_util.max_over_ranks(3, 1) == (3, 1)
    assert logger.mean_over_ranks({"x": 2.0}) == {"x": 2.0}
    dist_util.barrier()


def test_abort_without_setup_imports_neither_torch_nor_mpi():
    code = """
        import sys
        from improved_diffusion import dist_util
        try:
            dist_util.abort(7)
        finally:
            assert not {"torch", "mpi4py"} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == 7


@pytest.mark.slow
def test_a_plain_process_never_imports_mpi():
    code = """
        import sys
        from improved_diffusion import dist_util
        dist_util.setup_dist()
        assert dist_util.world_size() == 1 and "mpi4py" not in sys.modules
        dist_util.abort(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == 3


@pytest.mark.slow
def test_a_foreign_mpiexec_is_an_error_that_says_so(tmp_path):
    code = "from improved_diffusion import dist_util; dist_util.setup_dist()"
    environment = {
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "4",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "4 processes were started, but mpi4py's MPI library sees only itself" in done.stderr


def test_mpiexec_without_an_mpi_library_is_one_line(tmp_path):
    code = """
        from improved_diffusion import dist_util
        from improved_diffusion.script_util import run_main
        run_main(dist_util.setup_dist)
    """
    environment = {"PMI_RANK": "0", "MPI4PY_LIBMPI": str(tmp_path / "libmpi.so"), "PATH": "/bin"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "mpi4py finds no MPI library" in done.stderr and len(done.stderr.splitlines()) == 1


COLLECTIVES = """
    from pathlib import Path

    import torch
    from improved_diffusion import dist_util, logger

    def threads():
        return [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]

    dist_util.setup_dist()
    assert any("gloo" in name for name in threads())
    rank = dist_util.rank()
    assert dist_util.world_size() == 2 and dist_util.local_rank() == rank
    assert dist_util.is_main() == (rank == 0)
    assert torch.get_num_threads() == dist_util.cores() or {torchrun}
    dist_util.barrier()
    assert dist_util.broadcast_object({{"rank": rank}}) == {{"rank": 0}}
    assert dist_util.max_over_ranks(rank, 5 - rank) == (1, 5)
    assert dist_util.all_gather(torch.tensor([rank, 7])).tolist() == [0, 7, 1, 7]
    values = {{"both": rank, "mine": 3.0}} if rank else {{"both": rank}}
    assert logger.mean_over_ranks(values) == {{"both": 0.5, "mine": 3.0}}
    weighted = logger.mean_over_ranks({{"x": float(rank)}}, {{"x": 3 * rank + 1}})
    assert weighted == {{"x": 0.8}}
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(rank)
    ddp = dist_util.wrap_ddp(model)
    assert (model.weight == 0).all()
    ddp(torch.full((1, 2), float(rank))).sum().backward()
    assert (model.weight.grad == 0.5).all()
    dist_util.cleanup()
    assert dist_util.world_size() == 1
    assert not any("gloo" in name for name in threads())  # one at exit can abort the process
    print("fine", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_collectives_of_two_processes(tmp_path, launcher):
    script = tmp_path / "collectives.py"
    script.write_text(textwrap.dedent(COLLECTIVES.format(torchrun=launcher == "torchrun")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = [MPIEXEC, "-n", "2", sys.executable] if launcher == "mpiexec" else torchrun
    done = subprocess.run([*start, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


@pytest.mark.slow
def test_srun_variables_are_enough(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(textwrap.dedent(COLLECTIVES.format(torchrun=True)))
    common = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(dist_util.__file__).parents[1]),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={
                **common,
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
                "SLURM_JOB_ID": str(os.getpid()),
            },
        )
        for i in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
