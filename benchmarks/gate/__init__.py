"""How often the gate is wrong: simulated pairs of models whose true difference is known."""
