"""Whether a running endpoint really serves a token: what it tells (`told.py`), what it should tell (`expected.py`), and what follows (`check.py`)."""
