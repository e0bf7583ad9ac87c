"""What a store directory looks like: names, formats, checksums. No threads, no mappings.

docs/format.md is the byte-level truth; this package is its only reader and writer.
"""
