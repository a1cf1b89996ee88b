"""Push and pull: adapters on the Hugging Face Hub or in a local folder. The only importer of huggingface_hub."""

from .download import PulledAdapter, pull
from .reference import Reference, parse_reference
from .repository import PushedAdapter
from .upload import push

__all__ = ["PulledAdapter", "PushedAdapter", "Reference", "parse_reference", "pull", "push"]
