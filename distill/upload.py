"""An exported student on a model hub, for those who ask for it with ``push_to_hub``."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from models.errors import UserError


def check_token(repo: str) -> None:
    """UserError, before anything is trained, where an upload could only fail."""
    if not get_token():
        raise UserError(f"push_to_hub: {repo} needs a token that may write: `hf auth login`, or HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Create ``repo`` (org/name) if need be and put the files of ``folder`` there; the address.

    UserError if that fails, whatever the reason: the student is whole, and a second command brings it there.
    """
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        message = f"Upload {folder.parent.name}"
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub: {repo}: {reason}; the student is in {folder}: `hf upload {repo} {folder}` brings it there"
        ) from error
