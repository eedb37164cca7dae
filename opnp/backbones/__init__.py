"""Trained classifiers: their encoder and linear head, weights, training, cached features."""
