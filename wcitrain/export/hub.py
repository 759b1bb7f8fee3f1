"""A folder on a Hugging Face hub: what would refuse it is found before anything is written."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

TIMEOUT = 4.0  # seconds until a hub that does not answer is given up


def check_hub(name: str, *, replace: bool) -> None:
    """Raise ValueError without a name OWNER/NAME, a token, a hub that answers, or where the name is taken."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push: got {name!r}; expected OWNER/NAME. Name the user or organisation, too.")
    if not get_token():
        rule = "one that may write. Run `hf auth login`, or set HF_TOKEN."
        raise ValueError(f"--push: got no token of the hub; expected {rule}")
    api = HfApi()
    try:
        api.model_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        return
    except Exception as error:  # of whichever client the hub's package has: httpx, requests
        is_answer = isinstance(error, HfHubHTTPError)
        got = f"got {_cause(error)} from {api.endpoint}"
        advice = "Check token and name" if is_answer else "Check the network and HF_ENDPOINT"
        raise ValueError(f"--push: {got}; expected an answer. {advice}.") from error
    if not replace:
        advice = "Name another, or give --force to add a commit to it"
        raise ValueError(f"--push: got {name}, which exists; expected a new repository. {advice}.")


def push(folder: Path, name: str, *, private: bool, replace: bool) -> str:
    """Make the repository and upload the folder in one commit; return its address.

    ValueError where the hub refuses; the folder stays as it is.
    """
    api: Any = HfApi()
    place = "was not made"
    try:
        api.create_repo(name, private=private, exist_ok=replace)
        place = "is there, without this commit; --force adds it"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a model of wcitrain")
    except Exception as error:
        got = f"got {_cause(error)} from {api.endpoint}"
        advice = f"The folder {folder} is whole; {name} {place}"
        raise ValueError(f"--push: {got}; expected it to take {name}. {advice}.") from error
    return f"{api.endpoint}/{name}"


def _cause(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} ({text.strip().rstrip('.')})"
