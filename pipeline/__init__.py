"""The data: captures in, WebDataset shards out, batches back."""
