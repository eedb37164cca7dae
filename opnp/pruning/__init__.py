"""The paper: energy, sensitivity, masks, and the search for the best mask."""
