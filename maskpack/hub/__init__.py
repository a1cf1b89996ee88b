"""Push, pull and search: adapters on the Hugging Face Hub or in a folder. The only importer of huggingface_hub."""

from .download import PulledAdapter, pull
from .reference import Reference, parse_reference
from .repository import PushedAdapter
from .search import FoundAdapter, search_adapters
from .upload import push

__all__ = [
    "FoundAdapter",
    "PulledAdapter",
    "PushedAdapter",
    "Reference",
    "parse_reference",
    "pull",
    "push",
    "search_adapters",
]
