"""Files and directories that are there whole or not at all, their hashes, locks between processes, and errors of the disk."""

from corral.storage.disk_errors import storage_errors
from corral.storage.files import (
    cache_root,
    link_or_copy_tree,
    new_directory,
    remove_temporary_files,
    remove_tree,
    tree_size,
    write_atomic,
    write_json,
)
from corral.storage.hashes import cached_file_hashes, sha256_file, tree_hashes
from corral.storage.locks import file_lock, read_write_lock

__all__ = [
    "cache_root",
    "cached_file_hashes",
    "file_lock",
    "link_or_copy_tree",
    "new_directory",
    "read_write_lock",
    "remove_temporary_files",
    "remove_tree",
    "sha256_file",
    "storage_errors",
    "tree_hashes",
    "tree_size",
    "write_atomic",
    "write_json",
]
