"""Checkpoints by their id on the Hugging Face hub: downloaded once into its cache, never with code."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)

REPO_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$"
CONFIG = ("config.json",)
WHOLE = ("*.json", "*.jinja", "*.safetensors")
"""Configuration, tokenizer, chat templates, the weights and their index."""
SUBFOLDERS = ("*/*",)
"""Other copies of the weights, and code; nothing that is read lies in one."""


def is_repo(model: str) -> bool:
    """Whether a MODEL that a user typed is a hub id: ``ORGANISATION/NAME``, and no folder here is called so."""
    return re.fullmatch(REPO_PATTERN, model) is not None and not Path(model).exists()


def fetch_repo(repo: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a repository in the hub's cache, after fetching what it lacks.

    ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to Hugging Face's tools.

    Args:
        revision: a branch, a tag or a commit; None = the main branch.
        weights: False = config.json alone.

    Raises:
        UserError: the repository or revision does not exist, needs permission, or cannot be fetched and is not
            in the cache.
    """
    # Imported here: it costs every service half a second, and only this needs it.
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    name = repo if revision is None else f"{repo} at {revision}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(WHOLE if weights else CONFIG),
            ignore_patterns=list(SUBFOLDERS),
        )
    except errors.GatedRepoError:
        raise UserError(
            "model.repo", f"{name} needs permission", "ask for it on the repository's page and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError("model.revision", f"{name} does not exist", "give a branch, a tag or a commit of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            "model.repo", f"{name} does not exist or is private", "check its spelling, or set HF_TOKEN"
        ) from None
    except Exception as error:  # noqa: BLE001 - the hub's client lets errors of its HTTP library through
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model.repo",
            f"{name} cannot be fetched and is not whole in the cache ({type(error).__name__}: {reason:.200})",
            "check the network and HF_HUB_OFFLINE, or set model.path to a folder that holds it",
        ) from None
    log.info("model %s is in %s", name, folder)
    return Path(folder)
