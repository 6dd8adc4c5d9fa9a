"""Side-by-side measurements; each is one command and writes docs/results/."""
