"""MLflow: runs, models and the registry."""
