"""A run: its directory on a disk or in a bucket, checkpoints, ledger, lock, logs and pictures."""
