"""Task requests: what an agent asked for, as it was sent, as it becomes a task, and as the ledger keeps it."""
