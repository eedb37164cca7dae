"""OOD detection for trained image classifiers by optimal parameter and neuron pruning.

The public names, which `__init__.pyi` lists, are imported on first use: a command that needs only
one of them does not wait for the libraries behind the others.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
