"""The pipeline's own small programs: each one is run as ``python -m tools.<name>``."""
