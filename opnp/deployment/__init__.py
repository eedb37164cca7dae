"""Detectors that are fitted, saved as folders, applied to images, exported and served."""
