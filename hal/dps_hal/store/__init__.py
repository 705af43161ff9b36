"""Records in flash that a power cut cannot lose."""
