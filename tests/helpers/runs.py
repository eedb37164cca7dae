"""Parts of a run, written without running the stages."""

from opnp.data.preprocessing import Preprocessing
from opnp.runtime import tensors
from opnp.runtime.files import digest
from opnp.workspace import Workspace

__all__ = ["write_backbone"]


def write_backbone(workspace: Workspace, classes: list[str]) -> str:
    """Write the file of a backbone that states what it is, but holds no weights; its SHA-256."""
    about = {
        "preprocessing": Preprocessing(8, "L", (0.5,), (0.5,)).as_json(),
        "classes": classes,
        "spec": {"name": "resnet"},
    }
    tensors.save(workspace.backbone, {}, about)
    return digest(workspace.backbone)
