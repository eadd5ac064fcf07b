"""The demo checkpoint that the repository ships."""

from __future__ import annotations

from pathlib import Path

from expertmesh.mesh.errors import UserError

DEMO_MODEL_NAME = "expertmesh-demo"


def demo_model_path() -> Path:
    """The folder ``demo/model`` of the repository that this package runs from.

    Raises:
        UserError: the package was installed without the repository around it.
    """
    # resolve() follows src/expertmesh/mesh, a symbolic link, to the repository's top-level folder.
    path = Path(__file__).resolve().parents[2] / "demo" / "model"
    if not (path / "config.json").is_file():
        raise UserError(
            "model.path",
            "is unset, and the demo model is not beside this installation",
            "set model.path (or --model) to a Hugging Face checkpoint folder, or run from a clone of the repository",
        )
    return path
