"""A run of the pipeline, from `params.yaml` to the report, without an orchestrator."""
