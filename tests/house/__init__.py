"""House tests: the project checks its own habits."""
