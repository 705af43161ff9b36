"""A Device Provisioning Service on your desk, TPM attestation over HTTPS, and the IoT hubs behind it, over MQTT.

Everything is verified: endorsement keys, answers to challenges, tokens.

Written from the protocol alone; it imports nothing of the agent, so that a mistake there can't hide itself here. (Both
read what people write by `dps_text`, which knows no protocol.)
"""
