"""Who belongs to a run on several hosts, from the environment; and what one process does."""

import os
import re
import signal
import time

import pytest

from lora_jax import config as configs
from lora_jax import hosts
from lora_jax.config import HostsConfig
from lora_jax.errors import UserError
from lora_jax.train.interrupt import Interrupted, catch

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}
ALL = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
FOUND_BY_JAX = {
    "coordinator_address": None,
    "num_processes": None,
    "process_id": None,
    "cluster_detection_method": None,
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        {**ALL, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        SLURM | {"SLURM_NTASKS": "1"},
        {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")},  # inside sbatch, no srun
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # no TPU here
    ],
)
def test_one_process_is_left_alone(environment):
    assert hosts.find_cluster(environment) is None


@pytest.mark.parametrize(
    "environment",
    [SLURM, MPI, {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}]
    + [{"TPU_ML_PLATFORM": "JAX"}],
)
def test_launchers_that_jax_knows(environment):
    assert hosts.find_cluster(environment) == FOUND_BY_JAX


def test_what_is_given_comes_first_and_the_launcher_gives_the_rest():
    given = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    expected = {**given, "cluster_detection_method": "deactivate"}
    assert hosts.find_cluster(ALL) == hosts.find_cluster(SLURM | ALL) == expected
    address = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
    expected = FOUND_BY_JAX | {"coordinator_address": "10.0.0.1:1234"}
    assert hosts.find_cluster(SLURM | address) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "without JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (ALL | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' must be a whole number"),
        (ALL | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be from 0 to 1"),
        (ALL | {"JAX_COORDINATOR_ADDRESS": "a"}, "JAX_COORDINATOR_ADDRESS='a' must be host:port"),
    ],
)
def test_mistakes_in_the_environment_are_told(environment, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        hosts.find_cluster(environment)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 1),
        ({}, None),
    ],
)
def test_processes_of_one_machine(environment, count):
    assert hosts._tasks_here(environment) == count


def test_one_process_decides_alone():
    with hosts.joined(HostsConfig()):
        assert hosts.is_main() and hosts.agree(3) == 3
        assert hosts.from_main(lambda: (1, 2)) == (1, 2)  # not through JSON
    with pytest.raises(KeyError), hosts.joined(HostsConfig()):
        raise KeyError
    assert not hosts.failed()
    hosts.leave(1)  # this process goes on


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output_dir=gs://bucket/run", "output_dir='gs://bucket/run' is no directory"),
        ("checkpoint_dir=s3://bucket/run", "checkpoint_dir='s3://bucket/run': checkpoints can be"),
        ("hosts.lost_after=1", "hosts.lost_after=1 must be at least 5"),
        ("hosts.start_timeout=0", "hosts.start_timeout=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(override, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        configs.parse({"model": "m"}, [override])


def test_hosts_that_work_together_stop_in_check_alone():
    others = [0, 0, 15]
    seen = []

    def agree(number):
        seen.append(number)
        return max(number, others.pop(0))

    with catch(agree) as signals, signals.held():
        signals.check()
        with signals.free():  # checks once
            pass
        with pytest.raises(Interrupted, match="SIGTERM") as raised:  # another host's
            signals.check()
    assert raised.value.status == 0 and seen == [0, 0, 0]
    others = [0, 0]
    with catch(agree) as signals, signals.held(), signals.free():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # it waits, as the others know nothing of it
        with pytest.raises(Interrupted) as raised:
            signals.check()
    assert raised.value.status == 130
