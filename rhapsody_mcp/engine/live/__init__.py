"""What running tasks tell: their progress, and what they print."""
