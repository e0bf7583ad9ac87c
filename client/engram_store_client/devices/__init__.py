"""Rows to a GPU and gradients back, beside what it computes: pinned memory, streams, buffers.

On a CPU none of it is used: rows are the store's own memory. Imports nothing by itself, because
`connect` needs `host_memory` where there may be no torch.
"""
