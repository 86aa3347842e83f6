"""What is in a capture or a shard set, and what of it is bad."""
