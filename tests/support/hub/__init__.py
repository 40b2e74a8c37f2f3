"""A Hub on loopback that the real `huggingface_hub` client talks to, with faults to inject: `HubServer`."""

from tests.support.hub.faults import Faults
from tests.support.hub.server import HubServer
from tests.support.hub.store import Commit

__all__ = ["Commit", "Faults", "HubServer"]
