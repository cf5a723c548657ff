"""What a running task tells: its progress, and what it has printed."""
