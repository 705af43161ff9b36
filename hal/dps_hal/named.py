"""Named tuples: on a board those that are built in, elsewhere some that a start can afford."""

import sys

if sys.implementation.name == "micropython":
    from collections import namedtuple
else:
    from dps_hal.host.named_tuples import namedtuple  # type: ignore[assignment]

__all__ = ["namedtuple"]
