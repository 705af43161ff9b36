"""What a board never loads: back ends and stores that need an operating system."""
