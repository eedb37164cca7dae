"""The paper: energy, sensitivity, masks and the search for the best one. Torch and NumPy only."""
