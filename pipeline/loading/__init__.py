"""Shard sets read: batches for training, single frames and views for everything else."""
