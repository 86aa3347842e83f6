"""What is kept in MLflow: runs, without secrets, and the registry of avatars with its gate."""
