"""A loopback Hub for tests: real HTTP, real git repositories, no network.

What it does follows the public protocol and what the client was seen to need. Rules that only the real Hub knows
(which files become LFS, what a card may say, rate limits) are our reading.
"""

from . import lies
from .accounts import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN
from .faults import Fault
from .server import HubServer

__all__ = ["READ_TOKEN", "STRANGER_TOKEN", "WRITE_TOKEN", "Fault", "HubServer", "lies"]
