"""A run's directory on a disk or in a bucket: checkpoints, lock, ledger, logs, pictures."""
