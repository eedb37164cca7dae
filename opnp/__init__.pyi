from .deployment.detector import SavedDetector as SavedDetector
from .deployment.detector import load as load
from .detectors.opnp import OPNP as OPNP
from .errors import InputError as InputError
from .pruning.masks import PruningMask as PruningMask
from .pruning.search import search_masks as search_masks
from .pruning.sensitivity import neuron_sensitivity as neuron_sensitivity
from .pruning.sensitivity import parameter_sensitivity as parameter_sensitivity
from .pruning.settings import SearchSettings as SearchSettings

__version__: str
