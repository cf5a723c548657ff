"""One session: it accepts tasks, hands them to backends, and keeps account of them."""
