"""Measure: suites, judges, statistics, and the run that ties them together."""
