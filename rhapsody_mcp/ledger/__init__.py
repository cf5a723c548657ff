"""The ledger: sessions, tasks and outcomes in an SQLite file that survives the service."""
