"""The servers that jobs talk to (S3, MLflow, Ray), started on the loopback of one machine."""
