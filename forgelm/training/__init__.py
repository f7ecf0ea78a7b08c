"""Training that can be interrupted: data order, snapshots, and the trainer they serve."""
