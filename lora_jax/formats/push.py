"""Upload of exported directories to the Hugging Face hub."""

from pathlib import Path

from lora_jax.errors import UserError


def check_repository(name: str) -> None:
    """Check that a repository can have this name.

    Raises:
        UserError: a malformed name, or one without an owner.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        problem = "" if "/" in name else "the owner is missing"
    except HFValidationError as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise UserError(f"--push-to-hub {name}: give ORG/NAME, as in me/my-adapter: {problem}")


def push(directory: Path, name: str, private: bool, message: str) -> str:
    """Upload a directory to a model repository and return its URL.

    A new repository is created if there is none; `private` has no effect on an existing one.

    Raises:
        UserError: no network, no token, or a token without permission. The directory stays, and the
            error names it.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise _failed(directory, name, "HF_HUB_OFFLINE is set; unset it to reach the hub")
    if get_token() is None:
        raise _failed(directory, name, "there is no token; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="lora_jax")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = _first_line(error)
        if status in (401, 403):
            reason = f"the token may not write there ({reason})"
        raise _failed(directory, name, reason) from error
    except Exception as error:  # httpx, OS and hub errors alike: no network, no such host, timeouts
        raise _failed(
            directory, name, f"the hub cannot be reached: {_first_line(error)}"
        ) from error
    return str(address)


def _failed(directory: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{name} was not uploaded: {reason}\nThe export is complete in {directory}; upload it with "
        f"`hf upload {name} {directory}`"
    )


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
