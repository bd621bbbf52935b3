"""What lies on the disk: files that are written whole or not at all, and the records of results in them.

`files` writes, reads and hashes; `records` are the results and `provenance` how they came about; `cache` and `tensors` keep
what took long, under a key; `running` claims a folder for the process that works there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.storage import files as files
    from alter.storage import records as records
    from alter.storage.cache import Cached as Cached
    from alter.storage.cache import cache_folder as cache_folder
    from alter.storage.cache import recall as recall
    from alter.storage.cache import remember as remember
    from alter.storage.files import check_disk as check_disk
    from alter.storage.files import digest as digest
    from alter.storage.files import file_digest as file_digest
    from alter.storage.files import finite as finite
    from alter.storage.files import folder_digest as folder_digest
    from alter.storage.files import from_json as from_json
    from alter.storage.files import loadable as loadable
    from alter.storage.files import read_object as read_object
    from alter.storage.files import read_text as read_text
    from alter.storage.files import replacing as replacing
    from alter.storage.files import to_csv as to_csv
    from alter.storage.files import to_json as to_json
    from alter.storage.files import write_atomic as write_atomic
    from alter.storage.provenance import code_digest as code_digest
    from alter.storage.provenance import commit as commit
    from alter.storage.provenance import stamped as stamped
    from alter.storage.provenance import versions as versions
    from alter.storage.records import VERSION as VERSION
    from alter.storage.records import Record as Record
    from alter.storage.records import read_records as read_records
    from alter.storage.records import read_run as read_run
    from alter.storage.records import write_records as write_records
    from alter.storage.running import CLAIM_FILE as CLAIM_FILE
    from alter.storage.running import check_deletable as check_deletable
    from alter.storage.running import check_free as check_free
    from alter.storage.running import claim as claim
    from alter.storage.running import release as release
    from alter.storage.running import take_lock as take_lock
    from alter.storage.running import undone_if_refused as undone_if_refused
    from alter.storage.tensors import keep as keep
    from alter.storage.tensors import kept as kept

lazy(globals())
