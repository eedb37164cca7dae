"""Digests of code: what other code has made is made again."""

import hashlib
from pathlib import Path
from types import ModuleType

__all__ = ["code_digest"]


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the sources of modules."""
    sha = hashlib.sha256()
    for module in modules:
        sha.update(Path(str(module.__file__)).read_bytes())
    return sha.hexdigest()
