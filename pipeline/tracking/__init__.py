"""MLflow: the spool and its sender, the run, the registry.

`config`, `spool` and `system_metrics` import without MLflow: the training loop depends on nothing else here.
"""
