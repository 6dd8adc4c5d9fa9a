"""A feed whose truth is known: engagement in the contract beside the true chance of every action."""
