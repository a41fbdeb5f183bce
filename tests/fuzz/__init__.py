"""Readers of what comes from anybody, given what nobody would write: `make fuzz` (SECONDS=600 by default)."""
