"""What a run needs, how long it takes and what it costs: sizing, the planner and a simulation of a spot cluster."""
