"""The jobs that a user can submit, each a thin composition of `lipflow` and `pipeline`."""

import os

# Ray replaces a loopback address by one that other machines reach, for a cluster that it starts as for one that it
# joins; its ports would then be open on all interfaces. Ray reads this variable when it is imported, which is later
# than here. A driver of a cluster of several machines needs its real address.
_host = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://").rsplit(":", 1)[0]
if _host in {"", "127.0.0.1", "localhost"}:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
