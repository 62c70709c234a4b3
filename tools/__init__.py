"""What you run beside a run."""
