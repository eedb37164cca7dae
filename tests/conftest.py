"""Settings for every test: reproducible examples, and one thread, since cores are shared."""

import torch
from hypothesis import settings

settings.register_profile("opnp", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("opnp")
torch.set_num_threads(1)
