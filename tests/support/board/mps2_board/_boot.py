"""Mounts the flash before anything else runs, as the firmware of a real board does."""

import mps2  # type: ignore[import-not-found]
import vfs  # type: ignore[import-not-found]

_flash = mps2.Flash()
try:
    vfs.mount(vfs.VfsLfs2(_flash, progsize=256, readsize=256), "/")
except OSError:
    vfs.VfsLfs2.mkfs(_flash, progsize=256, readsize=256)
    vfs.mount(vfs.VfsLfs2(_flash, progsize=256, readsize=256), "/")

if mps2.setting("joined"):
    import network

    network.LAN().active(True)
