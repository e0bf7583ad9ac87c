"""What a crash may leave behind: every directory that recovery has to read.

    files = FileSystem.found(root, "a.engram", ignored=("LOCK",))
    disk = RecordingDisk()
    with engram_store.open(path, "train", memtable_dir=root / "memory", disk=disk) as store:
        train(store)  # path is root / "a.engram"
    workspace = Workspace(root, "a.engram", ignored=("LOCK",))
    for operation in disk.operations:
        for image in lost_host(files, rng, subsets=8):
            workspace.put(image)  # the directory as the next boot might find it
            recover_and_compare()  # with `workspace.disk`
        files.apply(operation)

`FileSystem` promises what POSIX promises: a synced file has its content, a synced directory its
names, and everything else is there or not, in part, in any order.
"""

from engram_store.testing.crash.images import dead_process, lost_host, torn_operation
from engram_store.testing.crash.model import FileSystem
from engram_store.testing.crash.nodes import Blob, Image
from engram_store.testing.crash.workspace import Workspace

__all__ = [
    "Blob",
    "FileSystem",
    "Image",
    "Workspace",
    "dead_process",
    "lost_host",
    "torn_operation",
]
