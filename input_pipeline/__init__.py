"""What a run reads: examples -> vocabulary -> buckets -> batch(root key, step)."""
