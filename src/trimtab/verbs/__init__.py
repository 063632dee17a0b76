"""The verbs of the command line, a file for each kind of work. Each is thin: it settles what was asked, calls the API, and says what came of it."""
