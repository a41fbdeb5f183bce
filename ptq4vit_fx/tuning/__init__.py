"""Tuning: which form each product gets, by what it costs in agreement and what it gains in time, size or bits."""
