"""One suite a kind; each a class of tests that an author subclasses."""
