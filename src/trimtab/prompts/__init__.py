"""Requests to learn from: records, where they come from, and the strict filter they pass."""
