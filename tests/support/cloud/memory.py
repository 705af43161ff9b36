"""Registrations as plainly as can be, for tests of the service alone: what the store is compared with."""

from __future__ import annotations

from dps_emulator.registrations import Registration, Registrations


class PlainRegistrations(dict[str, Registration], Registrations):
    """A dictionary that is walked through for a place."""

    def __setitem__(self, key: str, registration: Registration) -> None:
        """Puts it last, as the newest."""
        self.pop(key, None)
        super().__setitem__(key, registration)

    def at(self, hub: str, device_id: str) -> Registration | None:
        """See Registrations."""
        place = hub.lower(), device_id.lower()
        for registration in reversed(self.values()):
            assigned = registration.assignment
            if assigned and (assigned.hub.lower(), assigned.device_id.lower()) == place:
                return registration
        return None

    def devices_at(self, hub: str) -> set[str]:
        """See Registrations."""
        assigned = [registration.assignment for registration in self.values() if registration.assignment]
        return {each.device_id.lower() for each in assigned if each.hub.lower() == hub.lower()}
