"""What a TPM is asked, over whatever reaches it."""
