"""The store through which workers find each other listens where it was told to, and nowhere else."""

from __future__ import annotations

from datetime import timedelta

import psutil
import torch.distributed as dist

from cluster.training.process_group import serve_store


def _listens_on(port: int) -> set[str]:
    found = psutil.Process().net_connections(kind="tcp")
    return {entry.laddr.ip for entry in found if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port}


def test_the_store_listens_on_the_given_address_alone_and_serves_workers():
    store, port = serve_store("127.0.0.1", 2, timeout_s=60)
    assert _listens_on(port) == {"127.0.0.1"}
    worker = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=60))
    worker.set("answer", "42")
    assert store.get("answer") == b"42"


def test_torch_s_own_store_listens_on_all_interfaces():
    # Why the other one is there: once this fails, it can go.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    assert _listens_on(store.port) & {"::", "0.0.0.0"}
