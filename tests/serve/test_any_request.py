"""Requests that schemathesis makes of a description of the routes: none ends in a 5xx."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from .live import live, options_of, write_files
from .openapi import BODIES, READ, description

EXAMPLES = 30  # requests of each route with drawn values; those at the limits of types come on top
OPTIONS = (
    *("--checks", "not_a_server_error", "--max-examples", EXAMPLES),
    *("--generation-deterministic", "--request-timeout", 120, "--no-color"),
)


@pytest.mark.slow
def test_no_request_breaks_the_server(tmp_path, capfd):
    described = tmp_path / "openapi.json"
    described.write_text(json.dumps(description()))
    files = write_files(tmp_path / "files")
    with live(options_of(*files, "--max-model-len", "60"), admin_key="admin") as served:
        programs = served.server.engine.compiled_programs
        capfd.readouterr()
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", described, "--url", served.url]
            + ["--header", "Authorization: Bearer admin", *map(str, OPTIONS)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        served.settled()
        log = capfd.readouterr().err
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-5000:] + log[-5000:]
        assert "Traceback" not in log  # nor does a stream end in an error of the server
        assert served.server.engine.compiled_programs == programs
    statuses = Counter(re.findall(r"^[A-Z]+ (\S+) (\d+) ", log, re.M))
    assert not [one for one in statuses if one[1] >= "500"]
    for path in (*READ, *BODIES):
        path = path.replace("{name}", "a1")
        assert statuses[path, "200"], f"no request of {path} was answered"
