"""One node of an engine: its hardware, and how processes are started, watched and ended there."""
