"""Room on a small heap."""

import gc
import sys

from dps_hal.platform import MICROPYTHON


def forget(*modules: str) -> None:
    """Lets go of modules whose work is done, so that their memory is free; the next import loads them again.

    On MicroPython only. What they made and somebody still has goes on to work.
    """
    for module in modules if MICROPYTHON else ():
        if sys.modules.pop(module, None) is not None:
            package, _, name = module.rpartition(".")
            if package:
                sys.modules[package].__dict__.pop(name, None)
    gc.collect()
