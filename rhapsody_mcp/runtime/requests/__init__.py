"""Task requests of agents: their fields, the tasks made from them, and their stored form in the ledger."""
