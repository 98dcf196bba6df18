"""All peers, and which of them run on a device."""

from __future__ import annotations

from ..device import Device
from . import peers_cpu, peers_gpu, peers_torch
from .peer import Peer
from .peer_llama import LlamaCpp

PEERS: tuple[Peer, ...] = (*peers_torch.PEERS, *peers_cpu.PEERS, LlamaCpp(), *peers_gpu.PEERS)


def peers_of(device: Device) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are installed for ``device``, and how to install each other one."""
    here = [peer for peer in PEERS if device.vendor in peer.vendors]
    missing = {peer.name: reason for peer in here if (reason := peer.missing())}
    return [peer for peer in here if peer.name not in missing], missing
