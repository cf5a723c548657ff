"""The ledger: what the service must not forget, in a file that survives it."""
