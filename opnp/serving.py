"""The former home of `opnp.deployment.mlflow_model`, kept for one release.

Models registered with version 0.1 name this module as their loader.
"""

from opnp.deployment.mlflow_model import _load_pyfunc

__all__ = ["_load_pyfunc"]
