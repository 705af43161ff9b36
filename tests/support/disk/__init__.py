"""Flash, disks and file systems that lose power, and stores that lose records."""
