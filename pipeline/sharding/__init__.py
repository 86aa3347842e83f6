"""Shard sets written: plan, samples, shards, statistics, commit."""
