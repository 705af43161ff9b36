"""A Device Provisioning Service on your desk: TPM attestation over HTTPS, with everything verified.

Written from the protocol alone; it imports nothing of the agent, so that a mistake there can't hide itself here.
"""
