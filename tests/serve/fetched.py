"""Clients that the environment of the tests lacks: packages in a directory of their own."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_jax.cache import cache_directory


def fetch(*requirements):
    """The directory of these packages, without what they depend on. The first call fetches them
    with pip into the cache directory (`LORA_JAX_CACHE`, or the user's); later ones need no network.
    """
    text = "\n".join([sys.implementation.cache_tag, *sorted(requirements)])
    directory = cache_directory() / "clients" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as partial:
        install(requirements, Path(partial) / "packages", directory)
        try:
            (Path(partial) / "packages").rename(directory)
        except OSError:
            assert directory.is_dir()  # another process was first
    return directory


def install(requirements, target, kept):
    """Install packages into a directory; the error names those that are missing."""
    options = "--no-deps --quiet --disable-pip-version-check --no-input --retries 2".split()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, *requirements],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    reason = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
    raise AssertionError(
        f"cannot fetch {', '.join(requirements)}: `{sys.executable} -m pip install` said: "
        f"{reason[-1]}\n{kept} does not hold them, and a package index is needed to fetch them "
        f"once. Set LORA_JAX_CACHE to a cache directory that has them."
    )


def run(script, packages, *arguments, job=None):
    """JSON that a script of this directory prints last. It imports `packages` before what is
    installed, and reads `job` from its input.
    """
    done = subprocess.run(
        # -P: the modules of this directory hide none of the packages.
        [sys.executable, "-P", Path(__file__).with_name(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
