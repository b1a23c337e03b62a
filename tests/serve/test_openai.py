"""The client of OpenAI, in the installed version and in the major version before it."""

import threading

import pytest

from .fetched import fetch, run
from .live import live, options_of, write_files
from .openai_client import ADMIN_KEY, BREAKS, CHECKS, KEY, LARGE, open_client

# openai 3 needs no distro any more.
OLDER = ("openai==2.54.0", "distro==1.9.0")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server whose streams with the seed `BREAKS` end in an error."""
    import lora_jax.serve.answers as answers

    own = answers.Form.last_chunks

    def last_chunks(form):
        if form.asked.request.seed == BREAKS:
            raise RuntimeError("broken on purpose")
        return own(form)

    files = write_files(tmp_path_factory.mktemp("files"))
    settings = dict(api_key=KEY, admin_key=ADMIN_KEY, max_body=LARGE)
    with pytest.MonkeyPatch.context() as patch, live(options_of(*files), **settings) as found:
        patch.setattr(answers.Form, "last_chunks", last_chunks)
        yield found


@pytest.fixture(autouse=True)
def no_row_is_left(served):
    yield
    served.settled()


@pytest.mark.parametrize("name", CHECKS)
def test_installed_version(served, name):
    with open_client(served.url) as client:
        CHECKS[name](client)


def test_a_closed_stream_frees_its_row(served, monkeypatch):
    """Steps are slow, and most tokens of the stream are never made."""
    made, own = [], served.server.engine.step

    def step():
        threading.Event().wait(0.3)
        events = list(own())
        made.extend(token for event in events for token in event.tokens)
        return events

    monkeypatch.setattr(served.server.engine, "step", step)
    with open_client(served.url) as client:
        CHECKS["closed_stream"](client)
    served.settled()
    assert 0 < len(made) < 60  # of 90


@pytest.mark.slow
def test_major_version_before(served):
    """The same checks; the older version is in a directory of its own, first on the path."""
    found = run("openai_client.py", fetch(*OLDER), served.url)
    assert found["version"] == OLDER[0].partition("==")[2]
    assert found["checks"] == [*CHECKS]
