"""OOD detectors: our own, those of pytorch-ood by name, and how each is tuned."""
