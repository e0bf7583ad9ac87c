"""Checking a store's files against their checksums (docs/format.md, section 'verify').

`blocks` reads files, `description` checks what never changes, `needed` reads the manifests, `parts`
checks base generations and segments, `memtables` commit records, `store` puts them together,
`report` says what was found and what to do.
"""

from engram_store.layout.verify.report import Damage, FileKind, Rows, VerifyReport
from engram_store.layout.verify.store import verify_store

__all__ = ["Damage", "FileKind", "Rows", "VerifyReport", "verify_store"]
