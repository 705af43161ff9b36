"""All targets, by name."""

from __future__ import annotations

from support.fuzz import desk, device

TARGETS = {target.name: target for target in (*device.TARGETS, *desk.TARGETS)}
