"""One soft token: its objective (soft weighting), its training, and the artefact it becomes."""
