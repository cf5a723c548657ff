"""What outlives a crash of the service: written down, restored, and cleaned up after."""
