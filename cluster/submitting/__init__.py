"""Sending a job to a Ray cluster: the working tree as a package, its environment without secrets, its log."""
