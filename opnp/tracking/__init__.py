"""Runs, models and the model registry in MLflow."""
