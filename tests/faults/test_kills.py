"""kill -9 at random moments, at least 20 times a command: what is made in the end is the same."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import jobs
import pytest

KILLS = int(os.environ.get("KILLS", 20))
sys.path.append(str(Path(__file__).parents[1] / "qyolop_jax"))


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything and touched no device."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["jobs", "test_training"])
    return found


def seconds(server, job: str, folder: Path) -> float:
    began = time.perf_counter()
    process = server.Process(target=getattr(jobs, job), args=(folder,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["convert", "store_layers", "speculate", "compress", "regress", "train"]
)
def test_a_job_that_is_killed_at_any_moment_ends_the_same(server, tmp_path, job):
    seconds(server, job, tmp_path / "first")  # compiles, and starts the server
    whole = seconds(server, job, tmp_path / "whole")
    want = jobs.made_by(job, tmp_path / "whole")
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        folder, rounds = tmp_path / "killed", rounds + 1
        assert rounds < 3 * KILLS
        while True:
            process = server.Process(target=getattr(jobs, job), args=(folder,))
            process.start()
            process.join(rng.uniform(0.05, 1) * whole)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            if kills % 5 == 0:  # each fifth time it may go on to its end
                assert seconds(server, job, folder) > 0
                break
        assert jobs.made_by(job, folder) == want
        left = [path for path in folder.rglob(".*.*.*") if path.name.split(".")[-2].isdecimal()]
        assert len(left) <= 1, left  # what was being written when it was killed the last time
        shutil.rmtree(folder)
