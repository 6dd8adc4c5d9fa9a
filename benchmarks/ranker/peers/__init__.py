"""Public rankers on our tables, in an environment of their own."""
