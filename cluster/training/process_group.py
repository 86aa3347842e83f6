"""The workers' process group, whose store listens on the node's own address.

torch's ``TCPStore``, through which workers find each other, listens on all interfaces and asks nobody who they are;
Ray Train starts one on rank 0. Here rank 0 gives it a socket that is bound to the address by which Ray knows the node:
loopback in a cluster of one machine, the cluster's network elsewhere.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from cluster.training.worker import listen_for_sigterm

_served: list[dist.TCPStore] = []
"""Rank 0's store: it serves the others for as long as somebody holds it."""


@dataclass
class NodeTorchConfig(TorchConfig):
    """For ``TorchTrainer``: Ray's own, but for where the store listens, and for workers that note SIGTERM."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the workers up."""
        return _NodeTorchBackend


class _NodeTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Serve the store on rank 0, then join all workers; ``backend_config`` is a :class:`NodeTorchConfig`."""
        worker_group.execute(listen_for_sigterm)
        has_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = backend_config.backend or ("nccl" if has_gpu else "gloo")
        world_size, timeout_s = len(worker_group), backend_config.timeout_s
        host, port = worker_group.execute_single(0, _serve, world_size, timeout_s)
        worker_group.execute(_set_torch_distributed_env_vars)
        joining = [
            worker_group.execute_single_async(rank, _join, host, port, rank, world_size, backend, timeout_s)
            for rank in range(world_size)
        ]
        ray.get(joining)


def node_listener(host: str) -> socket.socket:
    """A socket that listens on a free port of ``host`` alone."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


def serve_store(host: str, world_size: int, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """A store that listens on ``host`` alone, and its port."""
    listener = node_listener(host)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # The store closes it.
        master_listen_fd=listener.detach(),
    )
    return store, port


def _serve(world_size: int, timeout_s: float) -> tuple[str, int]:
    """On rank 0; (address, port) of the store."""
    host = ray.util.get_node_ip_address()
    store, port = serve_store(host, world_size, timeout_s)
    _served[:] = [store]
    return host, port


def _join(host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
    """On every worker."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    timeout = timedelta(seconds=timeout_s)
    store = _served[0] if rank == 0 else dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
