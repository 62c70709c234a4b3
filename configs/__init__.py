"""What to run: the typed configuration and one file per run."""
