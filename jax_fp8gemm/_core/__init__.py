"""What numbers are and mean."""
