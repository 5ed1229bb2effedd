"""How a network is trained: one update, the identity of a run, its data, what is measured meanwhile."""
