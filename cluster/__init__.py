"""The jobs that a user can submit, each a thin composition of `lipflow` and `pipeline`."""
