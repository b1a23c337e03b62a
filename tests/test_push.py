"""`export --push-to-hub`: what is sent to the hub, and what is said when it cannot be."""

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from lora_jax.cli import main
from lora_jax.errors import UserError
from lora_jax.formats import push
from lora_jax.train import export


@pytest.fixture
def written(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "README.md").write_text("card")
    return directory


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the hub's client, which `fails` may end."""
    calls, fails = [], {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, name, **options):
            calls.append(("create_repo", name, options))
            if "create" in fails:
                raise fails["create"]
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))
            if "upload" in fails:
                raise fails["upload"]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return calls, fails


def refusal(status):
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return errors.HfHubHTTPError(f"{status} for url\n\nmore", response=response)


def test_what_is_sent(written, hub):
    calls, _ = hub
    assert push.push(written, "me/mine", True, "a message") == "https://huggingface.co/me/mine"
    options = {"repo_id": "me/mine", "folder_path": written, "commit_message": "a message"}
    assert calls == [
        ("create_repo", "me/mine", {"private": True, "exist_ok": True}),
        ("upload_folder", options),
    ]


@pytest.mark.parametrize("place", ["create", "upload"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(401), "the token may not write there (401 for url)"),
        (refusal(403), "the token may not write there (403 for url)"),
        (refusal(500), "500 for url"),
        (ConnectionError("name resolution failed"), "the hub cannot be reached: name resol"),
        (OSError(), "the hub cannot be reached: OSError"),
    ],
)
def test_what_fails_says_where_the_export_is(written, hub, place, error, expected):
    hub[1][place] = error
    with pytest.raises(UserError) as raised:
        push.push(written, "me/mine", True, "m")
    message = str(raised.value)
    assert message.startswith("me/mine was not uploaded: ") and expected in message
    assert f"The export is complete in {written}" in message and len(message.splitlines()) == 2
    assert (written / "README.md").read_text() == "card"


def test_without_a_token_or_offline_nothing_is_tried(written, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token; run `hf auth login`"):
        push.push(written, "me/mine", True, "m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push.push(written, "me/mine", True, "m")
    assert not hub[0]


def test_a_hub_that_is_not_there(written, monkeypatch):
    """The real client, against an address that nothing answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    with pytest.raises(UserError, match="me/mine was not uploaded: the hub cannot be reached: "):
        push.push(written, "me/mine", True, "m")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/a b", "me/-x", "me/x--y", "", "me/x.git"])
def test_names_that_no_repository_has(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "export_run", lambda *_: pytest.fail("it was exported"))
    command = ["export", "--run", "x", "--format", "peft", "--output", str(tmp_path / "out")]
    assert main([*command, "--push-to-hub", name]) == 2
    assert f"--push-to-hub {name}: give ORG/NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "private", "message"),
    [
        ([], True, "Upload mine by lora_jax"),
        (["--private"], True, "Upload mine by lora_jax"),
        (["--no-private", "--commit-message", "first"], False, "first"),
    ],
)
def test_the_command(tmp_path, capsys, monkeypatch, options, private, message):
    done = []
    monkeypatch.setattr(export, "export_run", lambda *arguments: done.append("export"))
    monkeypatch.setattr(push, "push", lambda *arguments: done.append(arguments) or "ADDRESS")
    output = tmp_path / "out"
    command = ["export", "--run", str(tmp_path / "mine"), "--format", "peft"]
    command += ["--output", str(output), "--push-to-hub", "me/mine"]
    assert main([*command, *options]) == 0
    assert done == ["export", (output, "me/mine", private, message)]
    assert capsys.readouterr().out == f"written to {output}\nuploaded to ADDRESS\n"
