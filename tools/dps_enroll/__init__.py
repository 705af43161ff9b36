"""Enrols a list of TPMs at a Device Provisioning Service: `dps-enroll FILE`, for the host of whoever makes devices."""
