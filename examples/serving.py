"""A detector served over HTTP: registered in MLflow, promoted, started, and asked once.

python examples/serving.py [FOLDER]

The folder may be the one in which own_model.py made its detector.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import digits
import own_model

from opnp.tracking import registry
from opnp.workspace import Workspace


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of ``opnp serve`` on a free port of this machine, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "opnp", "serve", "--port", port]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
        try:
            while True:
                try:
                    urlopen(f"{address}/ping").close()
                    break
                except URLError:
                    if process.poll() is not None:
                        raise RuntimeError((folder / "server.log").read_text()) from None
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait()


def main(folder: Path) -> list[dict[str, Any]]:
    """Serve a detector from ``folder`` and return its answer, a row for each image."""
    if not (folder / "detector").is_dir():
        own_model.main(folder)
    # A store of MLflow for this example alone: `mlflow.db` and `mlruns` in the folder.
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"

    # Register: the version is the challenger until it is promoted.
    workspace = Workspace(folder)
    with chdir(folder):
        registry.register(workspace, folder / "detector", trust=own_model.MODEL)
        print(f"version {registry.promote(workspace)} is champion")

    # Ask: a row for each image, with the bytes of its file.
    pictures = [min(folder.glob(f"{name}/**/*.png")) for name in ("test", *digits.OOD)]
    rows = [{"image": base64.b64encode(path.read_bytes()).decode()} for path in pictures]
    with server(folder) as address:
        request = Request(
            f"{address}/invocations",
            json.dumps({"dataframe_records": rows}).encode(),
            {"content-type": "application/json"},
        )
        with urlopen(request) as response:
            answer: list[dict[str, Any]] = json.load(response)["predictions"]
    for path, row in zip(pictures, answer, strict=True):
        print(f"{path.relative_to(folder)}: {row}")
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="opnp-")).resolve())
