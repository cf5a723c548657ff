"""What tasks have printed, while they run and afterwards."""
