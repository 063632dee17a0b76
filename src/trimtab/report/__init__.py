"""The report: run folders in, one HTML page out that a person can look at, print and send on."""
