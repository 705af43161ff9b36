# Freezes the agent into a firmware:
#     make BOARD=... FROZEN_MANIFEST=<checkout>/micropython/manifest.py
# The board's own manifest comes first: it has asyncio and ssl. opt=3 leaves out line numbers.
# ruff: noqa: F821
# pyright: reportUndefinedVariable=false

include("$(BOARD_DIR)/manifest.py")

package(
    "dps_agent",
    (
        "__init__.py",
        "assignment.py",
        "backoff.py",
        "der.py",
        "effects.py",
        "http1.py",
        "hub_effects.py",
        "lifecycle.py",
        "messages.py",
        "patience.py",
        "registration.py",
        "sas.py",
        "session.py",
        "settings.py",
        "utc.py",
    ),
    base_path="../agent",
    opt=3,
)
package(
    "dps_hal",
    (
        "__init__.py",
        "activation.py",
        "block.py",
        "contracts.py",
        "errors.py",
        "littlefs.py",
        "platform.py",
        "slots.py",
        "tpm_errors.py",
        "tpm_keys.py",
        "tpm_rules.py",
        "tpm_upkeep.py",
        "wire/__init__.py",
        "wire/commands.py",
        "wire/i2c.py",
        "wire/operations.py",
        "wire/sessions.py",
        "wire/spi.py",
        "wire/tis.py",
        "wire/upkeep.py",
    ),
    base_path="../hal",
    opt=3,
)
package(
    "dps_board",
    (
        "__init__.py",
        "clock.py",
        "config.py",
        "factory.py",
        "https.py",
        "hub.py",
        "keys.py",
        "memory.py",
        "mqtt.py",
        "ntp.py",
        "parts.py",
        "runner.py",
        "tls.py",
    ),
    base_path=".",
    opt=3,
)
