"""A trained token as one row of a stock checkpoint: what engines load without trimtab."""
