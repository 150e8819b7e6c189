"""What samples are made under: a class, a caption, or an embedding."""

from .base import Conditions, Kind
from .captions import Captions
from .classes import Classes
from .embeddings import Embeddings
from .kinds import KINDS, Conditional, as_conditions, condition_config, kind_of

__all__ = [
    "KINDS",
    "Captions",
    "Classes",
    "Conditional",
    "Conditions",
    "Embeddings",
    "Kind",
    "as_conditions",
    "condition_config",
    "kind_of",
]
