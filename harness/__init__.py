"""Keeps the books: the clock, the runs, the ledger, the audit. Locked; no agent need read it."""
