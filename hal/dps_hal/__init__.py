"""The hardware of a device: its TPM and the storage that outlives a power cut."""
